"""metroem evaluate end to end on small pairs, as a user calls it."""

import dataclasses
import json
import shutil

import pytest

from metroem.__main__ import build_parser, main
from metroem.errors import CheckpointError, DatasetError, UsageError
from metroem.evaluation.evaluate import evaluate_dataset
from metroem.evaluation.requests import EvaluateRequest
from metroem.io.h5 import find_image_sets
from tests.evaluation.report.pages import blocks
from tests.models.specs import pyramid_with_weights
from tests.pairs import write_pairs

SHAPE = (96, 160)


@pytest.fixture
def run(tmp_path):
    """A pyramid of two stages, pairs at both mips."""
    write_pairs(tmp_path / "data", mips=(1, 0), num_pairs=2, shape=SHAPE)
    pyramid_with_weights(tmp_path / "pyramid", [1, 0])
    return tmp_path


def request(run, **more):
    return EvaluateRequest(run / "pyramid", run / "data", **{"workers": 1} | more)


def put_weights(run, stage, name):
    (module,) = (run / "pyramid").glob(f"{stage}_*")
    (module / "model" / f"{name}.state.pth.tar").touch()


def test_every_flag_reaches_the_request():
    flags = ["evaluate", "--pyramid_path", "p", "--dataset_path", "d"]
    given = set(vars(build_parser().parse_args(flags))) - {"command", "run"}
    assert given == {field.name for field in dataclasses.fields(EvaluateRequest)}


def test_a_pyramid_is_evaluated_as_a_user_calls_it(run, capsys):
    main(
        [
            *("evaluate", "--pyramid_path", str(run / "pyramid")),
            *("--dataset_path", str(run / "data"), "--no_finetune", "--workers", "1"),
            *("--json", str(run / "figures.json")),
        ]
    )
    out = capsys.readouterr().out
    assert "x0_y0_z1_MIP0.h5: means over 2 pairs of 96x160 px at mip 0" in out
    assert "x0_y0_z1_MIP0.h5 pair 1 (z 2 on 1): CPC" in out
    written = json.loads((run / "figures.json").read_text())
    assert written["format_version"] == 1
    assert written["no_finetune"] and written["chunk_px"] == 64
    (found,) = written["sets"]
    scores = [pair["score"] for pair in found["pairs"]]
    for name, mean in found["mean"].items():
        values = [score[name] for score in scores if score[name] is not None]
        assert mean is None or mean == pytest.approx(sum(values) / len(values), 1e-4)
    # There are two chunks in a row: around row 32, cols 32 and 96.
    spots = [pair["where"]["worst"] for pair in found["pairs"]]
    assert all(spot["x"] == 32 and spot["y"] in (32, 96) for spot in spots)


def test_a_report_shows_each_pair_and_how_the_training_went(run):
    metrics = run / "pyramid" / ".train" / "checkpoint" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    scores = {"loss": 2.0}
    line = {"stage": 1, "phase": 0, "epoch": 0, "training": scores, "seconds": 60}
    metrics.write_text(json.dumps(line) + "\n")
    page, figures = run / "new" / "report.html", run / "figures.json"

    evaluate_dataset(request(run, report=page, json=figures, no_finetune=True))

    data = blocks(page)
    assert list(data) == ["pair-0", "pair-1", "summary"]
    summary = data["summary"]
    (found,) = json.loads(figures.read_text())["sets"]
    for pair, row in zip(found["pairs"], summary["pairs"], strict=True):
        assert {key: row[key] for key in pair} == pair
        # The last stage's field is the pyramid's, but for the pixels compared.
        assert row["stage_cpc"][-1] == pytest.approx(pair["score"]["cpc"], rel=1e-4)
    assert summary["about"]["stages"] == ["stage 0 (mip 1)", "stage 1 (mip 0)"]
    (curve,) = summary["about"]["curves"]
    assert (curve["stage"], curve["minutes"]) == (1, [1.0])
    assert curve["values"] == {"training": [2.0]}


def test_a_report_of_a_pyramid_trained_elsewhere_has_no_curves(run, caplog):
    page = run / "report.html"
    evaluate_dataset(request(run, report=page, no_finetune=True))
    assert blocks(page)["summary"]["about"]["curves"] == []
    assert "metrics.jsonl: no such file, so the page has no curves" in caplog.text
    assert not (run / "pyramid" / ".train").exists()


