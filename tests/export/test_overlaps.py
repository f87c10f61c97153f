"""Check that no field is lost in silence if several cover the same pixels."""

import json

import numpy as np
import pytest
import torch
from cloudvolume import CloudVolume

from metroem.errors import DatasetError
from metroem.geometry.field import warp
from metroem.geometry.grid import Grid
from metroem.io.h5 import (
    FieldSetMeta,
    ImageSetMeta,
    Pair,
    PairLocation,
    write_field_set,
    write_image_set,
)
from tests.export.sets import RESOLUTION, export

ROWS, COLS, MIP = 12, 20, 1
FORMATS = ["cloudvolume", "sofima", "itk"]


def write_set(folder, pairs, *, corners=None, x=0, num_sides=1, vector=None):
    """An image set and its fields of given pairs (src, tgt), px of mip 1.

    The field of a pair is `vector(index)` everywhere, (along cols, along rows).
    """
    corners = corners or [(x, 0)] * len(pairs)
    frames = [
        PairLocation(Grid(MIP, *corner, ROWS, COLS), pair)
        for corner, pair in zip(corners, pairs, strict=True)
    ]
    name = f"x{x}_y0_z{pairs[0][0]}"
    images = [Pair(image(src), image(tgt)) for src, tgt in pairs]
    write_image_set(
        folder / f"{name}_MIP{MIP}.h5",
        images,
        ImageSetMeta(frames, "test", "", {}, RESOLUTION),
    )
    vector = vector or (lambda index: (10 * x + index, -index))
    fields = [constant(vector(index)) for index in range(len(pairs))]
    if num_sides == 2:
        fields = [np.stack([field, field]) for field in fields]
    meta = FieldSetMeta(frames, "test", "", {}, tag="checkpoint", num_sides=num_sides)
    write_field_set(folder / f"field_0_{name}_MIP{MIP}_checkpoint.h5", fields, meta)


def constant(vector):
    field = np.empty((2, ROWS, COLS), np.float32)
    field[0], field[1] = vector
    return field


def image(z):
    random = np.random.default_rng(z)
    return random.uniform(0.5, 2, (ROWS, COLS)).astype(np.float32)


def read(path, z, x=0, rows=ROWS):
    """Read (C, rows, COLS) of a section."""
    stored = CloudVolume(f"file://{path}", mip=MIP, progress=False, fill_missing=True)
    section = np.asarray(stored[x >> 1 : (x >> 1) + rows, 0:COLS, z])
    return section[:, :, 0].transpose(2, 0, 1)


