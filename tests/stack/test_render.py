"""The aligned volume, written block by block: truth by formula."""

import hashlib
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from metroem.errors import DatasetError, UsageError
from metroem.geometry.grid import Grid
from metroem.imaging.normalize import coarsen_image
from metroem.io.image_volume import ImageVolume
from metroem.io.volume import Volume
from metroem.io.volume_write import BlockWriter, NewVolume
from metroem.stack.place import Placement
from metroem.stack.render import RenderStep
from tests.volumes import make_scales, make_volume

ROWS, COLS, NUM = 176, 144, 5
RESOLUTION = (4.0, 4.0, 40.0)
# It begins outside of the raw volume and does not consist of whole blocks.
CANVAS = Grid(0, -32, 32, 160, 96)
FIELD_MIP = 3
NOTES = {
    "kind": "fields",
    "direction": "pull",
    "channel_order": "yx",
    "field_unit": "relative",
}


def tissue(dtype=np.uint8):
    """Sections without 0 but for a blank square, (NUM, ROWS, COLS)."""
    top = 250 if dtype == np.uint8 else 60000
    made = np.random.default_rng(0).integers(1, top, (NUM, ROWS, COLS)).astype(dtype)
    made[2, 40:70, 30:90] = 0
    return made


def elastic(grid, z):
    """A turn, a shift and a wave, (2, h, w): cols first, pixels of the grid's mip."""
    size = 2**grid.mip
    row = grid.x + (np.arange(grid.rows) + 0.5)[:, None] * size - 0.5
    col = grid.y + (np.arange(grid.cols) + 0.5) * size - 0.5
    cos, sin = math.cos(0.1 * z), math.sin(0.1 * z)
    along_rows = cos * row - sin * col + 20 + 3 * np.sin(col / 30 + z) - row
    along_cols = sin * row + cos * col - 12 + 3 * np.cos(row / 25) - col
    return np.stack([along_cols, along_rows]).astype(np.float32) / size


def shifted(grid, z):
    """Whole pixels: z - 2 rows and 3 z cols."""
    return np.broadcast_to(
        np.array([3 * z, z - 2], np.float32)[:, None, None] / 2**grid.mip,
        (2, *grid.shape),
    )


def write_fields(folder, make, sections=range(NUM), canvas=CANVAS):
    """Write the fields of a stack, as the step relax writes them."""
    wanted = NewVolume(2, "float32", FIELD_MIP, canvas, sections, RESOLUTION, NOTES)
    writer = BlockWriter(
        *(f"{folder}/field", wanted),
        flag="--dst_path",
        block_px=256,
        chunk_size=(256, 256, 1),
    )
    grid = canvas.at_mip(FIELD_MIP)
    for z in sections:
        writer.write(np.ascontiguousarray(make(grid, z))[None], grid, range(z, z + 1))


def placement(canvas=CANVAS, matrix=None):
    matrix = np.eye(2, 3) if matrix is None else matrix
    return Placement({z: matrix for z in range(NUM)}, {}, canvas)


def step_of(folder, source, **changes):
    """The step that renders a source into <folder>/image."""
    step = RenderStep(
        *(str(folder), f"{folder}/image", source, placement(), FIELD_MIP, range(NUM)),
        *(0, 3, 64, 2, RESOLUTION),
    )
    return replace(step, **changes)


def run(step):
    """Run all tasks of a step, and sum up what they read."""
    step.prepare(replaces=False)
    figures = [step.run(task) for task in step.tasks()]
    return {key: sum(one[key] for one in figures) for key in figures[0]}


def read(path, mip=0, sections=range(NUM), canvas=CANVAS):
    """(n, H, W) of a written volume."""
    volume = Volume(str(path), resolution=RESOLUTION)
    return volume.read(canvas.at_mip(mip), sections)[:, 0]


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def raw(tmp_path):
    """A raw volume, in chunks of two sections."""
    return make_volume(tmp_path / "raw", [tissue()[:, None]], chunk=(32, 48, 2))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_sections_that_are_shifted_by_whole_pixels_keep_their_values(tmp_path, dtype):
    sections = tissue(dtype)
    raw = make_volume(tmp_path / "raw", [sections[:, None]], chunk=(32, 48, 2))
    write_fields(tmp_path, shifted)

    figures = run(step_of(tmp_path, raw))

    padded = np.pad(sections, ((0, 0), (64, 64), (64, 64)))
    for z, found in enumerate(read(tmp_path / "image")):
        row, col = 64 - 32 + z - 2, 64 + 32 + 3 * z
        np.testing.assert_array_equal(found, padded[z, row : row + 160, col : col + 96])
    assert figures["bytes_needed"] > 0
    assert figures["bytes_read"] <= 1.3 * figures["bytes_needed"]


