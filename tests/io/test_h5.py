import os
import pickle

import h5py
import numpy as np
import pytest

from metroem.errors import DatasetError, FieldError
from metroem.geometry.grid import Grid
from metroem.io.h5 import (
    FieldSet,
    FieldSetMeta,
    ImageSet,
    ImageSetMeta,
    Pair,
    PairLocation,
    find_field_sets,
    find_image_sets,
    verify,
    write_field_set,
    write_image_set,
)

SHAPE = (40, 56)
COMMON = {"source": "gs://somewhere", "command": "download", "request": {"mips": [2]}}


def frames(count, offsets=((0, 0), (0, 0))):
    grid = Grid(2, 100, -40, *SHAPE)
    return [PairLocation(grid, (7 + i, 6 + i), offsets) for i in range(count)]


def images(count):
    random = np.random.default_rng(0)
    return [
        Pair(*random.normal(size=(2, *SHAPE)).astype(np.float32)) for _ in range(count)
    ]


def fields(count, sides=()):
    random = np.random.default_rng(1)
    shape = (*sides, 2, *SHAPE)
    return [random.normal(0, 9, shape).astype(np.float32) for _ in range(count)]


@pytest.fixture
def image_path(tmp_path):
    path = tmp_path / "x100_y-40_z7_MIP2.h5"
    meta = ImageSetMeta(
        frames(3, ((8, 4), (-4, 0))),
        **COMMON,
        resolution=(4.0, 4.0, 40.0),
        anchor="center",
        normalization={"kind": "tissue", "reference": {"mip": 5}},
    )
    write_image_set(path, images(3), meta)
    return path


def write_fields(path, count=2, sides=(), **meta):
    num_sides = sides[0] if sides else 1
    meta = FieldSetMeta(frames(count, **meta), **COMMON, num_sides=num_sides, tag="ck")
    write_field_set(path, fields(count, sides), meta)


def test_images_come_back_exactly(image_path):
    image_set = ImageSet(image_path)
    assert len(image_set) == image_set.num_pairs == 3
    assert image_set.shape == SHAPE
    for index, expected in enumerate(images(3)):
        pair = image_set.read(index)
        np.testing.assert_array_equal(pair.src, expected.src)
        np.testing.assert_array_equal(pair.tgt, expected.tgt)


def test_a_window_is_the_same_window_of_the_whole(image_path):
    image_set = ImageSet(image_path)
    window = image_set.read(1, slice(3, 20), slice(10, 51))
    np.testing.assert_array_equal(window.tgt, image_set.read(1).tgt[3:20, 10:51])


def test_the_file_says_where_each_side_was_read(image_path):
    image_set = ImageSet(image_path)
    # 40 rows and 56 cols of mip 2 are 160 and 224 mip-0 pixels.
    assert image_set.box(1, 0) == (108, -36, 8, 268, 188, 9)
    assert image_set.box(1, 1) == (96, -40, 7, 256, 184, 8)
    assert image_set.sections(1) == (8, 7)


def test_the_frame_of_a_pair_is_its_box_less_what_moved_it(image_path):
    assert ImageSet(image_path).grid(2) == Grid(2, 100, -40, *SHAPE)


def test_the_file_says_how_it_was_made(image_path):
    image_set = ImageSet(image_path)
    assert image_set.normalization == {"kind": "tissue", "reference": {"mip": 5}}
    attributes = image_set.attributes
    assert attributes["request"] == {"mips": [2]}
    assert attributes["resolution"] == [4, 4, 40]
    for key, value in {
        "format_version": 1,
        "kind": "images",
        "source_path": "gs://somewhere",
        "mip": 2,
        "anchor": "center",
        "command": "download",
    }.items():
        assert attributes[key] == value


def test_what_is_darker_than_the_darkest_tissue_is_no_data(tmp_path):
    path = tmp_path / "x0_y0_z7_MIP2.h5"
    dark = np.full(SHAPE, -4.5, np.float32)
    write_image_set(path, [Pair(dark, -dark)], ImageSetMeta(frames(1), **COMMON))
    pair = ImageSet(path).read(0)
    assert not pair.src.any()
    assert (pair.tgt == 4.5).all()


