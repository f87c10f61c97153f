import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from metroem import __main__ as metroem_main
from metroem.errors import CheckpointError, DatasetError, PyramidError, UsageError
from metroem.geometry.grid import Grid
from metroem.io.volume_write import NewVolume, Notes, SectionWriter
from metroem.models.module_folders import init_pyramid
from metroem.pyramid import Pyramid
from metroem.stack.align_stack import make_step
from metroem.stack.check import CheckReportStep, CheckStep, check_volume
from metroem.stack.check_plan import load_plan, plan_check
from metroem.stack.requests import CheckRequest, PlaceRequest
from metroem.stack.task_records import TaskRecords
from metroem.synthetic.tissue import TissueRecipe, make_tissue
from tests.stack.checks import run_check, run_report
from tests.stack.textures import waves, write_sections
from tests.volumes import ReadCount

ROWS, COLS, NUM = 500, 420, 10
BLANK, MOVED, HOLED = 2, 4, 9
OFFSET = (1000, 3000, 20)  # x, y, z


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    """Sections of which one is blank, one moved by 6 px, one has a patch that is."""
    sections = [waves(ROWS, COLS) for _ in range(NUM)]
    sections[BLANK][:] = 0
    sections[MOVED] = waves(ROWS, COLS, (6, 0))
    sections[HOLED][256:, :256] = waves(ROWS, COLS, (0, -3.5))[256:, :256]
    folder = tmp_path_factory.mktemp("check")
    return write_sections(folder / "image", sections, mips=2, offset=OFFSET)


@pytest.fixture(scope="module")
def figures(volume, tmp_path_factory):
    return run_check(volume, tmp_path_factory.mktemp("out"))


def by_z(figures):
    return {section["z"] - OFFSET[2]: section for section in figures["sections"]}


def test_each_section_has_its_jump_and_correlation(figures):
    sections = by_z(figures)
    assert list(sections) == list(range(NUM))
    assert sections[1]["jump_median_px"] == pytest.approx(0, abs=0.1)
    assert sections[1]["correlation"] == pytest.approx(1, abs=0.005)
    for z in (MOVED, MOVED + 1):
        assert sections[z]["jump_median_px"] == pytest.approx(6, abs=0.1)
        assert sections[z]["correlation"] < 0.7
    assert sections[MOVED + 1]["jitter_median_px"] == pytest.approx(12, abs=0.1)
    assert figures["stack"]["jump_median_px"] == pytest.approx(0, abs=0.1)
    assert figures["stack"]["worst_z"] - OFFSET[2] in (MOVED, MOVED + 1)


def test_a_blank_section_is_named_and_the_next_is_compared_with_the_one_before(figures):
    sections = by_z(figures)
    assert figures["blank"] == [BLANK + OFFSET[2]] and figures["alone"] == []
    assert sections[BLANK]["tissue"] == 0 and sections[1]["tissue"] == 1
    assert sections[BLANK]["against"] is None
    assert sections[BLANK]["jump_median_px"] is None
    assert sections[BLANK + 1]["against"] == OFFSET[2] + BLANK - 1
    assert sections[0]["against"] is None


def test_sections_that_stand_out_are_named_with_a_reason(figures):
    reasons = {one["z"] - OFFSET[2]: one["reason"] for one in figures["stand_out"]}
    assert list(reasons) == [BLANK, MOVED, MOVED + 1]
    assert reasons[BLANK] == "is blank"
    assert reasons[MOVED] == f"jumps by 6.0 px from z {OFFSET[2] + MOVED - 1}"
    z = OFFSET[2] + MOVED
    back = f"jumps by 6.0 px from z {z}, but z {z} stands out itself"
    assert reasons[MOVED + 1] == back