def test_the_result_does_not_depend_on_the_size_of_blocks(tmp_path, raw):
    write_fields(tmp_path, elastic)

    run(step_of(tmp_path, raw))
    other = {"path": f"{tmp_path}/other", "chunk_px": 128, "block_sections": 4}
    run(step_of(tmp_path, raw, **other))

    for mip in range(3):
        one, two = (read(tmp_path / name, mip) for name in ("image", "other"))
        assert (one != 0).mean() > 0.5
        np.testing.assert_array_equal(one, two)


def test_coarser_mips_are_those_of_the_whole_sections(tmp_path, raw):
    write_fields(tmp_path, elastic)

    run(step_of(tmp_path, raw))

    finest = torch.from_numpy(read(tmp_path / "image").astype(np.float32))[:, None]
    for mip in (1, 2):
        coarse = coarsen_image(finest, mip)[:, 0].numpy()
        expected = np.where(coarse > 0, np.clip(np.round(coarse), 1, 255), 0)
        np.testing.assert_array_equal(read(tmp_path / "image", mip), expected)


def test_the_volume_is_of_the_kind_of_its_source_and_says_where_it_is_from(
    tmp_path, raw
):
    write_fields(tmp_path, shifted)

    run(step_of(tmp_path, raw))

    info = json.loads((tmp_path / "image" / "info").read_text())
    assert info["data_type"] == "uint8" and info["metroem"]["kind"] == "images"
    assert [scale["chunk_sizes"] for scale in info["scales"]] == [
        [[32, 64, 2]],  # 48 px do not fit into blocks of 64
        [[32, 32, 2]],
        [[16, 16, 2]],
    ]
    assert [scale["resolution"] for scale in info["scales"]] == [
        [4, 4, 40],
        [8, 8, 40],
        [16, 16, 40],
    ]
    assert info["scales"][0]["voxel_offset"] == [-32, 32, 0]
    assert info["scales"][0]["size"] == [160, 96, 5]
    made = json.loads((tmp_path / "image" / "provenance").read_text())
    assert made["sources"] == sorted([raw, f"{tmp_path}/field"])
    assert "command" in made["processing"][0]["method"]


def test_chunks_and_encoding_can_be_chosen(tmp_path, raw):
    write_fields(tmp_path, shifted)

    run(step_of(tmp_path, raw, encoding="jpeg", chunk_size=(64, 32, 1)))

    info = json.loads((tmp_path / "image" / "info").read_text())
    assert [scale["encoding"] for scale in info["scales"]] == ["jpeg"] * 3
    assert [scale["chunk_sizes"] for scale in info["scales"]] == [
        [[64, 32, 1]],
        [[32, 32, 1]],
        [[16, 16, 1]],
    ]
    chunk = tmp_path / "image" / "4_4_40" / "32-96_64-96_1-2"
    assert chunk.read_bytes()[:2] == b"\xff\xd8"  # the begin of a JPEG


def test_a_source_in_jpeg_is_written_in_jpeg(tmp_path):
    smooth = np.full((NUM, 1, ROWS, COLS), 120, np.uint8)
    raw = make_scales(
        tmp_path / "raw", {(1, 1, 1): smooth}, resolution=(4, 4, 40), encoding="jpeg"
    )
    write_fields(tmp_path, shifted)

    run(step_of(tmp_path, raw))

    info = json.loads((tmp_path / "image" / "info").read_text())
    assert info["scales"][0]["encoding"] == "jpeg"
    found = read(tmp_path / "image")
    assert np.abs(found[2][40:].astype(int) - 120).max() <= 2


def test_a_task_that_runs_twice_writes_the_same_bytes(tmp_path, raw):
    write_fields(tmp_path, elastic)
    step = step_of(tmp_path, raw)
    run(step)
    first = digests(tmp_path / "image")

    again = pickle.loads(pickle.dumps(step))
    for task in reversed(again.tasks()):
        again.run(task)

    assert digests(tmp_path / "image") == first