def test_a_pair_with_a_blank_side_is_known_with_and_without_the_file_saying_so(
    tmp_path,
):
    path = tmp_path / "x0_y0_z7_MIP2.h5"
    first, second = images(2)
    pairs = [first, Pair(second.src, 0 * second.tgt)]
    write_image_set(path, pairs, ImageSetMeta(frames(2), **COMMON))
    assert [ImageSet(path).has_tissue(i) for i in (0, 1)] == [True, False]
    with h5py.File(path, "r+") as file:
        np.testing.assert_array_equal(file["blank"], [[0, 0], [0, 1]])
        del file["blank"]
    assert [ImageSet(path).has_tissue(i) for i in (0, 1)] == [True, False]


def test_a_set_travels_to_a_loader_worker(image_path):
    image_set = pickle.loads(pickle.dumps(ImageSet(image_path)))
    np.testing.assert_array_equal(image_set.read(0).src, images(3)[0].src)


# Rounding to two decimals is off by at most half of 0.01; but what is closer than
# 0.01 to 0, HDF5's fill value, becomes 0.
ROUNDED = 0.01


def test_fields_come_back_rounded_to_a_hundredth_of_a_pixel(tmp_path):
    path = tmp_path / "field_0_x100_y-40_z7_MIP2_ck.h5"
    write_fields(path)
    field_set = FieldSet(path)
    assert field_set.num_sides == 1
    np.testing.assert_allclose(field_set.read(1), fields(2)[1], atol=ROUNDED)
    assert field_set.grid(1) == Grid(2, 100, -40, *SHAPE)
    assert field_set.sections(1) == (8, 7)
    assert field_set.offset(1, 0) == (0, 0)
    with pytest.raises(DatasetError, match="tgt"):
        field_set.read(1, side=1)


def test_downloaded_fields_have_two_sides_and_what_was_taken_out(tmp_path):
    path = tmp_path / "field_0_x100_y-40_z7_MIP2_ck.h5"
    write_fields(path, sides=(2,), offsets=((16, -4), (8, 0)))
    field_set = FieldSet(path)
    assert field_set.num_sides == 2
    expected = fields(2, (2,))[0][1][:, 5:9, 1:30]
    window = field_set.read(0, 1, slice(5, 9), slice(1, 30))
    np.testing.assert_allclose(window, expected, atol=ROUNDED)
    assert field_set.offset(1, 0) == (16, -4)
    assert field_set.offset(1, 1) == (8, 0)
    # Taken out of the vectors: the field itself was not read elsewhere.
    assert field_set.grid(0) == Grid(2, 100, -40, *SHAPE)
    assert field_set.attributes["channel_order"] == "cols,rows"
    assert field_set.attributes["unit"] == "px"
    assert field_set.attributes["direction"] == "pull"


def test_a_field_with_a_nan_is_refused_and_leaves_no_file(tmp_path):
    field = fields(1)[0]
    field[0, 3, 4] = np.nan
    path = tmp_path / "field_0_x0_y0_z7_MIP2_ck.h5"
    with pytest.raises(FieldError, match="pair 0"):
        write_field_set(path, [field], FieldSetMeta(frames(1), **COMMON))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_pairs_than_announced_is_refused(tmp_path, count):
    path = tmp_path / "x0_y0_z7_MIP2.h5"
    with pytest.raises(DatasetError, match="announced"):
        write_image_set(path, images(count), ImageSetMeta(frames(2), **COMMON))
    assert list(tmp_path.iterdir()) == []


def test_pairs_of_another_shape_than_announced_are_refused(tmp_path):
    path = tmp_path / "x0_y0_z7_MIP2.h5"
    turned = Pair(*(image.T for image in images(1)[0]))
    with pytest.raises(DatasetError, match=r"\(56, 40\), expected \(40, 56\)"):
        write_image_set(path, [turned], ImageSetMeta(frames(1), **COMMON))