def test_sections_are_warped_alike_for_every_pyramid(run, capsys):
    found = []
    for name, mips in (("one", [0]), ("two", [1, 0])):
        pyramid_with_weights(run / name, mips)
        file = run / f"{name}.json"
        evaluate_dataset(
            EvaluateRequest(
                run / name,
                run / "data",
                json=file,
                known_warps=True,
                no_finetune=True,
                workers=1,
            )
        )
        found += json.loads(file.read_text())["sets"]
    out = capsys.readouterr().out
    assert "2 sections, each warped by a known field" in out
    # The section is the pair's tgt, on both sides.
    assert "x0_y0_z1_MIP0.h5 pair 1 (z 1 on 1): EPE" in out
    one, two = ([section["score"] for section in s["known"]] for s in found)
    assert [s["before"] for s in one] == [s["before"] for s in two]
    assert one[0]["before"]["mean"] != one[1]["before"]["mean"] > 0
    assert one[0]["after"] != two[0]["after"]
    assert found[0]["mean_known"]["identity_px"] > 0


def test_finetuning_finds_a_shift_and_undoes_it(tmp_path):
    write_pairs(tmp_path / "data", mips=(0,), num_pairs=1, shape=SHAPE)
    pyramid_with_weights(tmp_path / "pyramid", [0], "scalenet")
    evaluate_dataset(request(tmp_path, json=tmp_path / "figures.json"))
    (found,) = json.loads((tmp_path / "figures.json").read_text())["sets"]
    # The sections are 3 px apart.
    assert found["mean"]["length_px"] == pytest.approx(3, abs=0.5)
    assert found["mean"]["cpc"] > 0.9 > found["mean"]["cpc_before"]
    assert found["mean"]["cycle_p95_px"] < 1 and found["mean"]["made_worse"] == 0


def test_the_worst_chunk_lies_where_the_volume_has_it(run):
    (run / "data" / "x0_y0_z1_MIP0.h5").unlink()
    data = run / "moved"
    write_pairs(data, mips=(1,), num_pairs=1, shape=(2 * 96, 2 * 160), corner=(64, 32))
    pyramid_with_weights(run / "coarse", [1])
    evaluate_dataset(
        EvaluateRequest(
            run / "coarse", data, json=run / "f.json", no_finetune=True, workers=1
        )
    )
    (found,) = json.loads((run / "f.json").read_text())["sets"]
    worst = found["pairs"][0]["where"]["worst"]
    # A pixel of mip 1 spans 2: the chunks' middles are at rows 32, cols 32 and 96.
    assert worst["x"] == 64 + 2 * 32 and worst["y"] in (32 + 2 * 32, 32 + 2 * 96)


def test_a_mip_without_images_is_named(run):
    pyramid_with_weights(run / "deep", [3, 0])
    with pytest.raises(DatasetError, match=r"stage 0 \(0_mip3in.* reads mip 3, but"):
        evaluate_dataset(EvaluateRequest(run / "deep", run / "data"))


def test_a_place_without_one_of_the_mips_is_refused(run):
    (images,) = (i for i in find_image_sets(run / "data") if i.mip == 0)
    shutil.copy(images.path, images.path.with_name("x0_y0_z9_MIP0.h5"))
    with pytest.raises(DatasetError, match="z9_MIP0.h5: its place has no image set"):
        evaluate_dataset(request(run))


def test_weights_that_some_modules_lack_are_refused(run):
    put_weights(run, 0, "mine")
    with pytest.raises(CheckpointError, match=r"1_mip0in_\w+ has no .*'mine'"):
        evaluate_dataset(request(run, checkpoint_name="mine"))
    with pytest.raises(CheckpointError, match="--checkpoint_name other"):
        evaluate_dataset(request(run, checkpoint_name="other"))


def test_images_too_small_for_a_chunk_are_refused(tmp_path):
    write_pairs(tmp_path / "data", mips=(0,), num_pairs=1, shape=(64, 128))
    pyramid_with_weights(tmp_path / "pyramid", [0])
    with pytest.raises(DatasetError, match="images of 64 x 128 px; at least 80 px"):
        evaluate_dataset(request(tmp_path))


def test_arguments_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--json .*: is a folder"):
        request(tmp_path, json=tmp_path)
    with pytest.raises(UsageError, match="--report .*: is a folder.*report.html"):
        request(tmp_path, report=tmp_path)
    with pytest.raises(UsageError, match="--report .*: --json names the same file"):
        request(tmp_path, json=tmp_path / "a", report=tmp_path / "a")
    with pytest.raises(UsageError, match="--predictions .*: is a file"):
        (tmp_path / "f").touch()
        request(tmp_path, predictions=tmp_path / "f")
    with pytest.raises(UsageError, match="--stages 0 2: .*expected .*--stages 0 1 2"):
        request(tmp_path, stages=[0, 2])
    with pytest.raises(UsageError, match="--checkpoint_name"):
        request(tmp_path, checkpoint_name="a/b")