def test_the_worst_places_are_where_they_were_put(figures):
    first, *others = figures["worst"]
    assert first["z"] - OFFSET[2] in (MOVED, MOVED + 1)
    assert first["error_px"] == pytest.approx(6, abs=0.1)
    # x of the volume runs along the rows.
    sign = 1 if first["z"] - OFFSET[2] == MOVED else -1
    assert first["jump_x_px"] == pytest.approx(6 * sign, abs=0.1)
    assert first["jump_y_px"] == pytest.approx(0, abs=0.1)
    (patch, *_) = (one for one in others if one["z"] - OFFSET[2] == HOLED)
    assert patch["error_px"] == pytest.approx(3.5, abs=0.1)
    assert patch["jump_y_px"] == pytest.approx(-3.5, abs=0.1)
    # The middle of rows 256 to 500, cols 0 to 256.
    assert (patch["x"], patch["y"]) == (OFFSET[0] + 378, OFFSET[1] + 128)
    per_section = [one["z"] for one in figures["worst"]]
    assert max(per_section.count(z) for z in per_section) == 2


def test_keys_are_those_of_the_documentation(figures):
    assert set(figures) == {
        *("format_version", "version", "cv_path", "before_path", "pyramid_path"),
        *("field_path", "mip", "z_start", "z_end", "corner", "size_px"),
        *("correlation_window_px", "jump_window_px", "search_px", "place_px"),
        *("cell_px", "stack", "blank", "alone", "unplaced", "stand_out", "worst"),
        *("folded", "sections"),
    }
    common = {"tissue", "correlation", "correlation_p05", "jump_median_px", "lost"}
    common |= {"jump_p95_px", "jitter_median_px", "jitter_p95_px"}
    assert set(figures["sections"][1]) == common | {"z", "against"}
    assert set(figures["stack"]) == common | {
        *("correlation_median", "correlation_worst", "worst_z"),
    }
    assert set(figures["worst"][0]) == {
        *("z", "against", "x", "y", "correlation", "error_px", "jump_px"),
        *("jump_x_px", "jump_y_px"),
    }
    assert figures["z_start"] == OFFSET[2] and figures["z_end"] == OFFSET[2] + NUM
    assert figures["corner"] == list(OFFSET[:2])
    assert figures["size_px"] == [ROWS, COLS]


def test_the_split_into_tasks_changes_no_figure(volume, figures, tmp_path, monkeypatch):
    monkeypatch.setattr("metroem.stack.check_plan._MIN_SECTIONS", 2)
    split = run_check(volume, tmp_path, chunk_px=256)
    assert len(list((tmp_path / "check").glob("z*.json"))) == 5 * 4
    assert split == figures


def test_the_report_reads_the_figures_of_several_areas_at_once(
    volume, figures, tmp_path, monkeypatch
):
    monkeypatch.setattr("metroem.stack.check_plan._MIN_SECTIONS", 2)
    monkeypatch.setattr("metroem.stack.check._READ_AT_ONCE", 3)
    read, numbers = Notes.read, []
    monkeypatch.setattr(
        Notes,
        "read",
        lambda self, names: numbers.append(len(names)) or read(self, names),
    )
    assert run_check(volume, tmp_path, chunk_px=256) == figures
    assert numbers == [3] * 6 + [2]  # 5 ranges of sections, 4 areas each


def test_tasks_may_run_twice_and_in_any_order(volume, tmp_path):
    for order in (1, -1):
        run_check(volume, tmp_path, order=order, chunk_px=256)
        contents = {
            path.relative_to(tmp_path): path.read_bytes()
            for path in tmp_path.rglob("*")
            if path.is_file()
        }
        if order == 1:
            first = contents
    assert contents == first


def test_a_step_is_pickled_without_what_it_opened(volume, tmp_path):
    check = CheckStep(plan_check(CheckRequest(cv_path=volume, dst_path=str(tmp_path))))
    (task,) = check.tasks()
    check.run(task)
    other = pickle.loads(pickle.dumps(check))
    assert other.plan == check.plan and other.settings == check.settings
    assert "_image" not in vars(other)
    json.dumps(check.settings)


def test_a_plan_is_stored_and_read(volume, tmp_path):
    plan = plan_check(CheckRequest(cv_path=volume, dst_path=str(tmp_path)))
    with pytest.raises(DatasetError, match="no such file"):
        load_plan(str(tmp_path))
    plan.save()
    assert load_plan(str(tmp_path)) == plan


