"""Check reference areas, and the messages about images that are not normalised."""

import json

import numpy as np
import pytest
from scipy import ndimage

import download_image
from metroem.__main__ import main
from metroem.data.dataset import find_pairs
from metroem.errors import DatasetError
from metroem.geometry.grid import Grid
from metroem.io.h5 import ImageSet
from metroem.io.resume import ResumeStore, parts_folder
from metroem.prepare.inspect import inspect_dataset
from metroem.prepare.requests import InspectRequest
from metroem.prepare.sources import sample_windows
from tests import volumes

SIDE = 256
TEXTURE, NOISE = 15, 45


def averaged(sections, levels):
    z, channels, x, y = sections.shape
    by = 1 << levels
    blocks = sections.reshape(z, channels, x // by, by, y // by, by).mean((3, 5))
    return blocks.round().astype(sections.dtype)


def make_volume(folder, by_mip):
    return volumes.make_volume(folder, by_mip, chunk=(128, 128, 1))


def noisy(*, num=3, side=SIDE, seed=0):
    """Make sections of texture, which averaging keeps, and noise, which it removes."""
    random = np.random.default_rng(seed)
    shape = (num, 1, side, side)
    texture = ndimage.gaussian_filter(random.normal(size=shape), (0, 0, 8, 8))
    grey = 128 + TEXTURE * texture / texture.std() + NOISE * random.normal(size=shape)
    return np.clip(grey, 1, 255).astype(np.uint8)


@pytest.fixture
def download(tmp_path):
    def run(cv_path, *flags, mip=0, size=64, z_end=3):
        words = ["--cv_path", cv_path, "--dst_folder", tmp_path / "data"]
        words += ["--z_start", 1, "--z_end", z_end, "--mip", mip, "--patch_size", size]
        download_image.main([str(word) for word in (*words, *flags)])
        (path,) = (tmp_path / "data").glob("x*.h5")
        return ImageSet(path)

    return run


@pytest.fixture
def make(tmp_path):
    def run(path, reference, *, src_mip=0, dst_mip=0, size=64, center=(128, 128)):
        x, y = center
        spec = {
            "image": {"path": path, "src_mip": src_mip, "reference": reference},
            "max_mip": 2,
            "dst_mip": dst_mip,
            "x_size": size,
            "y_size": size,
            "pairs": [[{"x": x, "y": y, "z": z} for z in (2, 1)]],
        }
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        words = ["--spec_path", str(tmp_path / "spec.json"), "--dst_path"]
        main(["make-dataset", *words, str(tmp_path / "made")])
        (path,) = (tmp_path / "made").glob("x*.h5")
        return ImageSet(path)

    return run


def area(path, mip, size):
    sizes = {"x_size": size, "y_size": size}
    return {"path": path, "src_mip": mip, "dst_mip": mip, **sizes}


AROUND = ["--normalize", "--x_offset", 96, "--y_offset", 96]


@pytest.mark.parametrize("mip", [1, 2, 3])
def test_a_coarser_reference_gives_the_std_of_the_pixels_of_the_patch(
    tmp_path, download, make, mip
):
    sections = noisy()
    path = make_volume(
        tmp_path / "em", [averaged(sections, level) for level in range(mip + 1)]
    )
    size = SIDE >> mip
    images = download(
        path, *AROUND, "--reference_mip", mip, "--reference_size", size, z_end=3
    )
    whole = sections[1, 0].astype(float)
    patch = whole[96:160, 96:160]
    expected = np.maximum((patch - whole.mean()) / whole.std(), -4)
    # The mean of mips is rounded to whole grey levels, which are 1 / 48 of a std.
    np.testing.assert_allclose(images.read(0).src, expected, atol=0.02)
    made = make(path, area(path, mip, size))
    np.testing.assert_allclose(made.read(0).tgt, expected, atol=0.02)


def test_a_patch_of_a_large_pale_place_stays_pale(tmp_path, download):
    """Make three quarters of the area with four times the contrast of the patch."""
    sections = np.stack([noisy(num=1, side=1024, seed=z)[0] for z in range(2)])
    sections[..., :512, :512] = sections[..., :512, :512] // 4 + 150
    path = make_volume(tmp_path / "em", [sections, None, averaged(sections, 2)])
    corner = ["--normalize", "--x_offset", 448, "--y_offset", 448, "--anchor", "center"]
    flags = ["--reference_mip", 2, "--reference_size", 256]
    images = download(path, *corner, *flags, size=128, z_end=2)
    whole = sections[1, 0].astype(float)
    expected = (whole[448:576, 448:576] - whole.mean()) / whole.std()
    # Nine samples of 128 px: 1 % of the variance inside of pixels.
    np.testing.assert_allclose(images.read(0).src, expected, rtol=0.03, atol=0.05)


def test_a_finer_reference_is_averaged_to_the_mip_of_the_patch(
    tmp_path, download, make
):
    sections = noisy()
    coarse = averaged(sections, 2)
    path = make_volume(tmp_path / "em", [sections, averaged(sections, 1), coarse])
    flags = ["--reference_mip", 0, "--reference_size", SIDE]
    images = download(path, *AROUND, *flags, mip=2, size=16)
    whole = coarse[1, 0].astype(float)
    expected = (whole[24:40, 24:40] - whole.mean()) / whole.std()
    np.testing.assert_allclose(images.read(0).src, expected, atol=0.06)
    made = make(path, area(path, 0, SIDE), src_mip=2, dst_mip=2, size=16)
    np.testing.assert_allclose(made.read(0).tgt, expected, atol=0.06)


def test_samples_are_spread_over_an_area_on_its_pixels():
    area = Grid(3, 64, -128, 192, 40)
    samples = sample_windows(area, 1)
    # 128 px of mip 1 are 32 px of the area; 40 px are one window.
    corners = [64 + 8 * row for row in (16, 80, 144)]
    assert [(s.x, s.rows) for s in samples] == [(x, 128) for x in corners]
    assert {(s.mip, s.y, s.cols) for s in samples} == {(1, -128, 160)}
    assert sample_windows(area, 3) == sample_windows(area, 4) == []


@pytest.mark.parametrize("written", [(), (0, 1), (0, 2)])
def test_a_reference_that_lacks_sections_is_refused_and_names_them(
    tmp_path, download, make, written
):
    sections = noisy()
    coarse = np.zeros_like(averaged(sections, 2))
    coarse[list(written)] = averaged(sections, 2)[list(written)]
    path = make_volume(tmp_path / "em", [sections, None, coarse])
    flags = [*AROUND, "--reference_mip", 2, "--reference_size", SIDE >> 2]
    lacking = [z for z in range(3) if z not in written]
    match = f"no tissue at mip 2 .* in sections {', '.join(map(str, lacking))}, where"
    with pytest.raises(DatasetError, match=match):
        download(path, *flags)
    assert not list((tmp_path / "data").glob("*.h5"))
    named = ", ".join(str(z) for z in lacking if z)
    match = f"no tissue at mip 2 .* in sections {named}, where"
    with pytest.raises(DatasetError, match=match):
        make(path, area(path, 2, SIDE >> 2))
    # Once it is written, the same command resumes.
    make_volume(tmp_path / "em", [sections, None, averaged(sections, 2)])
    assert abs(download(path, *flags).read(0).src.mean()) < 0.2


def test_what_1_0_0_kept_of_a_stopped_download_is_not_taken_for_ours(
    tmp_path, download, monkeypatch
):
    path = make_volume(tmp_path / "em", [noisy()])
    flags = [*AROUND, "--reference_size", SIDE]
    with monkeypatch.context() as patched:
        patched.setattr(ResumeStore, "remove", lambda self: None)
        images = download(path, *flags)
    expected = images.read(0).src
    images.path.unlink()
    parts = parts_folder(images.path)
    for ours in parts.glob("*.npy"):
        z = ours.stem.rpartition("_")[2]
        np.save(parts / f"image-{z}.npy", np.ones((64, 64), np.uint8))
        np.save(parts / f"statistics-{z}.npy", [1.0, 2.0])  # mean and std
        ours.unlink()
    np.testing.assert_array_equal(download(path, *flags).read(0).src, expected)


def test_a_reference_that_is_blank_where_the_patch_is_is_refused(tmp_path, download):
    sections = noisy()
    coarse = averaged(sections, 2)
    coarse[1, :, 20:44, 20:44] = 0
    path = make_volume(tmp_path / "em", [sections, None, coarse])
    flags = ["--reference_mip", 2, "--reference_size", SIDE >> 2]
    with pytest.raises(DatasetError, match="no tissue at mip 2 .* in sections 1, wh"):
        download(path, *AROUND, *flags)


def test_a_section_without_tissue_needs_no_reference(tmp_path, download):
    sections = noisy()
    sections[1] = 0
    path = make_volume(tmp_path / "em", [sections, None, averaged(sections, 2)])
    flags = ["--reference_mip", 2, "--reference_size", SIDE >> 2]
    images = download(path, *AROUND, *flags)
    assert not images.read(0).src.any() and images.read(1).src.any()


def test_a_pale_place_that_a_reference_normalised_is_trained_on(tmp_path, download):
    sections = noisy()
    sections[..., 96:160, 96:160] = sections[..., 96:160, 96:160] // 8 + 200
    path = make_volume(tmp_path / "em", [sections])
    images = download(path, *AROUND, "--reference_size", SIDE)
    assert images.read(0).src.std() < 0.2
    assert len(find_pairs(tmp_path / "data", 0, stage=0, checkpoint_name="ck")) == 2
    inspect_dataset(InspectRequest(tmp_path / "data"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_images_that_are_not_normalised_are_named_at_the_download(
    tmp_path, download, caplog, dtype
):
    path = make_volume(tmp_path / "em", [noisy().astype(dtype)])
    download(path)
    assert "train.py refuses" in caplog.text and "--normalize" in caplog.text
    caplog.clear()
    download(path, "--normalize", "--overwrite")
    assert "train.py refuses" not in caplog.text


def test_a_volume_that_is_normalised_already_is_no_cause_to_warn(
    tmp_path, download, caplog
):
    values = (noisy().astype(np.float32) - 128) / 48
    download(make_volume(tmp_path / "em", [values]))
    assert "normalised" not in caplog.text


@pytest.mark.parametrize("reference", [[], ["--reference_size", 128]])
def test_a_section_of_one_grey_level_is_blank_in_the_log_too(
    tmp_path, download, caplog, reference
):
    caplog.set_level("INFO", "metroem")
    sections = noisy(num=4)
    sections[2] = 128
    path = make_volume(tmp_path / "em", [sections])
    images = download(path, "--normalize", *reference, z_end=4)
    assert not images.read(1).src.any()
    assert "4 sections, blank 25.0% (0.0%...100.0%)" in caplog.text
    assert "mostly blank: sections 2 (100%)" in caplog.text
    assert "sections [2] have one grey level" in caplog.text


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_grey_levels_as_stored_are_named_by_make_dataset_too(
    tmp_path, make, caplog, dtype
):
    make(make_volume(tmp_path / "em", [noisy().astype(dtype)]), None)
    assert "train.py refuses" in caplog.text
    assert 'give a "reference" of the "image"' in caplog.text