def test_a_stack_grows_and_its_chunks_keep_their_bytes(tmp_path, raw):
    write_fields(tmp_path, elastic)
    short = step_of(tmp_path, raw, sections=range(4))
    run(short)
    first = digests(tmp_path / "image" / "4_4_40")

    # Two blocks of sections more to the end, and a block more in front.
    wide = Grid(0, CANVAS.x - 64, CANVAS.y, CANVAS.rows + 64, CANVAS.cols + 64)
    write_fields(tmp_path / "more", elastic, canvas=wide)
    long = step_of(
        *(tmp_path / "more", raw),
        path=f"{tmp_path}/image",
        placement=placement(wide),
        sections=range(5),
    )
    run(long)
    # A process that still knows the small bounds does not shrink the volume.
    pickle.loads(pickle.dumps(short)).run(short.tasks()[0])

    grown = digests(tmp_path / "image" / "4_4_40")
    assert len(grown) > len(first)
    # Chunks at the border were cut there, and are whole now: at y 96 of 64 px.
    kept = {name: one for name, one in first.items() if "_96-128_" not in name}
    assert kept and all(grown[name] == one for name, one in kept.items())
    volume = Volume(f"{tmp_path}/image")
    assert volume.extent() == (wide, range(5))
    inner = volume.read(CANVAS, range(4))[:, 0]
    run(step_of(tmp_path, raw, path=f"{tmp_path}/whole", sections=range(4)))
    # Within half a pixel of the field from its border, a longer field says more.
    whole = read(tmp_path / "whole", sections=range(4))
    np.testing.assert_array_equal(inner[:, 4:, :-4], whole[:, 4:, :-4])


def test_a_field_that_is_lost_is_not_zero(tmp_path, raw):
    write_fields(tmp_path, elastic)
    step = step_of(tmp_path, raw)
    run(step)
    lost = next((tmp_path / "field" / "32_32_40").glob("*_1-2"))
    lost.unlink()

    with pytest.raises(
        DatasetError, match=f"{lost.name}: this chunk .* missing.*again"
    ):
        pickle.loads(pickle.dumps(step)).run(step.tasks()[0])


def test_nothing_of_another_placement_shows_beside_a_new_one(tmp_path, raw, caplog):
    write_fields(tmp_path, elastic)
    run(step_of(tmp_path, raw))
    # Not whole chunks away: part of the old area, and more.
    moved = Grid(0, 0, 48, 128, 160)
    write_fields(tmp_path / "b", elastic, sections=range(3), canvas=moved)
    step = step_of(
        *(tmp_path / "b", raw),
        path=f"{tmp_path}/image",
        placement=placement(moved),
        sections=range(3),
        mips=2,
    )
    with pytest.raises(DatasetError, match="already exists, with"):
        step.prepare(replaces=True)  # of three mips
    step = replace(step, mips=3)
    with pytest.raises(DatasetError, match="not whole chunks of"):
        step.prepare(replaces=False)

    step.prepare(replaces=True)
    for task in step.tasks():
        step.run(task)

    assert "image: held voxels [-32, 32, 0] to [128, 128, 5], and is" in caplog.text
    volume = Volume(f"{tmp_path}/image")
    assert volume.extent() == (moved, range(3))
    run(replace(step, path=f"{tmp_path}/fresh"))
    for mip in range(3):
        one, two = (
            read(tmp_path / name, mip, range(3), moved) for name in ("image", "fresh")
        )
        assert one.any() and np.array_equal(one, two)


def test_a_section_without_a_field_is_blank(tmp_path, raw):
    def missing(grid, z):
        return elastic(grid, z) if z != 1 else np.full((2, *grid.shape), np.nan, "f4")

    write_fields(tmp_path, missing)

    run(step_of(tmp_path, raw))

    has_tissue = read(tmp_path / "image").any((1, 2))
    assert has_tissue.tolist() == [True, False, True, True, True]


