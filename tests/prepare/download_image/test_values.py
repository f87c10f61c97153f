"""Check the values that download_image.py writes, and what it refuses."""

import argparse
import dataclasses

import numpy as np
import pytest

import download_image
from metroem.errors import DatasetError, UsageError
from metroem.geometry.grid import Grid
from metroem.io.h5 import FieldSetMeta, ImageSet, PairLocation, write_field_set
from metroem.prepare.requests import ImageRequest
from tests.prepare.download_image.conftest import AREA, OFFSET, SHAPE, patch
from tests.volumes import make_volume


def test_each_flag_is_a_field_of_the_request():
    dests = {
        action.dest
        for action in download_image.build_parser()._actions
        if not isinstance(action, argparse._HelpAction)
    }
    assert dests == {field.name for field in dataclasses.fields(ImageRequest)}


def test_flags_left_out_are_what_the_request_has_by_default():
    parser = download_image.build_parser()
    required = "--cv_path a --mip 0 --patch_size 8 --z_start 1 --z_end 2".split()
    request = ImageRequest(**vars(parser.parse_args(required)))
    assert request == ImageRequest("a", [0], [8], z_start=1, z_end=2)


def test_pair_i_is_section_z_start_plus_i_on_the_one_before(download, sections):
    (path,) = download("--mip", 0, "--patch_size", 64)
    assert path.name == "x96_y0_z12_MIP0.h5"
    image_set = ImageSet(path)
    assert image_set.num_pairs == 3
    for index, z in enumerate((12, 13, 14)):
        pair = image_set.read(index)
        np.testing.assert_array_equal(pair.src, patch(sections, z, 64, 64))
        np.testing.assert_array_equal(pair.tgt, patch(sections, z - 1, 64, 64))
        assert image_set.sections(index) == (z, z - 1)
        assert image_set.box(index, 1) == (96, 0, z - 1, 160, 64, z)


@pytest.mark.parametrize(
    "flags", [["--mip", "--patch_size"], ["--mips", "--patch_sizes"]]
)
def test_mips_share_their_corner_by_either_spelling(download, flags):
    paths = download(flags[0], 1, 0, flags[1], 40, 48)
    assert [path.name for path in paths] == ["x96_y0_z12_MIP0.h5", "x96_y0_z12_MIP1.h5"]
    fine, coarse = (ImageSet(path) for path in paths)
    assert fine.grid(0) == Grid(0, 96, 0, 48, 48)
    assert coarse.grid(2) == Grid(1, 96, 0, 40, 40)
    assert fine.attributes["anchor"] == "corner"
    # Every second pixel of mip 0 is a pixel of mip 1 in this volume.
    np.testing.assert_array_equal(
        fine.read(1).src[::2, ::2], coarse.read(1).src[:24, :24]
    )


def test_with_the_center_as_anchor_mips_share_it(download):
    fine, coarse = (
        ImageSet(path)
        for path in download(
            "--mip", 1, 0, "--patch_size", 40, 48, "--anchor", "center"
        )
    )
    assert coarse.grid(0) == Grid(1, 96, 0, 40, 40)
    # 80 mip-0 pixels and 48 of them: (80 - 48) / 2 = 16 from the corner.
    assert fine.grid(0) == Grid(0, 112, 16, 48, 48)
    assert fine.grid(0).center == coarse.grid(0).center
    assert fine.name.place == coarse.name.place
    assert fine.attributes["anchor"] == "center"
    np.testing.assert_array_equal(
        fine.read(1).src[::2, ::2], coarse.read(1).src[8:32, 8:32]
    )


def test_images_are_as_stored_unless_normalisation_is_asked_for(download):
    (path,) = download("--mip", 0, "--patch_size", 64)
    assert ImageSet(path).normalization == {"kind": "raw"}