def test_what_a_killed_writer_left_goes_with_the_next_file(tmp_path):
    path = tmp_path / "x0_y0_z7_MIP2.h5"
    (tmp_path / f".{path.name}.tmp-1").touch()
    (tmp_path / f".{path.name}2.tmp-1").touch()
    write_image_set(path, images(1), ImageSetMeta(frames(1), **COMMON))
    found = {p.name for p in tmp_path.iterdir()}
    assert found == {path.name, f".{path.name}2.tmp-1"}


def test_a_changed_byte_is_found(image_path):
    assert verify(image_path) == []
    with h5py.File(image_path, "r+") as file:
        file["img"][1, 0, 3, 4] += 1
    (said,) = verify(image_path)
    assert said.startswith("x100_y-40_z7_MIP2.h5: pair 1 is not what was written")


def test_a_section_that_two_pairs_share_is_in_both(tmp_path):
    # More than two chunks of 256 px along one axis, less than one along the other.
    rows, cols = 530, 37
    sections = np.random.default_rng(0).normal(size=(4, rows, cols)).astype(np.float32)
    sections[1, :, :9] = 0
    one = sections[2]
    pairs = [Pair(one, sections[1]), Pair(sections[3], one), Pair(one, one)]
    grid = Grid(1, 0, 0, rows, cols)
    meta = ImageSetMeta([PairLocation(grid, (i + 1, i)) for i in range(3)], "", "", {})
    path = tmp_path / "x0_y0_z1_MIP1.h5"
    write_image_set(path, pairs, meta)

    assert verify(path) == []
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["img"], np.array(pairs))
        blank = np.float32([[0, 9 / cols], [0, 0], [0, 0]])
        np.testing.assert_array_equal(file["blank"], blank)


def test_checksums_hold_for_rounded_fields(tmp_path):
    path = tmp_path / "field_0_x100_y-40_z7_MIP2_ck.h5"
    write_fields(path, sides=(2,))
    assert verify(path) == []


def masks(count):
    random = np.random.default_rng(2)
    return [Pair(*(random.random((2, *SHAPE)) < 0.1)) for _ in range(count)]


@pytest.fixture
def masked_path(tmp_path):
    path = tmp_path / "x100_y-40_z7_MIP2.h5"
    meta = ImageSetMeta(frames(2), **COMMON)
    write_image_set(path, images(2), meta, defects=iter(masks(2)))
    return path


def test_defects_come_back_as_they_were_and_window_by_window(masked_path):
    image_set = ImageSet(masked_path)
    for index, expected in enumerate(masks(2)):
        found = image_set.read_defects(index)
        assert found.src.dtype == bool
        np.testing.assert_array_equal(found.src, expected.src)
        np.testing.assert_array_equal(found.tgt, expected.tgt)
    window = image_set.read_defects(1, slice(3, 20), slice(10, 51))
    np.testing.assert_array_equal(window.tgt, masks(2)[1].tgt[3:20, 10:51])


def test_a_set_without_masks_knows_no_defects(image_path):
    assert ImageSet(image_path).read_defects(0) is None


def test_a_changed_mask_is_found(masked_path):
    assert verify(masked_path) == []
    with h5py.File(masked_path, "r+") as file:
        file["defects"][0, 1, 5, 7] ^= 1
    (said,) = verify(masked_path)
    assert said.startswith("x100_y-40_z7_MIP2.h5: pair 0 is not what was written")


def test_masks_of_another_number_or_shape_are_refused(tmp_path, masked_path):
    path, meta = tmp_path / "x100_y-40_z7_MIP2_b.h5", ImageSetMeta(frames(2), **COMMON)
    with pytest.raises(DatasetError, match="1 pairs of the 2"):
        write_image_set(path, images(2), meta, defects=masks(1))
    assert not path.exists()
    with h5py.File(masked_path, "r+") as file:
        del file["defects"]
        file["defects"] = np.zeros((2, 2, 4, 4), np.uint8)
    with pytest.raises(DatasetError, match="defects is"):
        ImageSet(masked_path)


def original(path, key, array, **more):
    with h5py.File(path, "w") as file:
        file.create_dataset(key, data=array)
        for name, value in more.items():
            file[name] = value


