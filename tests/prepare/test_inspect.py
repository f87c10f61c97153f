import h5py
import numpy as np
import pytest

from metroem.errors import DatasetError, PyramidError, UsageError
from metroem.geometry.grid import Grid
from metroem.io.h5 import (
    FieldSetMeta,
    ImageSetMeta,
    Pair,
    PairLocation,
    write_field_set,
    write_image_set,
)
from metroem.prepare.inspect import inspect_dataset
from metroem.prepare.requests import InspectRequest
from tests.pairs import write_pairs

SHAPE = (32, 48)


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "data"
    write_pairs(folder, mips=(0, 1), num_pairs=2, shape=SHAPE)
    return folder


def write_fields(folder, mip, *, count=2, x=0, z=1, offset=(0, 0), sides=1):
    rows, cols = (size >> mip for size in SHAPE)
    frames = [
        PairLocation(Grid(mip, x, 0, rows, cols), (z + i, z + i - 1), (offset, offset))
        for i in range(count)
    ]
    meta = FieldSetMeta(frames, "", "", {}, tag="checkpoint", num_sides=sides)
    shape = (2, rows, cols) if sides == 1 else (2, 2, rows, cols)
    path = folder / f"field_0_x0_y0_z1_MIP{mip}_checkpoint.h5"
    write_field_set(path, [np.ones(shape, np.float32)] * count, meta)
    return path


def write_images(folder, name, values, *, mip=0, x=0, z=1):
    frames = [
        PairLocation(Grid(mip, x, 0, *values.shape[-2:]), (z + i, z + i - 1))
        for i in range(len(values))
    ]
    pairs = [Pair(*pair) for pair in values]
    write_image_set(folder / name, pairs, ImageSetMeta(frames, "", "", {}))


def test_masks_of_defects_are_reported(tmp_path, caplog):
    values = np.random.default_rng(0).normal(size=(1, 2, *SHAPE)).astype(np.float32)
    mask = np.zeros(SHAPE, bool)
    mask[:8] = True  # a quarter of one side of two
    grid = Grid(0, 0, 0, *SHAPE)
    meta = ImageSetMeta([PairLocation(grid, (2, 1))], "", "", {})
    path = tmp_path / "x0_y0_z2_MIP0.h5"
    write_image_set(path, [Pair(*values[0])], meta, defects=[Pair(mask, mask & False)])
    caplog.set_level("INFO", "metroem")
    inspect_dataset(InspectRequest(tmp_path))
    assert "defects 12.50%" in caplog.text


def make_pyramid(tmp_path, *names):
    for name in names:
        (tmp_path / "pyramid" / name).mkdir(parents=True)
    return tmp_path / "pyramid"


def problems(dataset, **more):
    with pytest.raises(DatasetError) as caught:
        inspect_dataset(InspectRequest(dataset, **more))
    return str(caught.value)


def test_a_good_data_set_is_listed(dataset, tmp_path, caplog):
    write_fields(dataset, 0)
    pyramid = make_pyramid(tmp_path, "0_mip1in_a", "1_mip0in_b")
    caplog.set_level("INFO", "metroem")
    inspect_dataset(InspectRequest(dataset, pyramid))
    assert (
        "x0_y0_z1_MIP1.h5: 2 pairs of 16x24 px at mip 1, x 0, y 0, src 1...2"
        in caplog.text
    )
    # Vectors of (1, 1) px are sqrt(2) long.
    assert (
        "checkpoint.h5: 2 pairs of 32x48 px at mip 0, x 0, y 0, src 1...2: rms 1.41"
        in (caplog.text)
    )
    assert "stage 1: 1 image sets at mip 0, 1 with prior fields" in caplog.text
    assert "2 image sets, 1 field sets, all in order" in caplog.text


def test_images_that_are_not_normalised_are_found(dataset):
    values = np.full((1, 2, *SHAPE), 100, np.float32)
    values[..., ::2] = 160
    write_images(dataset, "x0_y0_z9_MIP0.h5", values, z=9)
    assert "x0_y0_z9_MIP0.h5: not normalised: tissue has mean 130" in problems(dataset)


