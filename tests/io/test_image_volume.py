"""Test volumes of grey levels: mips that are made, and traces of lossy encodings."""

import json

import numpy as np
import pytest
from scipy import ndimage

import download_image
from metroem.__main__ import main
from metroem.geometry.grid import Grid
from metroem.io import image_volume
from metroem.io.h5 import ImageSet
from metroem.io.image_volume import ImageVolume, blank_traces
from tests.volumes import ReadCount, make_scales

# (Z, C, X, Y) of FIB-SEM: 8 nm along all axes.
SHAPE = (16, 1, 96, 80)
OFFSET = (20, -40, 6)


@pytest.fixture
def sections():
    sections = np.random.default_rng(0).integers(1, 255, SHAPE, dtype=np.uint8)
    sections[:, :, 30:41, 20:43] = 0
    return sections


def isotropic(folder, sections, **more):
    scales = {(1, 1, 1): sections, (2, 2, 2): sections[::2, :, ::2, ::2]}
    more = {"offset": OFFSET, "chunk": (32, 32, 8), **more}
    return make_scales(folder, scales, resolution=(8, 8, 8), **more)


def averaged(image, levels):
    """Average the tissue, mip by mip; at least half of a pixel must be tissue."""
    image = image.astype(float)
    for _ in range(levels):
        rows, cols = image.shape
        blocks = image.reshape(rows // 2, 2, cols // 2, 2).swapaxes(1, 2)
        count = (blocks != 0).sum((2, 3))
        mean = blocks.sum((2, 3)) / np.maximum(count, 1)
        image = np.where(count >= 2, mean, 0)
    return image


@pytest.mark.parametrize("strip_bytes", [1, 2**26])
@pytest.mark.parametrize("mip", [0, 1, 2])
def test_a_mip_that_is_not_there_is_averaged_in_x_and_y(
    tmp_path, sections, monkeypatch, mip, strip_bytes
):
    monkeypatch.setattr(image_volume, "_STRIP_BYTES", strip_bytes)
    volume = ImageVolume(isotropic(tmp_path / "em", sections))
    volume.check_mip("--mip", mip)
    count = ReadCount(monkeypatch)
    # x 28 is 8 px of the volume, 24 before its second chunk: blocks of 4 px cross it.
    grid = Grid(mip, 28, -36, 64 >> mip, 56 >> mip)
    found = volume.read(grid, range(8, 11))
    assert set(count.times.values()) == {1}
    for index, section in enumerate(sections[2:5, 0, 8:72, 4:60]):
        np.testing.assert_allclose(found[index, 0], averaged(section, mip), rtol=1e-6)


@pytest.mark.parametrize("x", [24, 48])
def test_blocks_that_chunks_divide_are_read_once(tmp_path, sections, monkeypatch, x):
    # Chunks of 30 px from x 20 on: their ends lie inside blocks of 4 px, and only 2 px
    # from x 48.
    path = isotropic(tmp_path / "em", sections, chunk=(30, 30, 4))
    monkeypatch.setattr(image_volume, "_STRIP_BYTES", 1)
    count = ReadCount(monkeypatch)
    found = ImageVolume(path).read(Grid(2, x, -40, 12, 20), range(6, 8))
    assert set(count.times.values()) == {1}
    expected = averaged(sections[1, 0, x - 20 : x + 28], 2)
    np.testing.assert_allclose(found[1, 0], expected, rtol=1e-6)


def test_what_lies_outside_is_blank_at_mips_that_are_made(tmp_path, sections):
    volume = ImageVolume(isotropic(tmp_path / "em", sections))
    grid = Grid(1, 0, -60, 20, 20)
    assert volume.clip(grid) == Grid(1, 20, -40, 10, 10)
    found = volume.read(grid, range(6, 7))[0, 0]
    assert not found[:10].any() and not found[:, :10].any()
    expected = averaged(sections[0, 0, :20, :20], 1)
    np.testing.assert_allclose(found[10:, 10:], expected, rtol=1e-6)


def test_downloads_of_isotropic_volumes_are_those_of_make_dataset(
    tmp_path, sections, caplog
):
    caplog.set_level("INFO", "metroem")
    path = isotropic(tmp_path / "em", sections)
    words = ["--cv_path", path, "--dst_folder", tmp_path / "data", "--mip", 1, 0]
    words += ["--patch_size", 24, 48, "--x_offset", 32, "--y_offset", -32]
    words += ["--z_start", 10, "--z_end", 12, "--normalize", "--reference_size", 40]
    download_image.main([str(word) for word in words])
    images = ImageSet(tmp_path / "data" / "x32_y-32_z10_MIP1.h5")
    assert "--mip 1: " in caplog.text and "mip 0 is read" in caplog.text
    area = {"path": path, "src_mip": 0, "dst_mip": 1, "x_size": 40, "y_size": 40}
    spec = {
        "image": {"path": path, "src_mip": 0, "reference": area},
        "max_mip": 1,
        "dst_mip": 1,
        "x_size": 24,
        "y_size": 24,
        "pairs": [[{"x": 56, "y": -8, "z": 10}, {"x": 56, "y": -8, "z": 9}]],
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    words = ["--spec_path", tmp_path / "spec.json", "--dst_path", tmp_path / "made"]
    main(["make-dataset", *map(str, words)])
    (made,) = (tmp_path / "made").glob("*.h5")
    for side in (0, 1):
        image, other = (s.read(0)[side] for s in (images, ImageSet(made)))
        assert image.any() and not image.all()
        np.testing.assert_allclose(image, other, atol=1e-5)


PX = 256
X, Y = np.mgrid[:PX, :PX]
CRACK = (X - Y * 0.37 + 20 * np.sin(Y / 30)) % 170 - 85
PLACES = {
    "oblique edge": X + 0.3 * Y < 225,
    "disc": np.hypot(X - 128, Y - 128) < 105,
    "cracks of 12 px": np.abs(CRACK) >= 6,
    "cracks of 8 px": np.abs(CRACK) >= 4,
    "cracks of 4 px": np.abs(CRACK) >= 2,
}


def texture(mean, std):
    random = np.random.default_rng(0)
    image = ndimage.gaussian_filter(random.normal(size=(3, PX, PX)), (0, 2, 2))
    return np.clip(mean + std * image / image.std(), 1, 255)


@pytest.mark.parametrize(("mean", "std"), [(150, 25), (60, 20)])
@pytest.mark.parametrize("there", PLACES.values(), ids=PLACES)
def test_no_data_beside_tissue_is_no_data_in_jpeg_too(tmp_path, there, mean, std):
    values = np.where(there, texture(mean, std), 0).astype(np.uint8)[:, None]
    path = make_scales(
        tmp_path / "em", {(1, 1, 1): values}, encoding="jpeg", chunk=(64, 64, 1)
    )
    found = ImageVolume(path).read(Grid(0, 0, 0, PX, PX), range(3))[:, 0]
    # Before: 35 to 47 % of cracks count as tissue, 2 % of a disc's outside. A stump of
    # a narrow crack, cut off by a corner of what is read, is too small to tell.
    assert (found[:, ~there] != 0).mean() < 0.06
    assert (found[:, ~there & (X < 220)] != 0).mean() < 0.005
    tissue = found[:, there]
    # jpeg itself makes a few pixels of dark tissue 0.
    assert (tissue == 0).mean() < 0.004
    assert abs(tissue.mean() - mean) < 1 and abs(tissue.std() - std) < 1


def test_the_patch_read_does_not_change_what_is_blank(tmp_path):
    values = np.where(PLACES["disc"], texture(150, 25), 0).astype(np.uint8)[:, None]
    path = make_scales(
        tmp_path / "em", {(1, 1, 1): values}, encoding="jpeg", chunk=(64, 64, 1)
    )
    whole = ImageVolume(path).read(Grid(0, 0, 0, PX, PX), range(1))[0, 0]
    part = ImageVolume(path).read(Grid(0, 16, 24, 99, 77), range(1))[0, 0]
    assert (part != whole[16:115, 24:101]).mean() < 1e-3


def test_dark_tissue_away_from_no_data_stays(tmp_path):
    values = texture(150, 25)[:, None]
    for x, y, radius, grey in ((60, 60, 30, 8), (190, 60, 25, 5), (128, 190, 40, 15)):
        dark = np.hypot(X - x, Y - y) < radius
        values[:, :, dark] = grey + values[:, :, dark] / 100
    values = values.astype(np.uint8)
    path = make_scales(
        tmp_path / "em", {(1, 1, 1): values}, encoding="jpeg", chunk=(64, 64, 1)
    )
    grid = Grid(0, 0, 0, PX, PX)
    stored = super(ImageVolume, volume := ImageVolume(path)).read(grid, range(3))
    found = volume.read(grid, range(3))
    assert ((found == 0) & (stored != 0)).mean() < 1e-3


@pytest.mark.parametrize(
    ("scale", "lossy"),
    [
        ({"encoding": "jpeg"}, True),
        ({"encoding": "jxl"}, True),
        ({"encoding": "jxl", "jxl_quality": 100}, False),
        ({"encoding": "png"}, False),
        ({"encoding": "raw"}, False),
    ],
)
def test_lossless_encodings_are_left_as_they_are(tmp_path, sections, scale, lossy):
    sections[0, 0, 29, 20:30] = 5  # near-black, beside "no data"
    volume = ImageVolume(isotropic(tmp_path / "em", sections))
    volume.info["scales"][0].update(scale)
    assert volume._is_lossy(0) is lossy


def test_near_black_pixels_go_with_the_zeros_that_they_lie_among():
    image = np.full((20, 24), 120, np.uint8)
    image[4:10, 6:16] = 0
    image[5, 8:12] = 7
    image[9, 14], image[9, 15] = 31, 32  # traces end below 32
    image[15, 20], image[16, 21] = 0, 3  # a single 0 is dark tissue
    found = blank_traces(image)
    assert not found[4:9, 6:16].any()
    assert (found[9, 14], found[9, 15]) == (0, 32)
    assert (found[15, 20], found[16, 21]) == (0, 3)
    assert (found != image).sum() == 5


def test_images_and_their_reference_are_cleaned_by_every_command(tmp_path):
    values = np.where(CRACK > -6, texture(150, 25), 0).astype(np.uint8)[:, None]
    path = make_scales(
        tmp_path / "em", {(1, 1, 1): values}, encoding="jpeg", chunk=(64, 64, 1)
    )
    words = ["--cv_path", path, "--dst_folder", tmp_path / "data", "--mip", 0]
    words += ["--patch_size", 128, "--x_offset", 64, "--y_offset", 64, "--z_start", 1]
    words += ["--z_end", 2, "--normalize", "--reference_size", 192]
    download_image.main([str(word) for word in words])
    (images,) = map(ImageSet, (tmp_path / "data").glob("*.h5"))
    area = {"path": path, "src_mip": 0, "dst_mip": 0, "x_size": 192, "y_size": 192}
    spec = {
        "image": {"path": path, "src_mip": 0, "reference": area},
        **{"max_mip": 0, "dst_mip": 0, "x_size": 128, "y_size": 128},
        "pairs": [[{"x": 128, "y": 128, "z": 1}, {"x": 128, "y": 128, "z": 0}]],
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    words = ["--spec_path", tmp_path / "spec.json", "--dst_path", tmp_path / "made"]
    main(["make-dataset", *map(str, words)])
    (made,) = map(ImageSet, (tmp_path / "made").glob("*.h5"))
    around = values[1, 0, 32:224, 32:224].astype(float)
    around = around[around != 0]
    patch = values[1, 0, 64:192, 64:192].astype(float)
    for image in (images.read(0).src, made.read(0).src):
        assert (image[patch == 0] != 0).mean() < 0.005
        tissue = patch != 0
        expected = (patch - around.mean()) / around.std()
        assert abs((image - expected)[tissue].mean()) < 0.02
        assert abs(image[tissue].std() - expected[tissue].std()) < 0.02


def test_dark_tissue_beside_no_data_stays_but_for_its_rim():
    image = np.full((24, 30), 20, np.uint8)
    image[:, :10] = 0
    found = blank_traces(image)
    # Of the 25 pixels around, 10 are 0 at the first pixel, 5 at the second.
    assert not found[:, :12].any()
    np.testing.assert_array_equal(found[:, 12:], 20)