def test_a_worker_makes_the_steps_of_a_check(volume, tmp_path):
    plan = plan_check(CheckRequest(cv_path=volume, dst_path=str(tmp_path)))
    check = CheckStep(plan)
    plan.save()
    with pytest.raises(DatasetError, match="no stack was begun"):
        make_step(str(tmp_path), "check")  # of a plan that was not begun
    for step in (check, CheckReportStep(check)):
        TaskRecords(str(tmp_path), step.name, step.settings).write_settings()
        made = make_step(str(tmp_path), step.name)
        assert type(made) is type(step) and made.settings == step.settings
    with pytest.raises(UsageError, match="--queue fq://x: workers do not place"):
        PlaceRequest(cv_path="v", dst_path="d", z_start=0, z_end=2, queue="fq://x")


def test_figures_of_an_earlier_run_are_said_to_be_so(volume, tmp_path, caplog):
    request = CheckRequest(cv_path=volume, dst_path=str(tmp_path), z_end=OFFSET[2] + 2)
    for times in (0, 1):
        check_volume(request)
        assert caplog.text.count("these figures were measured before") == times
    check_volume(replace(request, again=True))
    assert caplog.text.count("these figures were measured before") == 1


def test_settings_change_with_the_content_of_the_volume(tmp_path):
    sections = [waves(150, 200, seed=seed) for seed in (0, 1)]
    digests = []
    for _ in range(2):
        path = write_sections(tmp_path / "image", sections)
        request = CheckRequest(cv_path=path)
        digests.append(CheckStep(plan_check(request)).settings["content"])
        sections[1] = np.roll(sections[1], 1, 0)
    assert digests[0] != digests[1]
    assert request.destination == str(tmp_path)


def test_each_stored_chunk_is_read_once_by_a_task(volume, tmp_path, monkeypatch):
    plan = plan_check(CheckRequest(cv_path=volume, dst_path=str(tmp_path)))
    check = CheckStep(plan)
    (task,) = check.tasks()
    count = ReadCount(monkeypatch)
    figures = check.run(task)
    chunks = {name: n for name, n in count.times.items() if name.startswith("8_8_40/")}
    assert set(chunks.values()) == {1}
    assert figures["bytes_needed"] == NUM * ROWS * COLS
    assert figures["bytes_read"] == count.num_bytes


def test_sections_before_a_task_are_counted_as_read(volume, tmp_path, monkeypatch):
    monkeypatch.setattr("metroem.stack.check_plan._MIN_SECTIONS", 5)
    check = CheckStep(plan_check(CheckRequest(cv_path=volume, dst_path=str(tmp_path))))
    first, second = check.tasks()
    assert check.run(first)["bytes_read"] == 5 * ROWS * COLS
    # Five sections, and the four before them.
    assert check.run(second) == {
        "bytes_read": 9 * ROWS * COLS,
        "bytes_needed": 5 * ROWS * COLS,
    }


def test_a_part_of_the_sections_is_compared_with_those_before_it(
    volume, figures, tmp_path
):
    part = run_check(volume, tmp_path, z_start=23, z_end=26)
    assert part["sections"] == by_z_range(figures, 23, 26)


def by_z_range(figures, start, end):
    return [one for one in figures["sections"] if start <= one["z"] < end]