def test_images_that_are_blank_or_not_finite_are_found(dataset):
    write_images(dataset, "x0_y0_z9_MIP0.h5", np.zeros((1, 2, *SHAPE), np.float32), z=9)
    broken = np.random.default_rng(0).normal(size=(1, 2, *SHAPE)).astype(np.float32)
    broken[0, 1, 4, 5] = np.nan
    write_images(dataset, "x0_y0_z8_MIP0.h5", broken, z=8)
    found = problems(dataset)
    assert "2 problems" in found
    assert "z9_MIP0.h5: every pair has a side that is all blank" in found
    assert "z8_MIP0.h5: NaN or infinite" in found


def test_a_changed_byte_is_found(dataset):
    with h5py.File(dataset / "x0_y0_z1_MIP1.h5", "r+") as file:
        file["img"][1, 0, 3, 4] += 0.5
    assert "x0_y0_z1_MIP1.h5: pair 1 is not what was written" in problems(dataset)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"x": 1000}, "pair 0 lies elsewhere at mip 0"),
        ({"z": 2}, "pair 0 is sections (1, 0) at mip 1, (2, 1) at mip 0"),
    ],
)
def test_mips_of_one_place_that_show_another_are_found(dataset, more, match):
    values = np.random.default_rng(0).normal(size=(2, 2, *SHAPE)).astype(np.float32)
    write_images(dataset, "x0_y0_z1_MIP0.h5", values, **more)
    assert match in problems(dataset)


def test_mips_of_one_place_with_another_number_of_pairs_are_found(dataset):
    values = np.random.default_rng(0).normal(size=(1, 2, *SHAPE)).astype(np.float32)
    write_images(dataset, "x0_y0_z1_MIP0.h5", values)
    assert "2 pairs at mip 1, 1 at mip 0" in problems(dataset)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"count": 1}, "1 pairs, its images have 2"),
        ({"x": 8}, "pair 0 lies on"),
        ({"z": 2}, "pair 0 is sections"),
        ({"offset": (8, 4), "sides": 2}, "download the images with --field_dset"),
    ],
)
def test_fields_that_do_not_lie_on_their_images_are_found(dataset, more, match):
    write_fields(dataset, 0, **more)
    assert match in problems(dataset)


def test_fields_without_images_are_found(dataset):
    write_fields(dataset, 2)
    assert "no image set of its location at mip 2" in problems(dataset)


def test_what_was_not_finished_and_what_has_no_proper_name_is_found(dataset):
    (dataset / ".x5_y5_z5_MIP0.h5.parts").mkdir()
    (dataset / ".x5_y5_z5_MIP0.h5.tmp-12").touch()
    (dataset / "notes.h5").touch()
    (dataset / "x9_y9_z9_MIP9.h5").write_bytes(b"nonsense")
    found = problems(dataset)
    assert "4 problems" in found
    assert ".x5_y5_z5_MIP0.h5.parts: not finished" in found
    assert "notes.h5: its name" in found
    assert "readable h5 file" in found


def test_a_stage_without_images_or_prior_fields_is_found(dataset, tmp_path):
    pyramid = make_pyramid(tmp_path, "0_mip3in_a", "1_mip0in_b")
    found = problems(dataset, pyramid_path=pyramid, checkpoint_name="mine")
    assert "stage 0 (0_mip3in_a): no image set at mip 3" in found
    assert "no prior fields field_0_x0_y0_z1_MIP0_mine.h5" in found
    assert "write-fields --checkpoint_name mine --stages 0" in found


def test_image_sets_of_the_original_are_taken(tmp_path, caplog):
    data = np.random.default_rng(0).normal(size=(3, 2, 9, 12)).astype(np.float32)
    with h5py.File(tmp_path / "x64_y32_z10_MIP3_foo.h5", "w") as file:
        file["main"] = data
    caplog.set_level("INFO", "metroem")
    inspect_dataset(InspectRequest(tmp_path))
    assert "(original format)" in caplog.text


def test_a_folder_or_pyramid_that_is_not_there_is_refused(dataset, tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        inspect_dataset(InspectRequest(tmp_path / "nowhere"))
    with pytest.raises(PyramidError):
        inspect_dataset(InspectRequest(dataset, tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="--checkpoint_name"):
        InspectRequest(dataset, checkpoint_name="a/b")


def test_an_empty_folder_says_how_to_fill_it(tmp_path):
    assert "download_image.py --dst_folder" in problems(tmp_path)