def test_without_fields_sections_are_placed(tmp_path, raw):
    # From (col, row) of the canvas to those of the raw section: a turn of 90 degrees.
    matrix = np.array([[0.0, 1, 3], [-1, 0, 130]])

    run(step_of(tmp_path, raw, field_mip=None, placement=placement(matrix=matrix)))

    sections, found = tissue(), read(tmp_path / "image")
    expected = np.zeros_like(found)
    for row, col in np.ndindex(*CANVAS.shape):
        at_row, at_col = 130 - (col + CANVAS.y), row + CANVAS.x + 3
        if 0 <= at_row < ROWS and 0 <= at_col < COLS:
            expected[:, row, col] = sections[:, at_row, at_col]
    np.testing.assert_array_equal(found, expected)


def test_a_source_without_the_mip_is_averaged(tmp_path, raw):
    write_fields(tmp_path, lambda grid, z: np.zeros((2, *grid.shape), np.float32))

    run(step_of(tmp_path, raw, mip=1, mips=2, chunk_px=32))

    whole = ImageVolume(raw).read(CANVAS.at_mip(1), range(NUM))[:, 0]
    expected = np.where(whole > 0, np.round(whole), 0)
    assert expected.any()
    np.testing.assert_array_equal(read(tmp_path / "image", 1), expected)


