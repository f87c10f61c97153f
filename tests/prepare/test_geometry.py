"""Check that volumes and files agree on mips, coordinates and sections."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

import download_field
import download_image
from metroem.__main__ import main
from metroem.data.dataset import find_pairs
from metroem.errors import DatasetError
from metroem.io.h5 import FieldSet, ImageSet
from metroem.prepare.inspect import inspect_dataset
from metroem.prepare.requests import InspectRequest
from metroem.training.write_fields import target_sets
from tests.export.sets import export, make_sets
from tests.image_sets import write_fields, write_images
from tests.volumes import make_scales

# (Z, C, X, Y) of the images; a fold of section 4 at x 16...32, y 40...56.
SHAPE = (8, 1, 96, 64)
FOLD = (4, 0, slice(16, 32), slice(40, 56))


def pooled(marks, factor):
    z, channels, x, y = marks.shape
    fx, fy, fz = factor
    shape = (z // fz, fz, channels, x // fx, fx, y // fy, fy)
    return marks.reshape(shape).max((1, 4, 6))


@pytest.fixture
def sections():
    return np.random.default_rng(0).integers(40, 200, SHAPE).astype(np.uint8)


@pytest.fixture
def em(tmp_path, sections):
    scales = {(1, 1, 1): sections, (2, 2, 1): sections[..., ::2, ::2]}
    return make_scales(tmp_path / "em", scales)


def mask_of(folder, *factors, **more):
    marks = np.zeros(SHAPE, np.uint8)
    marks[FOLD] = 1
    scales = {factor: pooled(marks, factor) for factor in factors}
    return make_scales(folder, scales, **more)


@pytest.fixture
def download(tmp_path):
    def run(cv_path, *flags, mip=0, size=64, folder="data"):
        words = ["--cv_path", cv_path, "--dst_folder", tmp_path / folder]
        words += ["--z_start", 1, "--z_end", 7, "--mip", mip, "--patch_size", size]
        download_image.main([str(word) for word in (*words, *flags)])
        (path,) = (tmp_path / folder).glob(f"x*_MIP{mip}*.h5")
        return ImageSet(path)

    return run


def expected_marks(mip, size):
    marks = np.zeros((6, size, size), bool)
    section, _, rows, cols = FOLD
    rows, cols = (slice(at.start >> mip, at.stop >> mip) for at in (rows, cols))
    marks[section - 1, rows, cols] = True
    return marks


@pytest.mark.parametrize(
    ("mip", "factors"),
    [
        (1, [(1, 1, 1), (2, 2, 1)]),
        (1, [(1, 1, 1), (4, 4, 1)]),  # mip 1 is made of mip 0
        (1, [(1, 1, 1), (2, 2, 2)]),  # as igneous --volumetric makes them
        (1, [(4, 4, 1)]),  # coarser alone: whole pixels of it
        (0, [(2, 2, 1), (4, 4, 1)]),  # its first scale is mip 1 of the images
        (0, [(2, 2, 2), (2, 2, 1)]),
    ],
)
def test_a_mask_marks_the_same_place_whatever_its_scales(
    tmp_path, download, em, mip, factors
):
    mask = mask_of(tmp_path / "mask", *factors)
    images = download(em, "--cv_path_defects", mask, mip=mip, size=64 >> mip)
    marks = [images.read_defects(index).src for index in range(6)]
    np.testing.assert_array_equal(marks, expected_marks(mip, 64 >> mip))


@pytest.mark.parametrize(
    "factors", [[(1, 1, 2)], [(2, 2, 2)], [(3, 3, 1)], [(1, 1, 2), (2, 2, 4)]]
)
def test_a_mask_of_other_sections_or_pixels_is_refused(tmp_path, em, download, factors):
    marks = np.zeros((8, 1, 96, 64), np.uint8)
    mask = make_scales(tmp_path / "mask", dict.fromkeys(factors, marks))
    with pytest.raises(DatasetError, match="--cv_path_defects .*expected mips of the"):
        download(em, "--cv_path_defects", mask)
    assert not (tmp_path / "data").exists()


def test_a_mask_that_is_as_large_and_lies_elsewhere_is_refused(tmp_path, download, em):
    mask = mask_of(tmp_path / "mask", (1, 1, 1), offset=(0, 1, 0))
    with pytest.raises(DatasetError, match=r"begins at x, y, z \[0, 1, 0\].*voxel_off"):
        download(em, "--cv_path_defects", mask)
    shifted = mask_of(tmp_path / "other", (1, 1, 1), offset=(0, 0, 1))
    with pytest.raises(DatasetError, match="voxel_offset"):
        download(em, "--cv_path_defects", shifted)


def test_a_mask_that_does_not_reach_over_the_patch_is_refused(tmp_path, download, em):
    part = make_scales(tmp_path / "mask", {(1, 1, 1): np.zeros((8, 1, 48, 64), "u1")})
    with pytest.raises(DatasetError, match=r"masked .* x 0\.\.\.64.* x 0\.\.\.48"):
        download(em, "--cv_path_defects", part)
    few = make_scales(tmp_path / "few", {(1, 1, 1): np.zeros((5, 1, 96, 64), "u1")})
    with pytest.raises(DatasetError, match=r"sections 0\.\.\.6 .*holds 0\.\.\.4"):
        download(em, "--cv_path_defects", few)


def test_corners_that_are_rounded_to_the_pixels_of_a_mip_are_one_place(
    tmp_path, download
):
    sections = np.random.default_rng(0).integers(40, 200, (8, 1, 90, 66), "u1")
    scales = {(1, 1, 1): sections, (4, 4, 1): sections[..., ::4, ::4][..., :23, :17]}
    # As cloud-volume rounds: 13 // 4 and 7 // 4; the sizes up.
    path = make_scales(tmp_path / "em", scales, offset=(13, 7, 0))
    corner = ["--x_offset", 16, "--y_offset", 8]
    mask = make_scales(
        tmp_path / "mask", {(4, 4, 1): sections[..., :23, :17]}, offset=(13, 7, 0)
    )
    download(path, *corner, "--cv_path_defects", mask, "--mask_val", 190, mip=2, size=8)


def test_a_coarse_mip_whose_offset_was_left_out_is_refused(tmp_path, download):
    sections = np.ones(SHAPE, np.uint8)
    scales = {(1, 1, 1): sections, (2, 2, 1): sections[..., ::2, ::2]}
    path = make_scales(tmp_path / "em", scales, offset=(64, 32, 0))
    info = tmp_path / "em" / "info"
    content = json.loads(info.read_text())
    content["scales"][1]["voxel_offset"] = [0, 0, 0]
    info.write_text(json.dumps(content))
    corner = ["--x_offset", 64, "--y_offset", 32]
    with pytest.raises(DatasetError, match=r"mip 1 .*\[0, 0, 0\].*\[64, 32, 0\]"):
        download(path, *corner, mip=1, size=16)


def test_a_reference_is_read_at_the_scale_that_is_its_mip(tmp_path, download, em):
    # 4x4x1 comes second in its info, and another thickness first of all.
    noise = np.random.default_rng(1).integers(90, 110, SHAPE).astype(np.uint8)
    scales = {(2, 2, 2): noise[::2, :, ::2, ::2], (4, 4, 1): noise[..., ::4, ::4]}
    other = make_scales(tmp_path / "reference", scales)
    flags = ["--normalize", "--reference_path", other, "--reference_size", 16]
    images = download(em, *flags, "--reference_mip", 2)
    area = noise[1, 0, :64:4, :64:4]
    window = images.read(0).src
    # Shift and scale take one pixel and the mean of the reference to 0.
    assert images.normalization["reference"]["mip"] == 2
    raw = download(em, folder="raw").read(0).src
    np.testing.assert_allclose(
        np.polyval(np.polyfit(raw.ravel(), window.ravel(), 1), area.mean()),
        0,
        atol=1e-3,
    )
    with pytest.raises(DatasetError, match="--reference_mip 1: .*available: 2"):
        download(em, *flags, "--reference_mip", 1, "--suffix", "b")
    thick = make_scales(tmp_path / "thick", {(1, 1, 2): noise})
    with pytest.raises(DatasetError, match="--reference_path .*expected mips"):
        download(em, "--normalize", "--reference_path", thick, "--suffix", "c")


def write_field(folder, factor, value=8.0, resolution=(8, 8, 40)):
    fields = np.full((8, 2, 96 // factor, 64 // factor), value, np.float32)
    scales = {(factor, factor, 1): fields}
    return make_scales(folder, scales, resolution=resolution)


def get_field(folder, cv_path, *flags, src_mip=2, dst_mip=1):
    words = ["--cv_path", cv_path, "--dst_folder", folder, "--patch_size", 32]
    words += ["--z_start", 1, "--z_end", 7, "--suffix", "pre", "--src_mip", src_mip]
    download_field.main([str(word) for word in (*words, "--dst_mip", dst_mip, *flags)])
    (path,) = Path(folder).glob("field_0_*.h5")
    return FieldSet(path)


def test_a_volume_of_one_coarse_scale_is_the_mip_that_is_asked_for(tmp_path):
    volume = write_field(tmp_path / "field", 4, value=3.0)
    fields = get_field(tmp_path / "data", volume, "--field_unit", "relative")
    assert fields.resolution == (8, 8, 40)
    # 3 px of mip 2 are 12 of mip 0.
    assert fields.offset(0, 0) == (12, 12)
    np.testing.assert_allclose(fields.read(0, 0), 0, atol=0.01)


def test_the_images_of_the_place_say_what_mip_0_is(tmp_path, download, em):
    download(em, mip=1, size=32)
    # Scales of 32 and 64 nm: mips 2 and 3 of the images, not 0 and 1.
    fields = np.zeros((8, 2, 24, 16), np.float32)
    fields[:] = 3
    scales = {(4, 4, 1): fields, (8, 8, 1): fields[..., ::2, ::2]}
    volume = make_scales(tmp_path / "field", scales)
    found = get_field(tmp_path / "data", volume, "--field_unit", "relative", src_mip=3)
    assert found.resolution == (8, 8, 40)
    assert found.offset(0, 0) == (24, 24)
    with pytest.raises(DatasetError, match="--src_mip 1: .*16x16x40 nm; available: 2"):
        get_field(tmp_path / "data", volume, src_mip=1)
    thick = make_scales(tmp_path / "thick", {(4, 4, 2): fields})
    with pytest.raises(DatasetError, match="32x32x80 nm; expected mips of the images"):
        get_field(tmp_path / "data", thick)


def test_fields_of_other_pixels_are_refused_by_all_that_use_them(
    tmp_path, download, em
):
    # Made at 64 nm, of which it says that it is mip 0.
    volume = write_field(tmp_path / "field", 1, resolution=(64, 64, 40))
    path = get_field(tmp_path / "data", volume, src_mip=0, dst_mip=0).path
    with pytest.raises(DatasetError, match=r"--field_dset .*64x64x40 nm.*8x8x40 nm"):
        download(em, "--normalize", "--field_dset", path, size=32)
    download(em, "--normalize", size=32)
    with pytest.raises(DatasetError, match="64x64x40 nm, those of x0_y0_z1_MIP0.h5"):
        find_pairs(tmp_path / "data", 0, stage=1, checkpoint_name="pre")
    with pytest.raises(DatasetError, match="pixels of 64x64x40 nm at mip 0, of 8x8x40"):
        inspect_dataset(InspectRequest(tmp_path / "data"))


def test_images_of_one_place_at_other_pixels_are_refused(tmp_path, download, em):
    coarse = np.random.default_rng(2).integers(40, 200, SHAPE).astype(np.uint8)
    other = make_scales(tmp_path / "other", {(2, 2, 1): coarse})
    fine = download(em, "--normalize", mip=0, size=64)
    download(other, "--normalize", mip=1, size=32)
    with pytest.raises(DatasetError, match=r"16x16x40 nm.*8x8x40 nm"):
        target_sets(tmp_path / "data", [fine], 1)
    with pytest.raises(DatasetError, match="mip-0 pixels of"):
        inspect_dataset(InspectRequest(tmp_path / "data"))


def test_files_that_do_not_say_their_resolution_are_taken(tmp_path, download, em):
    frames = write_images(tmp_path, "x0_y0_z1_MIP1.h5")
    write_fields(tmp_path, "field_0_x0_y0_z1_MIP1_ck.h5", frames, num_sides=2)
    assert len(find_pairs(tmp_path, 1, stage=1, checkpoint_name="ck")) == 8
    with h5py.File(tmp_path / "x0_y0_z1_MIP1.h5", "r+") as file:
        file.attrs["resolution"] = "fine"
    with pytest.raises(DatasetError, match="resolution is 'fine': expected nm along"):
        find_pairs(tmp_path, 1, stage=1, checkpoint_name="ck")


@pytest.mark.parametrize("resolution", [(8, 8, 40), (4, 6, 50)])
def test_like_must_have_the_pixels_of_the_sets(tmp_path, resolution):
    make_sets(tmp_path / "data")  # 4 x 6 x 40 nm
    like = make_scales(
        tmp_path / "em", {(1, 1, 1): np.ones(SHAPE, "u1")}, resolution=resolution
    )
    with pytest.raises(DatasetError, match="--like .*expected mips of .*4x6x40 nm"):
        export(tmp_path / "data", tmp_path / "out", "--like", like)
    words = ["--resolution", *resolution]
    with pytest.raises(
        DatasetError, match="--resolution .*state mip-0 voxels of 4x6x40 nm"
    ):
        export(tmp_path / "data", tmp_path / "out", *words)


@pytest.fixture
def make(tmp_path, em):
    def run(folder, **more):
        spec = {
            "image": {"path": em, "src_mip": 0},
            **{"max_mip": 2, "dst_mip": 0, "x_size": 64, "y_size": 64},
            "pairs": [[{"x": 32, "y": 32, "z": 4}, {"x": 32, "y": 32, "z": 3}]],
        }
        (tmp_path / "spec.json").write_text(json.dumps(spec | more))
        paths = ["--spec_path", str(tmp_path / "spec.json")]
        main(["make-dataset", *paths, "--dst_path", str(tmp_path / folder)])
        return tmp_path / folder / "x32_y32_z4_MIP0.h5"

    return run


def test_make_dataset_reads_masks_by_their_resolution(tmp_path, make):
    def masks(path, src_mip):
        return [{"path": path, "src_mip": src_mip, "threshold": 1}]

    mask = mask_of(tmp_path / "a", (2, 2, 2), (4, 4, 1))
    marks = ImageSet(make("data", masks=masks(mask, 2))).read_defects(0)
    np.testing.assert_array_equal(marks.src, expected_marks(0, 64)[3])
    with pytest.raises(DatasetError, match="masks: src_mip 1: .*available: 2"):
        make("b", masks=masks(mask, 1))
    moved = mask_of(tmp_path / "c", (1, 1, 1), offset=(8, 0, 0))
    with pytest.raises(DatasetError, match="voxel_offset"):
        make("c", masks=masks(moved, 0))
    part = make_scales(tmp_path / "d", {(1, 1, 1): np.zeros((8, 1, 48, 64), "u1")})
    with pytest.raises(DatasetError, match=r"pairs 0 .*the volume x 0\.\.\.48"):
        make("d", masks=masks(part, 0))


def test_make_dataset_reads_a_field_of_one_coarse_scale(tmp_path, make):
    volume = write_field(tmp_path / "field", 4, value=3.0)
    field = {"path": volume, "src_mip": 2, "field_unit": "relative"}
    images = ImageSet(make("data", field=field))
    # 3 px of mip 2 are 12 of mip 0.
    assert images.offset(0, 0) == (12, 12)
    with pytest.raises(DatasetError, match="field: src_mip 0: .*available: 2"):
        make("other", field=field | {"src_mip": 0})


def test_a_field_set_of_another_place_moves_no_images(tmp_path, download, em):
    volume = write_field(tmp_path / "field", 1)
    path = get_field(tmp_path / "data", volume, src_mip=0, dst_mip=0).path
    away = ["--x_offset", 64, "--field_dset", path]
    with pytest.raises(DatasetError, match="--field_dset .* lies on .*, the patch on"):
        download(em, *away, size=32)
