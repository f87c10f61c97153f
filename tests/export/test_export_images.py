"""Sections of a volume as image files, and back."""

import logging

import numpy as np
import pytest
import tifffile
from PIL import Image

from metroem.__main__ import main
from metroem.errors import DatasetError, MetroEMError, UsageError
from metroem.export import export_images as exporting
from metroem.io.image_volume import ImageVolume
from tests.volumes import make_volume


def run(path, folder, *flags):
    words = ["--cv_path", path, "--dst_folder", folder, *flags]
    main(["export-images", *map(str, words)])


def volume(folder, dtype=np.uint8, **how):
    """A volume of 4 sections, 70 x 50 px, with mip 1; and its data, (z, x, y)."""
    data = np.random.default_rng(0).integers(1, 255, (4, 1, 70, 50)).astype(dtype)
    data[:, :, :11] = 0
    how = {"offset": (8, 4, 7), "chunk": (32, 16, 2), **how}
    return make_volume(folder, [data, data[..., ::2, ::2]], **how), data[:, 0]


@pytest.mark.parametrize("form", ["png", "tiff"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_is_exported_is_imported_with_the_same_pixels_and_z(tmp_path, form, dtype):
    path, data = volume(tmp_path / "v", dtype)
    run(path, tmp_path / "out", "--format", form)
    size = [] if form == "tiff" else ["--resolution", "4", "4", "40"]
    if dtype == np.uint16:  # the map that changes nothing
        size += ["--grey_range", "1", "255"]
    main(["import", str(tmp_path / "out"), str(tmp_path / "back"), *size])
    back = ImageVolume(str(tmp_path / "back"))
    area, sections = back.extent()
    assert sections == range(7, 11) and back.resolution == pytest.approx((4, 4, 40))
    np.testing.assert_array_equal(back.read(area, sections)[:, 0], data)


def test_an_image_has_y_along_its_rows(tmp_path):
    path, data = volume(tmp_path / "v")
    run(path, tmp_path / "out", "--z_start", 8, "--z_end", 10)
    names = sorted(one.name for one in (tmp_path / "out").glob("z*"))
    assert names == ["z0008.png", "z0009.png"]
    image = np.asarray(Image.open(tmp_path / "out" / "z0009.png"))
    np.testing.assert_array_equal(image, data[2].T)


def test_an_area_of_a_mip_is_written(tmp_path):
    path, data = volume(tmp_path / "v")
    flags = ["--mip", 1, "--x_offset", 28, "--y_offset", 10, "--patch_size", 12]
    run(path, tmp_path / "out", *flags, "--format", "tiff")
    with tifffile.TiffFile(tmp_path / "out" / "z0007.tif") as tiff:
        image, pixel = tiff.asarray(), tiff.pages[0].tags["XResolution"].value
        assert tiff.imagej_metadata["unit"] == "nm"
        assert tiff.imagej_metadata["spacing"] == 40
    assert pixel[1] / pixel[0] == 8
    # x 28 and y 10 are pixels (28 - 8) / 2 and (10 - 4) / 2 of mip 1.
    truth = data[0, ::2, ::2][10:22, 3:15].T
    np.testing.assert_array_equal(image, truth)


def test_a_mip_that_the_volume_lacks_is_made_and_rounded(tmp_path):
    path, _ = volume(tmp_path / "v")
    run(path, tmp_path / "out", "--mip", 2)
    image = np.asarray(Image.open(tmp_path / "out" / "z0007.png"))
    made = ImageVolume(path)
    area = made.extent()[0].cover(2)
    truth = np.round(made.read(area, range(7, 8))[0, 0]).T
    assert image.dtype == np.uint8 and image.shape == area.shape[::-1]
    np.testing.assert_array_equal(image, truth)


@pytest.mark.parametrize("form", ["png", "tiff"])
def test_sections_larger_than_memory_may_be_are_read_in_bands(
    tmp_path, monkeypatch, form
):
    monkeypatch.setattr(exporting, "_MOST_BYTES", 1000)
    monkeypatch.setattr(exporting, "BAND_ROWS", 16)
    monkeypatch.setattr(exporting, "_STRIP_ROWS", 16)
    path, data = volume(tmp_path / "v")
    run(path, tmp_path / "out", "--format", form)
    for z, file in enumerate(sorted((tmp_path / "out").glob("z*"))):
        image = tifffile.imread(file) if form == "tiff" else Image.open(file)
        np.testing.assert_array_equal(image, data[z].T)


def test_files_that_are_done_are_kept(tmp_path, caplog):
    path, data = volume(tmp_path / "v")
    run(path, tmp_path / "out", "--z_end", 9)
    first = tmp_path / "out" / "z0007.png"
    written = first.stat().st_mtime_ns
    (tmp_path / "out" / "z0008.png").unlink()
    (tmp_path / "out" / ".z0008.png.tmp-1-1").write_text("of a run that was killed")
    caplog.set_level(logging.INFO)
    run(path, tmp_path / "out")
    assert first.stat().st_mtime_ns == written and "1 are done already" in caplog.text
    for z, file in enumerate(sorted((tmp_path / "out").glob("z*"))):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), data[z].T)
    assert not list((tmp_path / "out").glob(".z*"))


def test_another_export_into_the_same_folder_is_refused(tmp_path):
    path, _ = volume(tmp_path / "v")
    run(path, tmp_path / "out")
    with pytest.raises(DatasetError, match=r"another export: .*mip 0 \(asked for: 1"):
        run(path, tmp_path / "out", "--mip", 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "z0009.png").write_text("x")
    with pytest.raises(DatasetError, match="z0009.png: is there already"):
        run(path, tmp_path / "mine")
    assert (tmp_path / "mine" / "z0009.png").read_text() == "x"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--z_end", "12"], "holds sections 7...10"),
        (["--z_start", "9", "--z_end", "9"], "expected a section or more"),
        (["--mip", "1", "--x_offset", "9"], "must be a multiple of 2"),
        (["--patch_size", "60"], "the area at mip 0 spans"),
        (["--x_offset", "900"], "is behind the end"),
    ],
)
def test_what_the_volume_does_not_hold_is_refused(tmp_path, flags, words):
    path, _ = volume(tmp_path / "v")
    with pytest.raises(MetroEMError, match=words):
        run(path, tmp_path / "out", *flags)


def test_types_that_a_format_does_not_hold_are_refused(tmp_path):
    path, _ = volume(tmp_path / "v", np.float32)
    with pytest.raises(DatasetError, match="png: holds uint8, uint16, and .*float32"):
        run(path, tmp_path / "out")
    run(path, tmp_path / "tiff", "--format", "tiff")
    path, _ = volume(tmp_path / "low", offset=(0, 0, -2))
    with pytest.raises(DatasetError, match="begins at z -2"):
        run(path, tmp_path / "out")
    with pytest.raises((UsageError, DatasetError), match="no such folder"):
        run(tmp_path / "nowhere", tmp_path / "out")