@pytest.mark.parametrize("key", ["img", "main"])
def test_image_sets_of_the_original_are_read(tmp_path, key):
    path = tmp_path / "x64_y32_z10_foo_MIP3.h5"
    data = np.random.default_rng(0).normal(size=(3, 2, 6, 9)).astype(np.float32)
    original(path, key, data)

    image_set = ImageSet(path)

    assert image_set.is_original
    assert image_set.normalization is None
    assert image_set.name.suffix == "foo"
    np.testing.assert_array_equal(image_set.read(2).tgt, data[2, 1])
    assert image_set.grid(1) == Grid(3, 64, 32, 6, 9)
    assert image_set.sections(2) == (12, 11)
    assert image_set.box(2, 1) == (64, 32, 11, 112, 104, 12)
    assert verify(path) == []


def test_field_sets_of_the_original_are_read(tmp_path):
    data = np.random.default_rng(0).normal(size=(3, 2, 2, 6, 9)).astype(np.float32)
    offset = np.arange(12).reshape(3, 2, 2) * 8
    path = tmp_path / "field_0_x64_y32_z10_MIP3_precomputed.h5"
    original(path, "field", data, offset=offset)
    field_set = FieldSet(path)
    np.testing.assert_array_equal(field_set.read(1, 1), data[1, 1])
    assert field_set.offset(1, 1) == (48, 56)
    assert field_set.grid(1) == Grid(3, 64, 32, 6, 9)


@pytest.mark.parametrize(
    ("name", "key", "shape", "match"),
    [
        ("x0_y0_z0_MIP1.h5", "other", (1, 2, 3, 4), "no dataset named img or main"),
        ("x0_y0_z0_MIP1.h5", "img", (1, 3, 3, 4), "images are"),
        ("x0_y0_z0.h5", "img", (1, 2, 3, 4), "expected the name"),
    ],
)
def test_a_file_without_usable_images_is_refused(tmp_path, name, key, shape, match):
    original(tmp_path / name, key, np.zeros(shape, np.float32))
    with pytest.raises(DatasetError, match=match):
        ImageSet(tmp_path / name)


def test_a_missing_or_unreadable_file_is_refused(tmp_path):
    path = tmp_path / "x0_y0_z0_MIP1.h5"
    with pytest.raises(DatasetError, match="no such file"):
        ImageSet(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(DatasetError, match="readable"):
        ImageSet(path)


@pytest.mark.parametrize("name", ["field_0_x0_y0_MIP1.h5", "x0_y0_z0_MIP1.h5"])
def test_a_field_set_without_a_usable_name_is_refused(tmp_path, name):
    original(tmp_path / name, "main", np.zeros((1, 2, 3, 4), np.float32))
    with pytest.raises(DatasetError, match="expected the name"):
        FieldSet(tmp_path / name)


def test_a_file_renamed_to_another_mip_is_refused(image_path):
    renamed = image_path.with_name("x100_y-40_z7_MIP3.h5")
    os.replace(image_path, renamed)
    with pytest.raises(DatasetError, match="mip 2"):
        ImageSet(renamed)


def test_a_file_of_a_later_format_is_refused(image_path):
    with h5py.File(image_path, "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(DatasetError, match="upgrade metroem"):
        ImageSet(image_path)


def test_sets_are_found_by_name_and_hidden_files_left_out(image_path, caplog):
    folder = image_path.parent
    write_fields(folder / "field_0_x100_y-40_z7_MIP2_ck.h5")
    original(folder / ".x1_y1_z1_MIP1.h5", "img", np.zeros((1, 2, 3, 4), np.float32))
    original(folder / "notes.h5", "img", np.zeros(3))

    assert [s.path.name for s in find_image_sets(folder)] == [image_path.name]
    assert [s.path.name for s in find_field_sets(folder)] == [
        "field_0_x100_y-40_z7_MIP2_ck.h5"
    ]
    assert "notes.h5" in caplog.text


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        find_image_sets(tmp_path / "nowhere")
