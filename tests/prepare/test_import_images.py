"""`metroem import`: from files to a volume, whole, resumed, or refused."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from cloudvolume import CloudVolume
from PIL import Image

from metroem.__main__ import main
from metroem.errors import DatasetError, MetroEMError, UsageError
from metroem.imaging.normalize import coarsen_image, round_greys
from metroem.io.image_volume import ImageVolume
from metroem.io.volume_write import write_volume
from metroem.prepare.import_images import import_images
from metroem.prepare.requests import ImportRequest
from tests.volumes import make_scales, make_volume
from tests.zarrs import multiscales, put, write_zarr2

ROOT = Path(__file__).parents[2]
NM = ["--resolution", "8", "8", "40"]
ROWS, COLS = 60, 90


def greys(seed=0, rows=ROWS, cols=COLS, dtype=np.uint8):
    """An image, rows = y and cols = x, with a corner of 0."""
    made = np.random.default_rng(seed).integers(1, 255, (rows, cols)).astype(dtype)
    made[:20, :30] = 0
    return made


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with sections 3 to 6 as PNG, which is the working folder's `s`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    for z in range(3, 7):
        Image.fromarray(greys(z)).save(tmp_path / "s" / f"s{z}.png")
    return tmp_path / "s"


def read(path, mip=0):
    """All sections of a volume as images, rows = y, by z."""
    volume = ImageVolume(str(path))
    (x, x_end), (y, y_end) = volume.bounds_of(mip)
    level = CloudVolume(volume.path, mip=mip, progress=False, fill_missing=False)
    whole = np.asarray(level[:])[..., 0]
    assert whole.shape[:2] == (x_end - x, y_end - y)
    return {z: whole[:, :, i].T for i, z in enumerate(volume.sections_at(mip))}


def contents(path):
    """The bytes of all files of a volume but for the record of the commands."""
    return {
        str(one.relative_to(path)): one.read_bytes()
        for one in sorted(Path(path).rglob("*"))
        if one.is_file() and one.name != "provenance"
    }


def run(*arguments):
    main(["import", *map(str, arguments)])


def test_png_become_a_volume_at_the_z_of_their_names(folder):
    run("s", "em", *NM)
    volume = ImageVolume("em")
    assert volume.mips == [0, 1, 2] and volume.resolution == (8, 8, 40)
    assert volume.sections_at(0) == range(3, 7) and volume.dtype == np.uint8
    for z, image in read("em").items():
        np.testing.assert_array_equal(image, greys(z))
    whole = torch.from_numpy(greys(5).astype(np.float32))[None, None]
    for mip in (1, 2):
        truth = round_greys(coarsen_image(whole, mip), np.dtype(np.uint8))[0, 0]
        np.testing.assert_array_equal(read("em", mip)[5], truth)


def test_the_last_line_is_the_next_command(folder, caplog):
    caplog.set_level(logging.INFO)
    run("s", "em", *NM, "--z_start", 11)
    last = caplog.messages[-1]
    assert "align-stack --cv_path em " in last and "--z_start 11 --z_end 15" in last
    assert "4 sections of 90 x 60 px (x, y), uint8, z 11...14" in caplog.text


def test_mips_can_be_counted_and_end_at_512_px_by_default(tmp_path):
    np.save(tmp_path / "a.npy", greys(0, 30, 5000)[None])
    run(tmp_path / "a.npy", tmp_path / "em", *NM)
    # 5000 / 2^4 = 312.5; with one mip less it would be 625.
    assert ImageVolume(str(tmp_path / "em")).mips == [0, 1, 2, 3, 4]
    run(tmp_path / "a.npy", tmp_path / "two", *NM, "--mips", 2)
    assert ImageVolume(str(tmp_path / "two")).mips == [0, 1]


def test_16_bit_is_mapped_by_one_range_for_all_sections(folder, caplog):
    caplog.set_level(logging.INFO)
    sections = np.stack([greys(z, dtype=np.uint16) * 100 for z in range(4)])
    np.save("a.npy", sections)
    run("a.npy", "em", *NM)
    notes = ImageVolume("em").info["metroem"]
    low, high = notes["grey_range"]
    assert 100 <= low <= 300 and 25200 <= high <= 25400
    tissue = sections > 0
    scaled = 1 + np.clip(np.round((sections - low) * (254 / (high - low))), 0, 254)
    truth = np.where(tissue, scaled, 0)
    for z, image in read("em").items():
        np.testing.assert_array_equal(image, truth[z])
    assert "% of the tissue lay outside" in caplog.text
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_a_range_that_clips_much_is_warned_of(folder, caplog):
    np.save("a.npy", greys(dtype=np.uint16)[None])
    run("a.npy", "em", *NM, "--grey_range", 100, 200)
    assert ImageVolume("em").info["metroem"]["grey_range"] == [100, 200]
    (warning,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert "--grey_range" in warning.getMessage()


def test_a_stated_range_is_also_that_of_8_bit(folder):
    run("s", "em", *NM, "--grey_range", 1, 509)
    # 1 + (grey - 1) / 2, halves to even.
    truth = np.where(greys(3) > 0, 1 + np.round((greys(3) - 1.0) / 2), 0)
    np.testing.assert_array_equal(read("em")[3], truth)


def test_sections_of_any_size_lie_on_one_canvas(folder, caplog):
    caplog.set_level(logging.INFO)
    Image.fromarray(greys(7, 70, 50)).save(folder / "s7.png")
    run("s", "em", *NM)
    images = read("em")
    assert images[7].shape == (70, 90)
    np.testing.assert_array_equal(images[7][:, :50], greys(7, 70, 50))
    assert not images[7][:, 50:].any() and not images[3][60:].any()
    assert "90 x 60 px: 4 (s3.png ...); 50 x 70 px: 1 (s7.png)" in caplog.text


def test_missing_and_broken_sections_are_all_named_before_anything_is_written(folder):
    Image.fromarray(greys(9)).save(folder / "s9.png")
    (folder / "s4.png").write_bytes(b"no image")
    with pytest.raises(DatasetError) as refused:
        run("s", "em", *NM)
    message = str(refused.value)
    assert "3 of 7 sections" in message and "--allow_missing" in message
    assert "z 4: s4.png: cannot be read" in message and "z 7-8: no file" in message
    assert not Path("em").exists()


def test_allowed_missing_sections_are_blank_and_named(folder, caplog):
    (folder / "s4.png").unlink()
    run("s", "em", *NM, "--allow_missing")
    images = read("em")
    assert list(images) == [3, 4, 5, 6] and not images[4].any()
    np.testing.assert_array_equal(images[5], greys(5))
    assert "1 sections are blank: z 4: no file" in caplog.text


def cut_short(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_file_that_proves_broken_stops_no_other_and_can_be_repaired(folder, caplog):
    whole = (folder / "s5.png").read_bytes()
    cut_short(folder / "s5.png")
    with pytest.raises(DatasetError, match=r"1 sections cannot be read: z 5: s5.png"):
        run("s", "em", *NM)
    with pytest.raises(MetroEMError):
        ImageVolume("em")  # nobody takes it for complete
    (folder / "s5.png").write_bytes(whole)
    caplog.set_level(logging.INFO)
    run("s", "em", *NM)
    assert "3 of 4 are done already" in caplog.text
    for z, image in read("em").items():
        np.testing.assert_array_equal(image, greys(z))


def test_a_blank_section_is_read_when_its_file_was_repaired(folder):
    whole = (folder / "s5.png").read_bytes()
    cut_short(folder / "s5.png")
    run("s", "em", *NM, "--allow_missing")
    assert not read("em")[5].any()
    (folder / "s5.png").write_bytes(whole)
    run("s", "em", *NM)
    np.testing.assert_array_equal(read("em")[5], greys(5))


def test_colour_is_refused_before_anything_is_written(folder):
    for z in range(3, 7):
        colours = np.random.default_rng(z).integers(0, 255, (60, 90, 3), np.uint8)
        Image.fromarray(colours).save(folder / f"s{z}.png")
    with pytest.raises(DatasetError, match="s3.png: is in colour: red"):
        run("s", "em", *NM)
    assert not list(Path("em").rglob("*_*"))


def test_a_stack_of_which_nothing_can_be_read_is_no_volume(folder):
    for file in folder.glob("*.png"):
        cut_short(file)
    with pytest.raises(DatasetError, match="no section could be read: z 3: s3.png"):
        run("s", "em", *NM, "--allow_missing")
    assert not Path("em/info").exists()


def test_a_disk_that_fails_makes_no_section_blank(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("metroem.io.image_files._pixels", fail)
    with pytest.raises(OSError, match="Input/output"):
        run("s", "em", *NM, "--allow_missing")
    assert not list(Path("em").glob("import/done/*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--mips", "2"], r"mips 3 \(asked for: 2\)"),
        (["--z_start", "1"], r"z \[3, 7\] \(asked for: \[1, 5\]\)"),
        (["--grey_range", "1", "9"], "grey_range 'found'"),
    ],
)
def test_other_flags_on_the_same_volume_are_refused(folder, change, words):
    run("s", "em", *NM)
    before = contents("em")
    with pytest.raises(DatasetError, match=words):
        run("s", "em", *NM, *change)
    assert contents("em") == before


def test_a_file_that_changed_since_is_refused_by_name(folder):
    run("s", "em", *NM)
    Image.fromarray(greys(99)).save(folder / "s4.png")
    with pytest.raises(DatasetError, match="s4.png: has changed since"):
        run("s", "em", *NM)


def test_the_same_command_again_reads_nothing(folder, monkeypatch, caplog):
    run("s", "em", *NM)
    before = contents("em")
    monkeypatch.setattr(
        "metroem.io.image_files.ImageFolder._read_rows",
        lambda *_: pytest.fail("read again"),
    )
    caplog.set_level(logging.INFO)
    run("s", "em", *NM)
    assert contents("em") == before and "4 of 4 are done already" in caplog.text


@pytest.mark.parametrize("kind", ["volume", "file", "folder"])
def test_a_destination_with_other_things_is_refused(folder, kind):
    if kind == "volume":
        write_volume(Path("em"), np.ones((2, 40, 30), np.uint8), 1)
    elif kind == "folder":
        Path("em").mkdir()
        Path("em/mine.txt").write_text("x")
    else:
        Path("em").write_text("x")
    words = {"volume": "is there already", "folder": "such as mine.txt"}
    with pytest.raises(MetroEMError, match=words.get(kind, "is a file")):
        run("s", "em", *NM)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["s", "em"], "states no size of a voxel; give --resolution"),
        (["s", "s", *NM], "is also SECTIONS"),
        (["s", "em", "--resolution", "0", "8", "40"], "must be > 0"),
        (["s", "em", *NM, "--grey_range", "9", "9"], "LOW below HIGH"),
        (["s", "em", *NM, "--mips", "0"], "must be >= 1"),
        (["s", *NM], "without VOLUME"),
        (["s", "--allow_missing"], "goes with VOLUME"),
        (["s", "zarr://em", *NM], "only read"),
    ],
)
def test_flags_that_cannot_work_are_refused(folder, arguments, words):
    with pytest.raises(UsageError, match=words):
        run(*arguments)
    assert not Path("em").exists()


def test_a_stated_size_of_voxels_needs_no_flag(folder, caplog):
    tifffile.imwrite(
        "a.tif",
        greys()[None],
        imagej=True,
        resolution=(1 / 4.6, 1 / 4.6),
        metadata={"axes": "ZYX", "unit": "nm", "spacing": 45},
    )
    run("a.tif", "em")
    assert ImageVolume("em").resolution == pytest.approx((4.6, 4.6, 45))
    run("a.tif", "other", *NM)
    assert ImageVolume("other").resolution == (8, 8, 40)
    assert "states voxels of 4.6x4.6x45 nm; --resolution 8x8x40 nm" in caplog.text


def test_an_ome_zarr_becomes_a_volume_with_its_voxels(tmp_path):
    data = np.random.default_rng(0).integers(1, 255, (70, 50, 5), np.uint8)
    write_zarr2(tmp_path / "z" / "0", data.transpose(2, 1, 0), (2, 16, 32))
    put(tmp_path / "z" / ".zattrs", {"multiscales": multiscales(["0"])})
    run(tmp_path / "z", tmp_path / "em")
    assert ImageVolume(str(tmp_path / "em")).resolution == (8, 8, 40)
    for z, image in read(tmp_path / "em").items():
        np.testing.assert_array_equal(image, data[:, :, z].T)


def test_a_volume_is_copied_with_its_place(tmp_path):
    data = np.random.default_rng(0).integers(1, 255, (5, 1, 70, 50), np.uint8)
    path = make_volume(tmp_path / "v", [data], offset=(3, 5, 7), chunk=(32, 16, 2))
    run(path, tmp_path / "em", "--workers", 2)
    volume = ImageVolume(str(tmp_path / "em"))
    assert volume.extent()[0].x == 3 and volume.extent()[0].y == 5
    assert volume.sections_at(0) == range(7, 12) and volume.resolution == (4, 4, 40)
    for z, image in read(tmp_path / "em").items():
        np.testing.assert_array_equal(image, data[z - 7, 0].T)
    # 3...72 along x and 5...54 along y: 1...36 and 2...27 at mip 1.
    assert volume.bounds_of(1) == ((1, 37), (2, 28))


def test_any_number_of_workers_gives_the_same_bytes(folder):
    run("s", "one", *NM)
    run("s", "two", *NM, "--workers", 2)
    assert contents("one") == contents("two")


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "metroem", "import", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(pattern, process):
    """Wait until a file of a pattern exists, or the process has ended."""
    deadline = time.monotonic() + 120
    while not list(Path().glob(pattern)) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_killed_run_resumes_with_the_same_bytes(folder, workers):
    np.save("a.npy", np.stack([greys(z, dtype=np.uint16) for z in range(60)]))
    flags = ["a.npy", "em", *NM, "--workers", workers]
    run("a.npy", "whole", *NM)
    for number in (1, 20):
        process = start(*flags)
        wait_for(f"em/import/done/z{number}-*", process)
        process.kill()
        process.communicate()
        assert not Path("em/info").exists()
    run(*flags)
    assert contents("em") == contents("whole")


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_says_how_to_resume(folder):
    # So many that a busy machine does not end before the signal comes.
    np.save("a.npy", np.stack([greys(z) for z in range(600)]))
    process = start("a.npy", "em", *NM, "--workers", 2)
    wait_for("em/import/done/z5-*", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "the same command resumes" in output and "Traceback" not in output


def test_mips_are_added_to_a_volume_and_mip_0_is_not_touched(tmp_path, caplog):
    data = np.random.default_rng(0).integers(1, 255, (5, 1, 70, 50), np.uint8)
    data[:, :, :20, :20] = 0
    make_volume(tmp_path / "v", [data], offset=(3, 5, 7), chunk=(32, 16, 2))
    before = {k: v for k, v in contents(tmp_path / "v").items() if k != "info"}
    caplog.set_level(logging.INFO)
    run(tmp_path / "v", "--mips", 3)
    after = contents(tmp_path / "v")
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after} == {
        *("4_4_40", "8_8_40", "16_16_40", "info")
    }
    volume = ImageVolume(str(tmp_path / "v"))
    assert volume.mips == [0, 1, 2]
    # x 3 is alone in pixel 1 of mip 1, and y 5 in pixel 2; pixel 1 + k of x has 2 k - 1
    # and 2 k of the array, and so has pixel 2 + k of y.
    mip_1 = read(tmp_path / "v", 1)[8]
    section = data[1, 0].astype(float)
    assert mip_1[-1, -1] == section[69, 49]
    assert mip_1[12, 13] == np.round(section[25:27, 23:25].mean())
    assert not mip_1[:10, :10].any() and mip_1[11:, 11:].all()
    run(tmp_path / "v", "--mips", 3)
    assert "there is nothing to add" in caplog.text


def test_mips_that_exist_are_kept_and_said(tmp_path, caplog):
    fine = np.full((3, 1, 64, 48), 9, np.uint16)
    other = np.full((3, 1, 32, 24), 700, np.uint16)
    make_volume(tmp_path / "v", [fine, other])
    caplog.set_level(logging.INFO)
    run(tmp_path / "v")
    assert "has mips 0, 1, which stay as they are; adds 2, made of mip 1" in caplog.text
    assert read(tmp_path / "v", 1)[0].max() == 700
    assert (read(tmp_path / "v", 2)[0] == 700).all()


def test_scales_that_halve_z_are_no_mips_and_stay(tmp_path):
    data = np.random.default_rng(0).integers(1, 255, (4, 1, 64, 64), np.uint8)
    halved = data.reshape(2, 2, 1, 32, 2, 32, 2).mean((1, 4, 6)).astype(np.uint8)
    make_scales(tmp_path / "v", {(1, 1, 1): data, (2, 2, 2): halved})
    run(tmp_path / "v", "--mips", 2)
    volume = ImageVolume(str(tmp_path / "v"))
    assert len(volume.info["scales"]) == 3 and volume.mips == [0, 1]
    made = volume.read(volume.extent()[0].at_mip(1), range(0, 4))
    truth = data.reshape(4, 1, 32, 2, 32, 2).mean((3, 5))
    np.testing.assert_allclose(made, truth, atol=0.5)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("segmentation", "is a segmentation volume"),
        ("fields", "2 channels"),
        ("zarr", "only read"),
        ("png", "but images .*metroem import SECTIONS VOLUME"),
    ],
)
def test_mips_are_only_added_to_volumes_of_greys(tmp_path, kind, words):
    path = tmp_path / "v"
    if kind == "zarr":
        write_zarr2(path / "0", np.ones((3, 30, 40), np.uint8), (1, 16, 16))
        put(path / ".zattrs", {"multiscales": multiscales(["0"])})
    elif kind == "png":
        path.mkdir()
        Image.fromarray(greys()).save(path / "a.png")
    else:
        data = np.ones((2, 2 if kind == "fields" else 1, 40, 30), np.uint8)
        make_volume(path, [data])
        info = json.loads((path / "info").read_text())
        info["type"] = "segmentation" if kind == "segmentation" else "image"
        (path / "info").write_text(json.dumps(info))
    with pytest.raises(MetroEMError, match=words):
        run(path, "--mips", 3)


def test_a_request_in_python_is_checked_like_the_flags():
    with pytest.raises(UsageError, match="--mips 0"):
        ImportRequest("s", "em", mips=0)
    with pytest.raises(DatasetError, match="no such file or folder"):
        import_images(ImportRequest("/nowhere/s", "em", resolution=[8, 8, 40]))