def test_a_coarser_mip_halves_jumps_and_keeps_coordinates(volume, tmp_path):
    figures = run_check(volume, tmp_path, mip=1)
    moved = by_z(figures)[MOVED]
    assert moved["jump_median_px"] == pytest.approx(3, abs=0.1)
    assert figures["size_px"] == [ROWS // 2, COLS // 2]
    first = figures["worst"][0]
    assert OFFSET[0] < first["x"] < OFFSET[0] + ROWS
    assert first["z"] - OFFSET[2] in (MOVED, MOVED + 1)


def test_before_is_measured_at_the_same_location(volume, tmp_path):
    raw = [waves(ROWS, COLS, (2.5 * (z % 2), 0)) for z in range(NUM - 1)]
    path = write_sections(tmp_path / "raw", raw, offset=OFFSET)
    figures = run_check(volume, tmp_path / "out", before=path)
    sections = by_z(figures)
    for z in range(1, NUM - 1):
        before = sections[z]["before"]
        assert before["jump_median_px"] == pytest.approx(2.5, abs=0.1)
    assert sections[NUM - 1]["before"]["tissue"] == 0  # the raw volume ends before
    assert figures["stack"]["before"]["jitter_median_px"] == pytest.approx(5, abs=0.1)


def test_the_field_of_a_pyramid_is_measured(volume, tmp_path, monkeypatch):
    seen = []

    def align(src, tgt, mip, finetune):
        seen.append((src.shape, mip, finetune))
        field = np.zeros((2, *src.shape), np.float32)
        field[0], field[1] = 3, 4
        field[1, : src.shape[0] // 10] = 100  # at the border, which does not count
        return field

    monkeypatch.setattr(Pyramid, "load", lambda *_: SimpleNamespace(align=align))
    plan = plan_check(CheckRequest(cv_path=volume, dst_path=str(tmp_path)))
    check = CheckStep(replace(plan, pyramid_path="pyramid"))
    for task in check.tasks():
        check.run(task)
    figures = run_report(check)
    assert figures["stack"]["residual_median_px"] == pytest.approx(5, abs=0.01)
    sections = by_z(figures)
    assert sections[MOVED]["residual_p95_px"] < 110
    assert sections[0]["residual_median_px"] is None
    assert seen == (NUM - 2) * [((ROWS, COLS), 0, False)]


def test_fields_beside_pixels_without_data_do_not_count(tmp_path, monkeypatch):
    sections = [waves(200, 300) for _ in range(2)]
    sections[0][:, :100] = sections[1][:, 260:] = 0
    path = write_sections(tmp_path / "image", sections)

    def align(src, tgt, mip, finetune):
        field = np.zeros((2, *src.shape), np.float32)
        field[0, :, 100:130] = field[0, :, 230:260] = 50
        field[1, :, 132:228] = 2
        return field

    monkeypatch.setattr(Pyramid, "load", lambda *_: SimpleNamespace(align=align))
    plan = plan_check(CheckRequest(cv_path=path, dst_path=str(tmp_path)))
    check = CheckStep(replace(plan, pyramid_path="pyramid"))
    for task in check.tasks():
        check.run(task)
    stack = run_report(check)["stack"]
    assert (stack["residual_median_px"], stack["residual_p95_px"]) == (2, 2)


def write_field(folder, values, mip, notes):
    """Write fields (n, 2, h, w) of the volume at a mip."""
    num, _, rows, cols = values.shape
    area = Grid(0, *OFFSET[:2], rows << mip, cols << mip)
    wanted = NewVolume(
        *(2, str(values.dtype), mip, area),
        *(range(OFFSET[2], OFFSET[2] + num), (8, 8, 40), notes),
    )
    writer = SectionWriter(str(folder), wanted, flag="--dst_path")
    for z, section in enumerate(values, start=OFFSET[2]):
        writer.put(section, Grid(mip, area.x, area.y, rows, cols), z)
    return str(folder)


def fields(mirrored=()):
    """Fields of a placement at mip 1, turned; one section folds in 20 x 30 px."""
    rows, cols = ROWS // 2, COLS // 2
    row, col = np.mgrid[:rows, :cols].astype(np.float32)
    values = np.empty((NUM, 2, rows, cols), np.float32)
    for z in range(NUM):
        angle, flip = 0.3 * z, -1 if z in mirrored else 1
        values[z, 0] = flip * (np.cos(angle) * col - np.sin(angle) * row) - col + 1
        values[z, 1] = np.sin(angle) * col + np.cos(angle) * row - row + 500
    # Runs backwards in the middle: the determinant is negative there.
    middle = (slice(100, 120), slice(60, 90))
    values[3, 0][middle] -= (-2 if 3 in mirrored else 2) * (np.arange(60, 90) - 60)
    return values


@pytest.mark.parametrize("mirrored", [(), (3, 5)])
@pytest.mark.parametrize("chunk_px", [256, 2048])
def test_folds_are_counted_whatever_the_placement(volume, tmp_path, mirrored, chunk_px):
    notes = {"channel_order": "yx", "field_unit": "relative"}
    path = write_field(tmp_path / "field", fields(mirrored), 1, notes)
    figures = run_check(
        volume,
        tmp_path / "out",
        **{"field_path": path, "field_mip": 1, "chunk_px": chunk_px},
    )
    sections = by_z(figures)
    assert [z for z in range(NUM) if sections[z]["folds"]] == [3]
    inner = (ROWS // 2 - 2) * (COLS // 2 - 2)
    determinants = expected_determinants(fields(mirrored)[3])
    sign = -1 if 3 in mirrored else 1
    expected = np.count_nonzero(sign * determinants <= 0)
    assert expected > 300
    assert sections[3]["folds"] == pytest.approx(expected / inner, rel=1e-4)
    assert figures["stack"]["folds"] == pytest.approx(expected / inner / NUM, rel=1e-4)
    place = figures["folded"][0]
    assert place["z"] == OFFSET[2] + 3
    assert 2 * 100 <= place["x"] - OFFSET[0] <= 2 * 120
    assert 2 * 60 <= place["y"] - OFFSET[1] <= 2 * 90


def expected_determinants(field):
    """Determinants by central differences, without the border."""
    row, col = np.mgrid[: field.shape[1], : field.shape[2]]
    across, down = field[0] + col, field[1] + row

    def slopes(values):
        values = values.astype(np.float64)
        along_rows = (values[2:, 1:-1] - values[:-2, 1:-1]) / 2
        return along_rows, (values[1:-1, 2:] - values[1:-1, :-2]) / 2

    (down_r, down_c), (across_r, across_c) = slopes(down), slopes(across)
    return down_r * across_c - down_c * across_r


def test_the_channel_order_that_a_field_volume_states_is_used(volume, tmp_path):
    notes = {"channel_order": "xy", "field_unit": "mip0", "mip": 1}
    values = fields()[:, ::-1] * np.float32(2)
    path = write_field(tmp_path / "field", np.ascontiguousarray(values), 1, notes)
    figures = run_check(volume, tmp_path / "out", field_path=path)
    assert [one["z"] - OFFSET[2] for one in figures["sections"] if one["folds"]] == [3]


def test_fields_of_zeros_do_not_pass_for_fields_without_folds(volume, tmp_path, caplog):
    notes = {"channel_order": "yx", "field_unit": "relative", "mip": 1}
    path = write_field(tmp_path / "field", 0 * fields(), 1, notes)
    figures = run_check(volume, tmp_path / "out", field_path=path)
    assert figures["stack"]["folds"] is None
    assert "was this mip written?" in caplog.text


def test_neighbouring_tissue_is_told_from_other_tissue(tmp_path):
    tissue = make_tissue(TissueRecipe(num_sections=4, rows=300, cols=280, seed=1))
    tissue = np.clip(tissue, 1, 255)
    tissue[2] = np.roll(tissue[2], (60, 70), (0, 1))
    figures = run_check(write_sections(tmp_path / "image", tissue), tmp_path)
    lost = [section["lost"] for section in figures["sections"]]
    assert lost[0] is None and lost[1] == 0
    assert lost[2] > 0.5 and lost[3] > 0.5
    assert [one["z"] for one in figures["stand_out"]] == [2, 3]
    assert figures["stand_out"][0]["reason"].startswith("does not match z 1 within")
    assert figures["worst"][0]["jump_px"] is None
    assert figures["worst"][0]["error_px"] == 16


def refused(error, words, **flags):
    with pytest.raises(error, match=words) as caught:
        request = CheckRequest(**flags)
        request.check_paths()
        plan_check(request)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_checked_is_refused_in_a_line(volume, tmp_path):
    out = {"dst_path": str(tmp_path / "out")}
    one = write_sections(tmp_path / "one", [waves(150, 200)])
    refused(DatasetError, "two sections or more", cv_path=one, **out)
    refused(DatasetError, "two sections or more", cv_path=volume, z_end=21, **out)
    refused(DatasetError, "change --z_start", cv_path=volume, z_end=99, **out)
    refused(UsageError, "expected a section", cv_path=volume, z_start=5, z_end=5)
    small = write_sections(tmp_path / "small", 2 * [waves(50, 200)])
    refused(DatasetError, "finer --mip", cv_path=small, **out)
    refused(DatasetError, "finer --mip", cv_path=volume, mip=3, **out)
    refused(DatasetError, "no such folder", cv_path=str(tmp_path / "none"), **out)
    refused(
        UsageError, "web servers take no files", cv_path="https://host/bucket/image"
    )
    notes = {"channel_order": "yx", "field_unit": "relative", "mip": 1}
    path = write_field(tmp_path / "field", fields(), 1, notes)
    refused(DatasetError, "2 channels", cv_path=path, **out)
    grey = {"field_path": volume, "field_mip": 0}
    refused(DatasetError, "1 channels", cv_path=volume, **grey, **out)
    short = write_field(tmp_path / "short", fields()[:, :, :200], 1, notes)
    refused(DatasetError, "the aligned volume", cv_path=volume, field_path=short, **out)
    few = write_field(tmp_path / "few", fields()[:4], 1, notes)
    refused(DatasetError, "sections", cv_path=volume, field_path=few, **out)
    del notes["mip"]
    unsure = write_field(tmp_path / "unsure", fields(), 1, notes)
    refused(DatasetError, "--field_mip", cv_path=volume, field_path=unsure, **out)
    refused(UsageError, "give --field_path", cv_path=volume, field_mip=1)
    elsewhere = write_sections(tmp_path / "elsewhere", 2 * [waves(ROWS, COLS)])
    refused(DatasetError, "same coordinates", cv_path=volume, before=elsewhere, **out)


def test_a_pyramid_that_cannot_measure_is_refused(volume, tmp_path):
    pyramid = tmp_path / "pyramid"
    init_pyramid(pyramid, [2, 1], "correlation")
    flags = {"cv_path": volume, "dst_path": str(tmp_path / "out")}
    refused(CheckpointError, "no weights", pyramid_path=pyramid, **flags)
    refused(PyramidError, "no such pyramid", pyramid_path=tmp_path / "no", **flags)


def test_a_mip_that_was_never_written_is_no_good_result(tmp_path):
    path = write_sections(tmp_path / "image", 3 * [np.zeros((150, 200))])
    with pytest.raises(DatasetError, match="no section has data at mip 0"):
        run_check(path, tmp_path / "out")


def test_figures_that_are_missing_are_an_error(volume, tmp_path):
    check = CheckStep(plan_check(CheckRequest(cv_path=volume, dst_path=str(tmp_path))))
    with pytest.raises(DatasetError, match="figures of this area are missing"):
        run_report(check)


def test_a_chunk_that_cannot_be_read_is_an_error(volume, tmp_path):
    sections = [waves(150, 200) for _ in range(3)]
    path = write_sections(tmp_path / "image", sections)
    chunk = next(Path(path).glob("8_8_40/64-*_1-2"))
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(DatasetError, match=chunk.name):
        run_check(path, tmp_path / "out")


def test_the_command_prints_a_table_and_json(volume, tmp_path, capsys, caplog):
    metroem_main.main(["check", "--cv_path", volume, "--dst_path", str(tmp_path)])
    text = caplog.text
    assert "3 of 10 sections stand out: z 22 is blank; z 24 jumps by 6.0 px" in text
    assert "correlation, median section" in text
    assert text.count("off by") == 5
    assert f"{tmp_path}/report.html" in text
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["blank"] == [22] and last["jump_median_px"] < 0.1
    assert (tmp_path / "report.html").is_file()