def test_normalised_tissue_has_mean_0_and_std_1_and_no_data_stays_0(
    tmp_path, download, sections
):
    sections[:, :, 40:50, 40:60] = 0
    holes = make_volume(tmp_path / "holes", [sections], offset=OFFSET)
    (path,) = download("--mip", 0, "--patch_size", 64, "--normalize", cv_path=holes)
    for image in ImageSet(path).read(1):
        # Rows 40...49 of the volume are rows 8...17 of the patch (x 96 is row 32).
        assert not image[8:18, 8:28].any()
        tissue = image[image != 0]
        assert tissue.size == 64 * 64 - 200
        # float32 sums over 3896 values.
        assert abs(tissue.mean()) < 1e-4
        assert abs(tissue.std() - 1) < 1e-4
    assert ImageSet(path).normalization == {
        "kind": "tissue",
        "reference": {"area": "patch"},
    }


@pytest.mark.parametrize("mip", [0, 1])
def test_a_reference_area_around_the_patch_normalises_it(download, sections, mip):
    flags = ["--mip", 0, "--patch_size", 32, "--normalize"]
    size = 96 >> mip
    (path,) = download(*flags, "--reference_size", size, "--reference_mip", mip)
    # The patch is centred on x 112, y 16; 96 around it reach from 64 and -32 on.
    area = patch(sections, 13, 96, 96, 64, -32).astype(float)
    # The standard deviation belongs to pixels of the patch's mip.
    mean = area[:: 2**mip, :: 2**mip].mean()
    expected = (patch(sections, 13, 32, 32) - mean) / area.std()
    np.testing.assert_allclose(ImageSet(path).read(1).src, expected, atol=1e-5)
    reference = ImageSet(path).normalization["reference"]
    assert (reference["mip"], reference["size_px"]) == (mip, size)


def test_defects_are_blanked_and_left_out_of_the_statistics(
    tmp_path, download, sections
):
    mask = np.zeros(SHAPE, np.uint8)
    mask[:, :, 60:70, 60:90] = 2  # x 124...133, y 28...57
    mask[:, :, 80:90, 60:90] = 1  # below --mask_val
    defects = make_volume(tmp_path / "mask", [mask], offset=OFFSET)
    (path,) = download(
        *("--mip", 0, "--patch_size", 64, "--normalize"),
        *("--cv_path_defects", defects, "--mask_val", 2),
    )
    image = ImageSet(path).read(0).src
    assert not image[28:38, 28:58].any()
    raw = patch(sections, 12, 64, 64).astype(float)
    keep = np.ones((64, 64), bool)
    keep[28:38, 28:58] = False
    expected = (raw - raw[keep].mean()) / raw[keep].std()
    np.testing.assert_allclose(image[keep], expected[keep], atol=1e-5)


def test_the_mask_of_defects_is_kept_beside_the_images(tmp_path, download):
    mask = np.zeros(SHAPE, np.uint8)
    mask[2, :, 60:70, 60:90] = 1  # section 12: x 124...133, y 28...57
    defects = make_volume(tmp_path / "mask", [mask], offset=OFFSET)
    flags = ["--mip", 0, "--patch_size", 64, "--normalize"]
    # The area to normalise by reaches further, and so does the mask read for it.
    flags += ["--reference_size", 96]
    (path,) = download(*flags, "--cv_path_defects", defects)
    expected = np.zeros((64, 64), bool)
    expected[28:38, 28:58] = True
    first, second = (ImageSet(path).read_defects(index) for index in (0, 1))
    np.testing.assert_array_equal(first.src, expected)
    np.testing.assert_array_equal(second.tgt, expected)
    assert not first.tgt.any() and not second.src.any()


def test_without_a_mask_no_defects_are_written(download):
    (path,) = download("--mip", 0, "--patch_size", 64)
    assert ImageSet(path).read_defects(0) is None


def test_a_mask_without_the_mip_of_the_images_is_made_coarser(
    tmp_path, download, sections
):
    mask = np.zeros(SHAPE, np.uint8)
    mask[:, :, 61, 61] = 1  # x 125, y 29: row 14, col 14 of the patch at mip 1
    defects = make_volume(tmp_path / "mask", [mask], offset=OFFSET)
    (path,) = download("--mip", 1, "--patch_size", 32, "--cv_path_defects", defects)
    assert np.argwhere(ImageSet(path).read(0).src == 0).tolist() == [[14, 14]]


