"""Stop, kill and repeat download_image.py, and count what it reads."""

import itertools
import sys

import h5py
import numpy as np
import pytest

from metroem.errors import DatasetError
from metroem.io import resume
from metroem.io.h5 import ImageSet, verify
from tests.prepare.download_image.conftest import OFFSET, SHAPE, patch
from tests.volumes import ReadCount, make_volume


def test_a_finished_download_is_not_repeated(download, monkeypatch, caplog):
    (path,) = download("--mip", 0, "--patch_size", 64)
    written = path.stat().st_mtime_ns
    count = ReadCount(monkeypatch)
    caplog.set_level("INFO", "metroem")
    download("--mip", 0, "--patch_size", 64, "--parallel", 2)
    assert not count.times
    assert path.stat().st_mtime_ns == written
    assert "nothing to do" in caplog.text


def test_other_arguments_for_the_same_file_need_overwrite(download):
    (path,) = download("--mip", 0, "--patch_size", 64)
    with pytest.raises(DatasetError, match=r"patch_size 64 \(asked for: 32\).*--overw"):
        download("--mip", 0, "--patch_size", 32)
    download("--mip", 0, "--patch_size", 32, "--overwrite")
    assert ImageSet(path).shape == (32, 32)


def test_a_file_that_does_not_say_how_it_was_made_is_kept(tmp_path, download):
    path = tmp_path / "data" / "x96_y0_z12_MIP0.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["img"] = np.zeros((1, 2, 4, 4), np.float32)
    with pytest.raises(DatasetError, match="does not say how"):
        download("--mip", 0, "--patch_size", 64)


class _Killed(BaseException):
    """Stands for a kill between two sections."""


def fail_after(monkeypatch, num_parts):
    """Let the store fail after it has stored some results."""
    countdown = itertools.count()
    original = resume.ResumeStore.put

    def put(self, key, array):
        if next(countdown) == num_parts:
            raise _Killed
        original(self, key, array)

    monkeypatch.setattr(resume.ResumeStore, "put", put)


def test_a_killed_download_goes_on_where_it_was(tmp_path, download, monkeypatch):
    flags = ["--mip", 0, "--patch_size", 64, "--normalize"]
    with monkeypatch.context() as patched:
        fail_after(patched, 3)
        with pytest.raises(_Killed):
            download(*flags)
    assert list((tmp_path / "data").glob("*.h5")) == []
    with monkeypatch.context() as patched:
        count = ReadCount(patched)
        (path,) = download(*flags)
    # Sections 11...14 are needed; the last alone was not there. 64 pixels from a
    # multiple of the chunk size (32) on: 2 x 2 chunks.
    assert len(count.times) == 4
    assert {name.rpartition("_")[2] for name in count.times} == {"14-15"}
    assert verify(path) == []
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_parts_of_a_download_killed_at_its_very_end_are_dropped(download, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(resume.ResumeStore, "remove", lambda self: None)
        (path,) = download("--mip", 0, "--patch_size", 64)
    assert len(list(path.parent.iterdir())) == 2
    download("--mip", 0, "--patch_size", 64)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("num_parts", [0, 1, 2, 3])
def test_a_masked_download_killed_anywhere_becomes_the_same_file(
    tmp_path, download, monkeypatch, num_parts
):
    random = np.random.default_rng(1)
    mask = (random.random(SHAPE) < 0.1).astype(np.uint8)
    defects = make_volume(tmp_path / "mask", [mask], offset=OFFSET)
    # Image, mask and statistics of a section are one part: four in all.
    flags = ["--mip", 0, "--patch_size", 64, "--normalize", "--reference_size", 96]
    flags += ["--cv_path_defects", defects]
    monkeypatch.setattr(sys, "argv", ["download_image.py"])
    (path,) = download(*flags)
    whole = path.read_bytes()
    path.unlink()
    with monkeypatch.context() as patched:
        fail_after(patched, num_parts)
        with pytest.raises(_Killed):
            download(*flags)
    (path,) = download(*flags)
    assert path.read_bytes() == whole


def test_what_a_killed_download_left_is_not_used_for_other_arguments(
    download, monkeypatch
):
    with monkeypatch.context() as patched:
        fail_after(patched, 2)
        with pytest.raises(_Killed):
            download("--mip", 0, "--patch_size", 64)
    with pytest.raises(DatasetError, match="--overwrite"):
        download("--mip", 0, "--patch_size", 48)
    (path,) = download("--mip", 0, "--patch_size", 48, "--overwrite")
    assert ImageSet(path).shape == (48, 48)
    assert len(list(path.parent.iterdir())) == 1


# Chunks of the patch: 64 px from a multiple of 32 on are 2 x 2 chunks a section.
@pytest.mark.parametrize("parallel", [1, 3])
def test_each_chunk_is_read_once_where_chunks_are_one_section_thick(
    download, monkeypatch, parallel
):
    count = ReadCount(monkeypatch)
    flags = ["--mip", 0, "--patch_size", 64, "--parallel", parallel, "--normalize"]
    download(*flags, "--reference_size", 128)
    # The reference area around the patch covers it: 128 px, 4 x 4 chunks.
    assert set(count.times.values()) == {1}
    assert len(count.times) == 4 * 16
    needed = 4 * 128 * 128
    assert count.num_bytes <= 1.1 * needed


def test_each_chunk_is_read_once_where_chunks_are_thick(
    tmp_path, download, sections, monkeypatch
):
    thick = make_volume(
        tmp_path / "thick", [sections], offset=OFFSET, chunk=(32, 32, 3)
    )
    count = ReadCount(monkeypatch)
    (path,) = download("--mip", 0, "--patch_size", 64, cv_path=thick)
    assert set(count.times.values()) == {1}
    # Sections 11...14 lie in the layers 10...12 and 13...15.
    assert len(count.times) == 2 * 4
    expected = patch(sections, 14, 64, 64)
    np.testing.assert_array_equal(ImageSet(path).read(2).src, expected)


@pytest.mark.parametrize("parallel", [1, 3])
def test_each_chunk_is_read_once_where_those_of_the_mask_are_thicker(
    tmp_path, download, monkeypatch, parallel
):
    mask = (np.random.default_rng(1).random(SHAPE) < 0.1).astype(np.uint8)
    defects = make_volume(tmp_path / "mask", [mask], offset=OFFSET, chunk=(32, 32, 3))
    count = ReadCount(monkeypatch)
    flags = ["--mip", 0, "--patch_size", 64, "--parallel", parallel]
    (path,) = download(*flags, "--cv_path_defects", defects)
    # 4 sections of images and 2 layers of the mask, 2 x 2 chunks each.
    assert set(count.times.values()) == {1} and len(count.times) == (4 + 2) * 4
    marks = patch(mask, 14, 64, 64)
    np.testing.assert_array_equal(ImageSet(path).read_defects(2).src, marks)
