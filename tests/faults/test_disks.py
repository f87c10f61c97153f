"""Test disks that are full or read-only, and data that vanishes."""

import contextlib
import os
import shutil
import subprocess

import pytest

from tests.faults.places import agree, check_whole, contents, counted, left_over

WRITERS = ["download_image", "download_field", "make-dataset", "training"]
WRITERS += ["generation", "evaluate"]

# How many bytes are left: none, or enough to begin.
FULL = [*((name, 0) for name in WRITERS), ("training", 40_000)]
FULL += [("download_field", 40_000), ("download_image", 1_300_000)]
FULL += [("make-dataset", 1_300_000)]


def mount(*arguments):
    """Mount a file system, or skip the test if that is not allowed."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no mounting here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of 96 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, left):
    """Fill a disk until only some bytes are free."""
    disk = os.statvfs(folder)
    taken = disk.f_bavail * disk.f_frsize - left
    with (folder / "filling").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, taken)


def copied(place, name, disk):
    """Put the inputs of a command on the disk."""
    shutil.copytree(place.calm[name].start, disk / "run")
    return disk / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "left"), FULL)
def test_a_full_disk_is_named_and_the_same_command_ends_once_there_is_room(
    zygote, place, disk, name, left
):
    calm, folder = place.calm[name], copied(place, name, disk)
    before = contents(folder)
    fill(disk, left)
    done = zygote.run(folder, calm.command, to_the_end=True)
    with counted("disk full", name):
        assert done["status"] == 1, done
        assert "Traceback" not in done["output"], done["output"]
        error = next(x for x in done["output"].splitlines() if x.startswith("error: "))
        assert "no space left" in error and "free some space" in error
        assert "out" in error.split(": ")[1] or "ck" in error.split(": ")[1]
        check_whole(folder)
        now = contents(folder)
        assert {path: now[path] for path in before} == before
        (disk / "filling").unlink()
        again = zygote.run(folder, calm.command)
        assert again["status"] == 0, again["output"]
        assert contents(folder) == calm.contents
        assert left_over(folder) == []


@contextlib.contextmanager
def read_only(folder):
    """A folder that nobody may write to, not even root."""
    mount("--bind", str(folder), str(folder))
    try:
        mount("-o", "remount,ro,bind", str(folder))
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_folder_is_named(zygote, place, name):
    folder, calm = place.fresh(name), place.calm[name]
    before = contents(folder)
    with read_only(folder), counted("read-only folder", name):
        done = zygote.run(folder, calm.command)
        assert done["status"] == 1, done["output"]
        assert "Traceback" not in done["output"], done["output"]
        assert "Read-only file system; write elsewhere" in done["output"]
        assert contents(folder) == before


@pytest.mark.slow
def test_what_is_finished_needs_no_folder_that_can_be_written(zygote, place):
    for name in ("download_image", "download_field", "make-dataset"):
        folder, calm = place.fresh(name), place.calm[name]
        assert zygote.run(folder, calm.command)["status"] == 0
        with read_only(folder), counted("read-only, finished", name):
            done = zygote.run(folder, calm.command)
            assert done["status"] == 0 and "nothing to do" in done["output"]


@pytest.mark.slow
def test_data_that_vanish_in_training_are_named_and_the_state_is_kept(zygote, place):
    for workers in ("0", "2"):
        with counted("data vanish in training", f"{workers} workers"):
            folder, calm = place.fresh("training"), place.calm["training"]
            command = [*calm.command, "--num_workers", workers]
            done = zygote.run(folder, command, hook="lose_data_in_training")
            assert done["status"] == 1
            assert "Traceback" not in done["output"], done["output"]
            assert "error: data/x0_y0_z1_MIP2.h5: no such file" in done["output"]
            check_whole(folder)
            shutil.rmtree(folder / "data")
            shutil.copytree(calm.start / "data", folder / "data")
            again = zygote.run(folder, command)
            assert again["status"] == 0, again["output"]
            assert agree(folder, calm)


@pytest.mark.slow
def test_data_that_vanish_before_a_stage_are_named(zygote, place):
    folder, calm = place.fresh("generation"), place.calm["generation"]
    (folder / "data" / "x0_y0_z1_MIP1.h5").unlink()
    with counted("data vanish before a stage", "generation"):
        done = zygote.run(folder, calm.command)
        assert done["status"] == 1 and "Traceback" not in done["output"]
        assert "no image set at mip 1" in done["output"]