def test_a_mask_that_marks_nothing_is_said(tmp_path, download, caplog):
    defects = make_volume(tmp_path / "mask", [np.zeros(SHAPE, np.uint8)], offset=OFFSET)
    caplog.set_level("INFO", "metroem")
    download("--mip", 0, "--patch_size", 32, "--cv_path_defects", defects)
    assert "marks nothing" in caplog.text


def field_set_with_offsets(folder, offsets):
    grid = Grid(0, 96, 0, 64, 64)
    frames = [
        PairLocation(grid, (z, z - 1), side)
        for z, side in zip((12, 13, 14), offsets, strict=True)
    ]
    meta = FieldSetMeta(frames, "here", "command", {}, num_sides=2)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "field_0_x96_y0_z12_MIP0_pre.h5"
    write_field_set(path, [np.zeros((2, 2, 64, 64), np.float32)] * 3, meta)
    return path


def test_the_offsets_of_a_field_set_move_each_cut_out(tmp_path, download, sections):
    by_section = {11: (4, -2), 12: (6, 8), 13: (0, -4), 14: (-8, 2)}
    offsets = [(by_section[z], by_section[z - 1]) for z in (12, 13, 14)]
    fields = field_set_with_offsets(tmp_path / "fields", offsets)
    (path,) = download("--mip", 0, "--patch_size", 64, "--field_dset", fields)
    image_set = ImageSet(path)
    for index, z in enumerate((12, 13, 14)):
        for side, image in enumerate(image_set.read(index)):
            x, y = 96 + by_section[z - side][0], by_section[z - side][1]
            expected = patch(sections, z - side, 64, 64, x, y)
            np.testing.assert_array_equal(image, expected)
            assert image_set.box(index, side)[:3] == (x, y, z - side)
        assert image_set.grid(index) == Grid(0, 96, 0, 64, 64)


def test_a_section_moved_differently_in_its_two_pairs_is_cut_out_twice(
    tmp_path, download, sections
):
    offsets = [((0, 0), (0, 0)), ((2, 4), (-6, 8)), ((0, 2), (4, 0))]
    fields = field_set_with_offsets(tmp_path / "fields", offsets)
    (path,) = download("--mip", 0, "--patch_size", 64, "--field_dset", fields)
    for index, sides in enumerate(offsets):
        for side, image in enumerate(ImageSet(path).read(index)):
            dx, dy = sides[side]
            z = 12 + index - side
            expected = patch(sections, z, 64, 64, 96 + dx, dy)
            np.testing.assert_array_equal(image, expected)


def test_a_cut_out_moved_beyond_the_volume_is_blank_there(
    tmp_path, download, sections, caplog
):
    offsets = [((-40, 0), (0, 0)), ((0, 0), (0, 0)), ((0, 0), (0, 0))]
    fields = field_set_with_offsets(tmp_path / "fields", offsets)
    (path,) = download("--mip", 0, "--patch_size", 64, "--field_dset", fields)
    image = ImageSet(path).read(0).src
    # x 56 is 8 before the volume's first.
    assert not image[:8].any()
    np.testing.assert_array_equal(image[8:], patch(sections, 12, 56, 64, 64, 0))
    assert "beyond the volume" in caplog.text


def test_offsets_between_pixels_of_the_mip_are_refused(tmp_path, download):
    offsets = [((1, 0), (0, 0)), ((0, 0), (0, 0)), ((0, 0), (0, 0))]
    fields = field_set_with_offsets(tmp_path / "fields", offsets)
    with pytest.raises(DatasetError, match="multiples of 2"):
        download("--mip", 1, "--patch_size", 32, "--field_dset", fields)