@pytest.fixture
def labels(tmp_path):
    """Labels of 64 bits at mip 1 alone, compressed as labels are."""
    made = np.random.default_rng(5).integers(
        0, 2**63, (NUM, 1, ROWS // 8, COLS // 8), np.uint64
    )
    made = made.repeat(4, 2).repeat(4, 3)
    return make_scales(
        tmp_path / "cells",
        {(2, 2, 1): made},
        resolution=(4, 4, 40),
        encoding="raw",
        chunk=(32, 32, 1),
    )


def test_labels_are_pulled_through_the_same_fields(tmp_path, raw, labels):
    write_fields(tmp_path, elastic)

    layer = step_of(tmp_path, raw).of_layer(labels, nearest=True)
    run(layer)

    assert layer.name == "render-layer"
    assert layer.path == f"{tmp_path}/layers/cells"
    volume = Volume(layer.path, resolution=RESOLUTION)
    # The volume states mip 0, too, which is not written.
    found = volume.read(CANVAS.at_mip(1), range(NUM))[:, 0]
    source = Volume(labels, resolution=RESOLUTION).read(
        Grid(1, 0, 0, ROWS // 2, COLS // 2), range(NUM)
    )[:, 0]
    stored = elastic(CANVAS.at_mip(FIELD_MIP), 3)
    num_checked = 0
    for row in range(2, CANVAS.rows // 2 - 2, 7):
        for col in range(2, CANVAS.cols // 2 - 2, 5):
            at = [(n + 0.5) / 4 - 0.5 for n in (row, col)]
            vector = 4 * np.array([bilinear(one, *at) for one in stored])
            at_row = row + CANVAS.x // 2 + vector[1]
            at_col = col + CANVAS.y // 2 + vector[0]
            i, j = math.floor(at_row + 0.5), math.floor(at_col + 0.5)
            inside = 0 <= i < ROWS // 2 and 0 <= j < COLS // 2
            assert found[3, row, col] == (source[3, i, j] if inside else 0)
            num_checked += inside
    assert num_checked > 50


def bilinear(image, row, col):
    i, j = math.floor(row), math.floor(col)
    i, j = min(max(i, 0), image.shape[0] - 2), min(max(j, 0), image.shape[1] - 2)
    y, x = row - i, col - j
    top = image[i, j] * (1 - x) + image[i, j + 1] * x
    return top * (1 - y) + (image[i + 1, j] * (1 - x) + image[i + 1, j + 1] * x) * y


def test_coarser_labels_are_the_most_frequent_of_four(tmp_path, raw, labels):
    write_fields(tmp_path, elastic)

    run(step_of(tmp_path, raw).of_layer(labels, nearest=True))

    volume = Volume(f"{tmp_path}/layers/cells", resolution=RESOLUTION)
    fine = volume.read(CANVAS.at_mip(1), range(1))[0, 0]
    coarse = volume.read(CANVAS.at_mip(2), range(1))[0, 0]
    for row, col in np.ndindex(*coarse.shape):
        four = fine[2 * row : 2 * row + 2, 2 * col : 2 * col + 2].ravel()
        times = [np.count_nonzero(four == one) for one in four]
        assert np.count_nonzero(four == coarse[row, col]) == max(times)


def test_labels_keep_the_encoding_of_labels(tmp_path, raw):
    made = np.ones((NUM, 1, ROWS, COLS), np.uint32)
    info = "compressed_segmentation"
    cells = make_scales(
        tmp_path / "cells", {(1, 1, 1): made}, resolution=(4, 4, 40), encoding=info
    )
    write_fields(tmp_path, shifted)

    layer = step_of(tmp_path, raw).of_layer(cells, nearest=True)
    run(layer)

    scale = Volume(layer.path).info["scales"][1]
    assert scale["encoding"] == info
    assert read(layer.path, 1)[2, 20:].all()


def test_a_segmentation_stays_one_and_is_not_interpolated(tmp_path, raw):
    made = np.random.default_rng(5).integers(1, 99, (NUM, 1, ROWS, COLS), np.uint16)
    cells = make_volume(tmp_path / "cells", [made])
    file = tmp_path / "cells" / "info"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"type": "segmentation"}))
    write_fields(tmp_path, shifted)
    step = step_of(tmp_path, raw)

    layer = step.of_layer(cells, nearest=False)
    refused(layer, UsageError, "is a segmentation", "--nearest")
    run(step.of_layer(cells, nearest=True))

    info = json.loads((tmp_path / "layers" / "cells" / "info").read_text())
    assert info["type"] == "segmentation" and info["metroem"]["kind"] == "labels"


def test_a_broken_chunk_of_the_source_is_an_error_and_nothing_is_written(tmp_path, raw):
    write_fields(tmp_path, shifted)
    chunk = tmp_path / "raw" / "4_4_40" / "32-64_48-96_0-2"
    chunk.write_bytes(b"")
    step = step_of(tmp_path, raw)
    step.prepare(replaces=False)

    with pytest.raises(DatasetError, match="32-64_48-96_0-2"):
        for task in step.tasks():
            step.run(task)

    assert "32-96_32-48_0-2" not in digests(tmp_path / "image")


def refused(step, error, *words):
    """Check that a step is refused in one line, before anything is written."""
    with pytest.raises(error) as caught:
        step.prepare(replaces=False)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_what_does_not_fit_is_refused(tmp_path, raw, labels):
    write_fields(tmp_path, shifted)
    deep = make_volume(tmp_path / "deep", [tissue(np.uint16)[:, None]])
    step = step_of(tmp_path, raw)

    refused(
        replace(step, cv_path=deep, encoding="jpeg"),
        *(UsageError, "--encoding jpeg", "uint8", "uint16", "raw"),
    )
    refused(replace(step, encoding="gif"), UsageError, "--encoding gif", "jpeg")
    refused(replace(step, mips=8), UsageError, "--mips 8", "64 px", "--chunk_px")
    refused(replace(step, mips=7), UsageError, "--mips 7", "mip 6", "fewer")
    refused(
        replace(step, chunk_size=(48, 32, 1)), UsageError, "--chunk_size 48 32 1", "64"
    )
    refused(
        replace(step, chunk_size=(32, 32, 4)),
        *(UsageError, "--chunk_size 32 32 4", "--block_sections"),
    )
    refused(replace(step, sections=range(2, 7)), DatasetError, "0...4", "2...6")
    refused(step.of_layer(labels, nearest=False), UsageError, "uint64", "--nearest")
    refused(
        replace(step.of_layer(labels, nearest=True), encoding="jpeg"),
        *(UsageError, "--encoding jpeg", "uint64"),
    )
    with pytest.raises(DatasetError, match="has mips 1, the aligned images 0 to 0"):
        replace(step, mips=1).of_layer(labels, nearest=True)
    assert not (tmp_path / "image").exists()


def test_a_volume_of_another_kind_is_not_written_to(tmp_path, raw):
    write_fields(tmp_path, shifted)
    run(step_of(tmp_path, raw))

    refused(
        step_of(tmp_path, raw, encoding="jpeg"),
        *(DatasetError, f"{tmp_path}/image", "already exists", "raw", "jpeg"),
    )
    refused(
        step_of(tmp_path, raw, path=f"{tmp_path}/field", mips=4),
        *(DatasetError, "already exists", "kind"),
    )


def test_another_destination_of_the_same_sections_is_not_done(tmp_path, raw):
    step = step_of(tmp_path, raw)

    assert step.settings["to"] == "image"
    assert replace(step, path="/elsewhere").settings != step.settings