# README's `--offsets -1 -2`: each section onto the one below and the one below that.
SEVERAL = [(5, 4), (5, 3), (6, 5), (6, 4)]


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--overlap", "last"]])
def test_a_volume_of_fields_onto_several_targets_is_refused(tmp_path, more):
    write_set(tmp_path / "d", SEVERAL)
    with pytest.raises(
        DatasetError,
        match="section 5 has two fields at x 0...24, y 0...40 .*pair 0 onto 4 and "
        ".*pair 1 onto 3; .* --tgt_offset -1 or --tgt_offset -2",
    ):
        export(tmp_path / "d", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_a_volume_holds_the_fields_onto_the_target_that_was_chosen(tmp_path):
    write_set(tmp_path / "d", SEVERAL)
    for offset, pairs in ((-1, (0, 2)), (-2, (1, 3))):
        out = tmp_path / f"out{offset}"
        export(tmp_path / "d", out, "--tgt_offset", offset)
        for z, pair in zip((5, 6), pairs, strict=True):
            np.testing.assert_array_equal(read(out, z), constant((pair, -pair)))
        assert json.loads((out / "info").read_text())["metroem"]["tgt_offset"] == offset
    with pytest.raises(DatasetError, match="already exists.*tgt_offset"):
        export(tmp_path / "d", tmp_path / "out-1", "--tgt_offset", -2)
    with pytest.raises(DatasetError, match="--tgt_offset -3: .* no such .*: -2, -1|-2"):
        export(tmp_path / "d", tmp_path / "new", "--tgt_offset", -3)


@pytest.mark.parametrize("format_", ["sofima", "itk"])
def test_files_hold_the_fields_onto_each_target(tmp_path, format_):
    write_set(tmp_path / "d", SEVERAL)
    export(tmp_path / "d", tmp_path / "out", "--format", format_)
    ending = {"sofima": "npy", "itk": "mha"}[format_]
    stem = "field_0_x0_y0_z5_MIP1_checkpoint_x0_y0_z5-6_tgt"
    written = sorted(path.name for path in (tmp_path / "out").glob(f"*.{ending}"))
    assert written == [f"{stem}-1.{ending}", f"{stem}-2.{ending}"]
    if format_ == "sofima":
        for offset, pairs in ((-1, (0, 2)), (-2, (1, 3))):
            flow = np.load(tmp_path / "out" / f"{stem}{offset}.npy")
            assert (flow[1].min((1, 2)) == pairs).all()  # along y, and so cols
            assert (flow[0].max((1, 2)) == np.negative(pairs)).all()
            said = json.loads((tmp_path / "out" / f"{stem}{offset}.json").read_text())
            assert said["tgt_offset"] == offset


def test_one_target_of_several_may_be_exported_as_files_alone(tmp_path):
    write_set(tmp_path / "d", SEVERAL)
    flags = ["--format", "sofima", "--tgt_offset", -2]
    export(tmp_path / "d", tmp_path / "out", *flags)
    (path,) = (tmp_path / "out").glob("*.npy")
    assert path.stem.endswith("z5-6_tgt-2")


def test_images_are_warped_onto_the_target_that_was_chosen(tmp_path):
    write_set(tmp_path / "d", SEVERAL)
    warped = tmp_path / "looks"
    flags = ["--tgt_offset", -2, "--warped", warped]
    export(tmp_path / "d", tmp_path / "out", *flags)
    field = torch.from_numpy(constant((1, -1)))[None]
    expected = warp(torch.from_numpy(image(5))[None, None], field)[0]
    np.testing.assert_array_equal(read(warped / "after", 5), expected)
    np.testing.assert_array_equal(read(warped / "after", 4)[0], image(4))


def test_a_downloaded_field_belongs_to_its_section_whatever_the_target(tmp_path):
    write_set(tmp_path / "d", SEVERAL, num_sides=2, vector=lambda index: (3, -2))
    export(tmp_path / "d", tmp_path / "out")
    for z in (3, 4, 5, 6):
        np.testing.assert_array_equal(read(tmp_path / "out", z), constant((3, -2)))
    export(tmp_path / "d", tmp_path / "flow", "--format", "sofima")
    (path,) = (tmp_path / "flow").glob("*.npy")
    assert path.stem.endswith("z3-6")


SHIFT = 8  # px of mip 1 that two places lie apart along x: they share 4 rows


def two_places(folder):
    """Make two sets of one section that share rows 8 to 11 of the first."""
    write_set(folder, [(5, 4)], vector=lambda _: (1, 0))
    write_set(folder, [(5, 4)], x=SHIFT << MIP, vector=lambda _: (2, 0))


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--tgt_offset", -1]])
def test_places_that_overlap_with_other_values_are_refused(tmp_path, more):
    two_places(tmp_path / "d")
    with pytest.raises(
        DatasetError,
        match=r"section 5 has two fields at x 16\.\.\.24, y 0\.\.\.40 .*x0_y0_z5.* and "
        r".*x16_y0_z5.*, up to 1\.00 px apart.*--overlap first or --overlap last",
    ):
        export(tmp_path / "d", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("overlap", "counts"), [("first", 1), ("last", 2)])
def test_the_place_that_counts_in_an_overlap_may_be_chosen(tmp_path, overlap, counts):
    two_places(tmp_path / "d")
    warped = tmp_path / "looks"
    flags = ["--overlap", overlap, "--warped", warped]
    export(tmp_path / "d", tmp_path / "out", *flags)
    along_cols = read(tmp_path / "out", 5, rows=SHIFT + ROWS)[0]
    expected = [1] * SHIFT + [counts] * (ROWS - SHIFT) + [2] * SHIFT
    np.testing.assert_array_equal(along_cols[:, 0], expected)
    export(tmp_path / "d", tmp_path / "out", *flags)  # resumes where it was
    # The images of the overlap are those of the same place, moved by its field.
    after = read(warped / "after", 5, rows=SHIFT + ROWS)[0]
    shown = SHIFT if overlap == "last" else 0
    np.testing.assert_allclose(
        after[SHIFT:ROWS, : COLS - 2],
        image(5)[SHIFT - shown : ROWS - shown, counts : COLS - 2 + counts],
        atol=1e-5,
    )


def test_places_that_agree_where_they_overlap_share_a_volume(tmp_path):
    write_set(tmp_path / "d", [(5, 4)], vector=lambda _: (1, 0))
    write_set(tmp_path / "d", [(5, 4)], x=SHIFT << MIP, vector=lambda _: (1.01, 0))
    export(tmp_path / "d", tmp_path / "out")
    along_cols = read(tmp_path / "out", 5, rows=SHIFT + ROWS)[0]
    assert np.abs(along_cols - 1).max() < 0.015


def test_pairs_of_one_set_that_overlap_are_refused_too(tmp_path):
    corners = [(0, 0), (4, 6)]
    write_set(tmp_path / "d", [(5, 4), (5, 4)], corners=corners)
    with pytest.raises(DatasetError, match="pair 0 onto 4 and .*pair 1 onto 4"):
        export(tmp_path / "d", tmp_path / "out")
    # Files are there for each place.
    export(tmp_path / "d", tmp_path / "flow", "--format", "sofima")
    assert len(list((tmp_path / "flow").glob("*.npy"))) == 2


@pytest.mark.parametrize("format_", FORMATS)
def test_a_pair_that_is_there_twice_is_chosen_in_every_format(tmp_path, format_):
    write_set(tmp_path / "d", [(5, 4), (5, 4)])
    flags = ["--format", format_]
    with pytest.raises(DatasetError, match="--overlap first or --overlap last"):
        export(tmp_path / "d", tmp_path / "out", *flags)
    for overlap, pair in (("first", 0), ("last", 1)):
        out = tmp_path / overlap
        export(tmp_path / "d", out, *flags, "--overlap", overlap)
        if format_ == "sofima":
            assert (np.load(next(out.glob("*.npy")))[1] == pair).all()
        if format_ == "cloudvolume":
            assert (read(out, 5)[0] == pair).all()
