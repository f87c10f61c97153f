"""align-stack as a command, on small volumes with a small pyramid."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from metroem.__main__ import main
from metroem.errors import MetroEMError
from metroem.io.image_volume import ImageVolume
from metroem.io.volume import Volume
from metroem.io.volume_write import write_volume
from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from metroem.models.weights import checkpoint_path, save_weights
from metroem.stack.align_stack import make_step
from metroem.synthetic.tissue import TissueRecipe, make_tissue
from tests.models.specs import CORRELATION, write_spec
from tests.volumes import make_volume

NUM, ROWS, COLS = 4, 112, 176


@pytest.fixture(scope="module")
def tissue():
    """Sections of one tissue, (NUM + 1, ROWS, COLS) uint8, none 0."""
    made = make_tissue(TissueRecipe(NUM + 1, ROWS, COLS, seed=3))
    return np.maximum(made, 1)


@pytest.fixture(scope="module")
def stack(tissue, tmp_path_factory):
    """A folder with a volume, whose sections are shifted, and a pyramid."""
    folder = tmp_path_factory.mktemp("stack")
    shifted = [
        ndimage.shift(section, (4 * (z % 3), -3 * (z % 2)), order=0)
        for z, section in enumerate(tissue)
    ]
    write_volume(folder / "raw", np.stack(shifted), 3, chunk_px=64)
    (module,) = init_pyramid(folder / "pyramid", [0])
    write_spec(module / "model", CORRELATION)
    torch.manual_seed(0)
    net = load_module(module, checkpoint_name=None).aligner.net
    save_weights(net, checkpoint_path(module / "model", "checkpoint"))
    return folder


def align(stack, dst, *flags, z_start=0, z_end=NUM):
    main(
        [
            *("align-stack", "--cv_path", str(stack / "raw"), "--dst_path", str(dst)),
            *("--pyramid_path", str(stack / "pyramid"), "--z_start", str(z_start)),
            *("--z_end", str(z_end), "--chunk_px", "128", "--block_sections", "2"),
            *("--window_px", "128", "--halo_px", "32", "--neighbours", "2"),
            *("--mips", "2", *flags),
        ]
    )


WITHOUT_CHECK = ("--steps", "place", "pairs", "relax", "render")


@pytest.fixture(scope="module")
def aligned(stack):
    align(stack, stack / "aligned")
    return stack / "aligned"


def digests(folder):
    """Checksums of the aligned volume and of the fields, but for the command."""
    files = [p for name in ("image", "field") for p in (folder / name).rglob("*")]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
        if path.is_file() and path.name != "provenance"
    }


def test_all_files_are_written_and_sections_lie_on_each_other(aligned, tissue):
    names = {path.name for path in aligned.iterdir()}
    assert names >= {"stack.json", "placement.json", "image", "field", "pairs"}
    assert names >= {"check.json", "report.html"}
    image = ImageVolume(str(aligned / "image"))
    area, sections = image.extent()
    assert sections == range(NUM) and image.mips == [0, 1]
    after = image.read(area, sections)[:, 0]
    raw = ImageVolume(str(aligned.parent / "raw"))
    before = raw.read(raw.extent()[0], range(NUM))[:, 0]
    assert min(likeness(after)) > max(likeness(before))


def likeness(sections):
    """Correlation of neighbours where all sections have tissue."""
    everywhere = ndimage.binary_erosion((sections > 0).all(0), iterations=4)
    assert everywhere.mean() > 0.2
    values = sections[:, everywhere].astype(float)
    return [
        np.corrcoef(a, b)[0, 1] for a, b in zip(values[:-1], values[1:], strict=True)
    ]


def test_sections_may_begin_below_0(stack, aligned, tmp_path):
    raw = ImageVolume(str(stack / "raw"))
    sections = raw.read(raw.extent()[0], range(NUM))[:, 0]
    write_volume(tmp_path / "raw", sections, 3, chunk_px=64, offset=(-48, 28, -3))
    (tmp_path / "pyramid").symlink_to(stack / "pyramid")

    align(tmp_path, tmp_path / "a", *WITHOUT_CHECK, z_start=-3, z_end=NUM - 3)

    there = ImageVolume(str(tmp_path / "a" / "image"))
    assert there.extent()[1] == range(-3, NUM - 3)
    # Windows begin elsewhere, so fields differ a little.
    assert min(likeness(there.read(there.extent()[0], range(-3, 1))[:, 0])) > 0.5


def test_the_field_leads_from_the_image_to_the_raw_section(aligned):
    """Bilinear interpolation of the raw section at the field gives the image."""
    image = ImageVolume(str(aligned / "image"))
    area, _ = image.extent()
    field = Volume(str(aligned / "field"), resolution=image.resolution)
    vectors = field.read(area.cover(3), range(1, 2))[0] * 8
    rows, cols = area.shape
    at = np.meshgrid(
        (np.arange(rows) + 0.5) / 8 - 0.5,
        (np.arange(cols) + 0.5) / 8 - 0.5,
        indexing="ij",
    )
    along_cols, along_rows = (
        ndimage.map_coordinates(v, at, order=1, mode="nearest") for v in vectors
    )
    raw = ImageVolume(str(aligned.parent / "raw"))
    section = raw.read(raw.extent()[0], range(1, 2))[0, 0].astype(float)
    row, col = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    expected = ndimage.map_coordinates(
        section,
        [row + area.x + along_rows, col + area.y + along_cols],
        order=1,
    )
    got = image.read(area, range(1, 2))[0, 0].astype(float)
    inner = (slice(80, -40), slice(80, -40))
    assert np.abs(got - expected)[inner].max() < 1.0  # rounded, and 0.01 px of float32


def test_a_second_run_has_nothing_to_do(aligned, stack, caplog):
    before = digests(aligned)
    caplog.set_level("INFO")

    align(stack, aligned)

    assert digests(aligned) == before
    assert caplog.text.count("nothing to do") == 8


def test_shards_in_any_order_write_the_same_bytes(aligned, stack, tmp_path):
    for _ in range(len(WITHOUT_CHECK) + 2):
        for part in (2, 0, 1):
            align(stack, tmp_path / "a", "--shard", f"{part}/3", *WITHOUT_CHECK)

    assert digests(tmp_path / "a") == digests(aligned)


def test_other_chunks_and_blocks_give_the_same_fields(aligned, stack, tmp_path):
    flags = ("--chunk_px", "64", "--block_sections", "3")
    align(stack, tmp_path / "a", *WITHOUT_CHECK, *flags)

    nm = ImageVolume(str(stack / "raw")).resolution
    one, other = (
        Volume(str(folder / "field"), resolution=nm)
        for folder in (aligned, tmp_path / "a")
    )
    area, sections = one.extent()
    assert other.extent() == (area, sections)
    before, after = (volume.read(area.cover(3), sections) for volume in (one, other))
    assert np.abs(before).max() > 0.1
    # Cells of 8 px, so this is 0.05 px.
    assert np.quantile(np.abs(after - before), 0.999) < 0.05 / 8


def test_a_stack_grows_and_keeps_its_blocks(aligned, stack, tmp_path, caplog):
    align(stack, tmp_path / "a", *WITHOUT_CHECK)
    before = digests(tmp_path / "a")

    align(stack, tmp_path / "a", *WITHOUT_CHECK, z_end=NUM + 1)

    after = digests(tmp_path / "a")
    old = [name for name in before if name.endswith(("_0-1", "_1-2", "_2-3", "_3-4"))]
    assert len(old) > 10 and all(after[name] == before[name] for name in old)
    assert any(name.endswith("_4-5") for name in after)
    image = ImageVolume(str(tmp_path / "a" / "image"))
    assert image.extent()[1] == range(NUM + 1)
    assert (image.read(image.extent()[0], range(4, 5)) > 0).mean() > 0.5
    with pytest.raises(MetroEMError, match="--z_end 4: .* up to section 5"):
        align(stack, tmp_path / "a", *WITHOUT_CHECK)
    # Old sections get other places, which the fields of pairs do not know.
    align(stack, tmp_path / "a", "--steps", "place", "--again", z_end=NUM + 1)
    assert "steps pairs, relax, render are stale now" in caplog.text


def test_another_setting_names_the_steps_that_it_makes_stale(
    aligned, stack, tmp_path, caplog
):
    align(stack, tmp_path / "a", *WITHOUT_CHECK)
    before = digests(tmp_path / "a")
    caplog.set_level("INFO")

    align(stack, tmp_path / "a", "--steps", "relax", "--smoothness", "30")

    assert "bending 6.0 (asked for: 180.0)" in caplog.text
    assert "steps render are stale now: run them again: --steps render" in caplog.text
    after = digests(tmp_path / "a")
    assert any(after[n] != before[n] for n in before if n.startswith("field/"))
    assert all(after[n] == before[n] for n in before if n.startswith("image/"))


def test_unplaced_sections_end_with_an_error_that_names_them(stack, tmp_path, tissue):
    noise = np.random.default_rng(0).integers(1, 255, tissue[0].shape)
    sections = np.stack([*tissue[:3], noise.astype(np.uint8)])
    write_volume(tmp_path / "raw", sections, 3, chunk_px=64)
    (tmp_path / "pyramid").symlink_to(stack / "pyramid")

    with pytest.raises(MetroEMError, match="match no neighbour, .*: 3; look"):
        align(tmp_path, tmp_path / "a", *WITHOUT_CHECK)
    align(tmp_path, tmp_path / "a", *WITHOUT_CHECK, "--allow_unplaced")
    note = json.loads((tmp_path / "a" / "placement.json").read_text())
    assert note["sections"]["3"]["how"] == "neighbours"


def refused(stack, tmp_path, *flags, z_end=NUM, match):
    with pytest.raises(MetroEMError, match=match) as caught:
        align(stack, tmp_path / "a", *flags, z_end=z_end)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_bad_input_is_refused_in_one_line_before_anything_is_written(stack, tmp_path):
    refused(stack, tmp_path, z_end=1, match="expected two sections or more")
    refused(stack, tmp_path, z_end=40, match="sections 0...39 are needed")
    refused(stack, tmp_path, "--mip", "5", match="5")
    refused(
        stack, tmp_path, "--mip", "1", match="the last stage .* mip 0, which is finer"
    )
    for flag in ("--chunk_px", "--window_px"):
        refused(stack, tmp_path, flag, "72", match=f"{flag} 72: expected a multiple of")
    refused(stack, tmp_path, "--smoothness", "inf", match="--smoothness inf")
    flags = ("--again", "--shard", "0/2")
    refused(stack, tmp_path, *flags, match="run one array for each step")
    flags = ("--checkpoint_name", "other")
    refused(stack, tmp_path, *flags, match="no weights 'other'")


def test_a_volume_of_16_bit_is_refused(stack, tmp_path):
    write_volume(tmp_path / "raw", np.ones((3, 64, 64), np.float32), 1)
    (tmp_path / "pyramid").symlink_to(stack / "pyramid")

    refused(tmp_path, tmp_path, z_end=3, match="is float32; expected uint8")


def test_a_destination_of_another_volume_is_refused(aligned, stack, tmp_path, tissue):
    write_volume(tmp_path / "raw", tissue, 3, chunk_px=64)
    (tmp_path / "pyramid").symlink_to(stack / "pyramid")
    with pytest.raises(MetroEMError, match="holds a stack with --cv_path"):
        align(tmp_path, aligned)


def test_what_is_read_is_not_written_to(stack, tmp_path):
    """Both volumes are of one kind, so writing one over the other would succeed."""
    project = tmp_path / "project"
    flags = ["--z_start", "0", "--z_end", "4", "--dst_path", str(tmp_path / "p")]
    flags += ["--render", f"file://{project}/image/"]
    main(["place", "--cv_path", str(stack / "raw"), *flags])
    before = digests(project)
    with pytest.raises(MetroEMError, match="--cv_path .* would be overwritten"):
        main(["place", "--cv_path", str(project / "image"), *flags])
    (tmp_path / "raw").symlink_to(project / "image")
    (tmp_path / "pyramid").symlink_to(stack / "pyramid")
    with pytest.raises(MetroEMError, match="--cv_path .* would be overwritten"):
        align(tmp_path, project)
    with pytest.raises(MetroEMError, match="--layer .* would be overwritten"):
        align(stack, project, "--layer", str(project / "image"))
    assert digests(project) == before and not (project / "stack.json").exists()


def test_a_stack_is_the_same_from_another_folder(stack, tmp_path, monkeypatch):
    align(stack, tmp_path / "a", "--steps", "place")
    for name in ("raw", "pyramid"):
        (tmp_path / name).symlink_to(stack / name)
    before = (tmp_path / "a" / "stack.json").read_bytes()

    monkeypatch.chdir(tmp_path)
    align(Path(), "a/", "--steps", "place")
    monkeypatch.chdir(stack)
    align(Path("../stack0/."), tmp_path / "a", "--steps", "place")

    assert (tmp_path / "a" / "stack.json").read_bytes() == before
    monkeypatch.chdir("/")  # as a worker that was started there
    assert make_step(str(tmp_path / "a"), "place-match").tasks() == ["z0-4"]


def test_a_volume_that_was_written_again_is_placed_again(stack, tissue, tmp_path):
    write_volume(tmp_path / "raw", tissue, 1, chunk_px=64)
    (tmp_path / "pyramid").symlink_to(stack / "pyramid")
    align(tmp_path, tmp_path / "a", "--steps", "place", "--mips", "8")
    before = json.loads((tmp_path / "a" / "placement.json").read_text())["canvas"]
    # It consists of whole pixels of all mips.
    assert not any(size % 2**7 for size in before.values())

    changed = tissue.copy()
    changed[1] = np.roll(tissue[1], 30, 1)
    write_volume(tmp_path / "raw", changed, 1, chunk_px=64)
    with pytest.raises(MetroEMError, match="tasks of the step place before are not"):
        align(tmp_path, tmp_path / "a", "--steps", "pairs")
    align(tmp_path, tmp_path / "a", "--steps", "place")
    after = json.loads((tmp_path / "a" / "placement.json").read_text())["sections"]
    moved = after["1"]["matrix"][1][2] - after["2"]["matrix"][1][2]
    assert abs(moved - 30) < 3


def test_a_destination_below_a_file_is_refused(stack):
    with pytest.raises(MetroEMError, match="--dst_path .*info.*[Nn]ot a directory"):
        align(stack, stack / "raw" / "info")


def test_a_step_of_no_stack_or_no_name_is_refused(tmp_path, aligned):
    with pytest.raises(MetroEMError, match="no stack was begun there"):
        make_step(str(tmp_path), "pairs")
    with pytest.raises(MetroEMError, match="step 'os.system': expected one of"):
        make_step(str(aligned), "os.system")


def test_what_cannot_be_written_is_refused_before_sections_are_placed(tmp_path):
    make_volume(tmp_path / "raw", [np.ones((2, 1, 64, 80))])
    with pytest.raises(MetroEMError, match="--cv_path .* is float64; grey levels are"):
        main(
            [
                *("place", "--cv_path", str(tmp_path / "raw"), "--z_start", "0"),
                *("--z_end", "2", "--dst_path", str(tmp_path / "a")),
                *("--render", str(tmp_path / "placed")),
            ]
        )
    assert not (tmp_path / "a").exists() and not (tmp_path / "placed").exists()


def test_sections_that_were_placed_at_one_destination_are_not_those_of_today(
    stack, tmp_path
):
    for start in (0, 1, 0):
        main(
            [
                *("place", "--cv_path", str(stack / "raw"), "--z_start", str(start)),
                *("--z_end", str(NUM), "--dst_path", str(tmp_path)),
            ]
        )
        note = json.loads((tmp_path / "placement.json").read_text())
        assert list(note["sections"]) == [str(z) for z in range(start, NUM)]


def test_place_alone_writes_the_placed_volume(stack, tmp_path):
    main(
        [
            *("place", "--cv_path", str(stack / "raw"), "--z_start", "0"),
            *("--z_end", str(NUM), "--dst_path", str(tmp_path / "a")),
            *("--render", str(tmp_path / "placed"), "--model", "rigid"),
        ]
    )
    placed = ImageVolume(str(tmp_path / "placed"))
    area, sections = placed.extent()
    assert sections == range(NUM) and Path(tmp_path / "a" / "placement.json").is_file()
    assert min(likeness(placed.read(area, sections)[:, 0])) > 0.5


def test_a_step_is_refused_if_one_before_it_is_not_done(stack, aligned, tmp_path):
    """What was not written looks like zeros: the stack would not be aligned."""
    align(stack, tmp_path / "a", "--steps", "place")
    before = (tmp_path / "a" / "stack.json").read_bytes()
    with pytest.raises(MetroEMError, match="tasks of the step pairs before are not"):
        align(stack, tmp_path / "a", "--steps", "relax", "--smoothness", "2")
    assert (tmp_path / "a" / "stack.json").read_bytes() == before
    with pytest.raises(MetroEMError, match="tasks of the step place before"):
        align(stack, tmp_path / "b", "--steps", "render")
    assert not (tmp_path / "b").exists()
    # Another setting makes the fields of pairs stale.
    with pytest.raises(MetroEMError, match="tasks of the step pairs before"):
        align(stack, aligned, "--steps", "relax", "--halo_px", "48")


def test_a_layer_of_labels_is_rendered_with_the_nearest_pixel(stack, aligned):
    raw = ImageVolume(str(stack / "raw"))
    area, sections = raw.extent()
    labels = np.zeros((*raw.read(area, sections).shape,), np.uint64)
    labels[:] = 2**40 + np.arange(labels.size).reshape(labels.shape)
    make_volume(stack / "labels", [labels], resolution=(8, 8, 40))
    flags = ("--layer", str(stack / "labels"), "--nearest")

    align(stack, aligned, "--steps", "render", *flags)

    layer = Volume(str(aligned / "layers" / "labels"))
    area, _ = layer.extent()
    found = layer.read(area, range(2, 3))[0, 0]
    image = ImageVolume(str(aligned / "image")).read(area, range(2, 3))[0, 0]
    known = found > 0
    assert known.mean() > 0.2 and set(found[known]) <= set(labels[2].ravel())
    # A pixel with tissue has the label of the raw pixel that it comes from.
    assert (known | (image == 0)).mean() > 0.99


def test_a_layer_that_lies_elsewhere_is_refused(stack, aligned, tmp_path, caplog):
    labels = np.ones((NUM + 1, 1, ROWS, COLS), np.uint64)
    before = digests(aligned)
    flags = ("--steps", "render", "--nearest", "--layer", str(tmp_path / "cells"))
    for offset, match in (
        ((8, 0, 0), "mip 0 begins at x, y, z .8, 0, 0."),
        ((0, 1000, 0), "begins at"),
    ):
        make_volume(tmp_path / "cells", [labels], resolution=(8, 8, 40), offset=offset)
        with pytest.raises(MetroEMError, match=f"--layer .*{match}"):
            align(stack, aligned, *flags)
    few = labels[:, :, :40, :50]
    make_volume(tmp_path / "cells", [few], resolution=(8, 8, 40), offset=(-99, 0, 0))
    with pytest.raises(MetroEMError, match="has nothing where the sections"):
        align(stack, aligned, *flags)
    assert not (aligned / "layers" / "cells").exists() and digests(aligned) == before

    make_volume(tmp_path / "cells", [few], resolution=(8, 8, 40))
    align(stack, aligned, *flags)
    assert "covers x 0...40, y 0...50 of the sections" in caplog.text


def test_masks_that_do_not_cover_the_sections_are_refused(stack, tmp_path):
    make_volume(
        tmp_path / "masks",
        [np.ones((NUM, 1, 32, 32), np.uint8)],
        resolution=(8, 8, 40),
    )
    flags = ("--masks", str(tmp_path / "masks"))
    refused(stack, tmp_path, *flags, match="--masks .*spans")


def test_masks_are_used_as_defects(stack, tmp_path):
    # Of the sections that are aligned; the volume has one more.
    masks = np.zeros((NUM, 1, ROWS, COLS), np.uint8)
    masks[1, :, 40:60, 50:90] = 1
    make_volume(tmp_path / "masks", [masks], resolution=(8, 8, 40))
    flags = ("--masks", str(tmp_path / "masks"), "--steps", "place", "pairs")

    align(stack, tmp_path / "a", *flags)

    defects = Volume(str(tmp_path / "a" / "pairs" / "defects"))
    area, _ = defects.extent()
    found = defects.read(area.cover(3), range(NUM))[:, 0]
    # 20 x 40 px are at most 4 x 6 cells of 8 px, in section 1 alone.
    assert 6 <= found[1].sum() <= 24 and not found[[0, 2, 3]].any()