def test_pairs_that_the_field_set_lacks_are_refused(tmp_path, download):
    fields = field_set_with_offsets(tmp_path / "fields", [((0, 0), (0, 0))] * 3)
    area = [*AREA[:-1], "16"]
    with pytest.raises(DatasetError, match="no pair of sections 15 and 14"):
        download("--mip", 0, "--patch_size", 9, "--field_dset", fields, area=area)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--mip", 0, 1, "--patch_size", 64], "one per mip"),
        (["--mip", 0, 0, "--patch_size", 64, 64], "each once"),
        (["--mip", -1, "--patch_size", 64], "mips >= 0"),
        (["--mip", 0, "--patch_size", 0], "must be >= 1"),
        (["--mip", 0, "--patch_size", 64, "--x_offset", 97, "--mip", 3], "96 or 104"),
        (["--mip", 0, "--patch_size", 64, "--z_end", 12], "--z_end 13 makes one pair"),
        (["--mip", 0, "--patch_size", 64, "--parallel", 0], "--parallel"),
        (["--mip", 0, "--patch_size", 64, "--suffix", "a/b"], "--suffix"),
        (["--mip", 0, "--patch_size", 64, "--reference_size", 9], "--normalize"),
    ],
)
def test_flags_that_cannot_work_are_refused(download, flags, match):
    with pytest.raises(UsageError, match=match):
        download(*flags)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--mip", 2, "--patch_size", 64], r"y 0...256, the volume x 64...320, y -32"),
        (["--mip", 0, "--patch_size", 200], r"y 0...200, the volume x 64...320, y -32"),
        (["--mip", 0, "--patch_size", 64, "--z_start", 10], "9...14.*holds 10...17"),
        (["--mip", 0, "--patch_size", 64, "--z_end", 19], "11...18.*holds 10...17"),
    ],
)
def test_what_the_volume_does_not_hold_is_refused_before_reading(
    tmp_path, download, flags, match
):
    with pytest.raises(DatasetError, match=match):
        download(*flags)
    assert not (tmp_path / "data").exists()


def test_flags_are_not_abbreviated(download):
    with pytest.raises(SystemExit):
        download("--mip", 0, "--patch", 64)


def test_a_volume_of_two_channels_is_no_image(tmp_path, download):
    field = make_volume(tmp_path / "field", [np.zeros((8, 2, 64, 64), np.float32)])
    with pytest.raises(DatasetError, match="2 channels"):
        download("--mip", 0, "--patch_size", 8, cv_path=field)


def test_a_mip_that_was_never_written_is_refused_saying_what_to_check(
    tmp_path, download, sections
):
    unwritten = make_volume(tmp_path / "unwritten", [sections, None], offset=OFFSET)
    with pytest.raises(DatasetError, match="blank here.*mip was written"):
        download("--mip", 1, "--patch_size", 32, cv_path=unwritten)
    # Parts of it are not kept, so that the next try reads again.
    assert list((tmp_path / "data").iterdir()) == []


def test_sections_that_are_mostly_blank_are_named(tmp_path, download, sections, caplog):
    sections[3, :, :, 60:] = 0  # section 13, y 28 and above
    gaps = make_volume(tmp_path / "gaps", [sections], offset=OFFSET)
    caplog.set_level("INFO", "metroem")
    download("--mip", 0, "--patch_size", 64, cv_path=gaps)
    assert "4 sections, blank 14.1% (0.0%...56.2%)" in caplog.text
    assert "mostly blank: sections 13 (56%)" in caplog.text


def test_values_that_are_not_finite_are_no_data(tmp_path, download, sections):
    floats = sections.astype(np.float32)
    floats[:, :, 40, 40] = np.nan
    floats[:, :, 41, 40] = np.inf
    path = make_volume(tmp_path / "floats", [floats], offset=OFFSET)
    (path,) = download("--mip", 0, "--patch_size", 64, cv_path=path)
    image = ImageSet(path).read(0).src
    assert np.argwhere(image == 0).tolist() == [[8, 8], [9, 8]]
