"""Check that all mips of a location are moved alike by a downloaded field."""

import re
import shlex
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import download_field
import download_image
from metroem.__main__ import main
from metroem.data.dataset import open_prior
from metroem.errors import DatasetError
from metroem.evaluation.evaluate import evaluate_dataset
from metroem.evaluation.requests import EvaluateRequest
from metroem.io.h5 import FieldSetMeta, ImageSet, PairLocation, write_field_set
from metroem.models.module_folders import init_pyramid
from metroem.prepare.download_image import _ImageFile
from metroem.prepare.inspect import inspect_dataset
from metroem.prepare.requests import InspectRequest
from metroem.training.requests import TrainRequest
from metroem.training.run import train_pyramid
from tests.volumes import ReadCount, make_volume

AREA = "--x_offset 32 --y_offset 16 --z_start 2 --z_end 4"
PLACE = "x32_y16_z2"
FIELD = f"field_0_{PLACE}_MIP1_precomputed.h5"
# Displacements of sections 1, 2 and 3 along x and y, mip-0 px: even, for mip 1.
MOVED = {1: (-6, 4), 2: (10, -8), 3: (2, 12)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make volumes of images and of a field, in the folder where commands run."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    fine = random.integers(1, 255, (5, 1, 128, 96), np.uint8)
    mips = [fine, fine[..., ::2, ::2], fine[..., ::4, ::4]]
    make_volume(tmp_path / "em", mips)
    field = np.zeros((5, 2, 64, 48), np.float32)
    for z, (along_x, along_y) in MOVED.items():
        field[z, 0], field[z, 1] = along_x + 1, along_y + 0.5
    make_volume(tmp_path / "field", [np.zeros((5, 2, 128, 96), np.float32), field])
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch):
    """Run a command line as typed."""

    def run_line(line):
        name, *words = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [name, *words])
        {"download_image.py": download_image, "download_field.py": download_field}[
            name
        ].main(words)

    return run_line


def image_line(mips, sizes, *more):
    return " ".join(
        [
            f"download_image.py --cv_path em --dst_folder data {AREA} --normalize",
            f"--mip {mips} --patch_size {sizes}",
            *more,
        ]
    )


def field_line(*more):
    words = "--src_mip 1 --dst_mip 1 --patch_size 24 --suffix precomputed"
    line = f"download_field.py --cv_path field --dst_folder data {AREA} {words}"
    return " ".join([line, *more])


MOVE = f"--field_dset data/{FIELD}"


def offsets(mip):
    images = ImageSet(Path(f"data/{PLACE}_MIP{mip}.h5"))
    return [[images.offset(i, side) for side in (0, 1)] for i in range(len(images))]


EXPECTED = [[MOVED[2], MOVED[1]], [MOVED[3], MOVED[2]]]
NOT_MOVED = [[(0, 0), (0, 0)], [(0, 0), (0, 0)]]


def images_in(path):
    with h5py.File(path) as file:
        return file["img"][:]


def refusal(call, *args):
    with pytest.raises(DatasetError) as caught:
        call(*args)
    return str(caught.value)


def test_the_readme_of_the_original_in_its_order_in_one_folder(
    run, monkeypatch, caplog
):
    run(image_line("0 1", "40 24"))
    unmoved = images_in(f"data/{PLACE}_MIP0.h5")
    run(field_line())
    run(image_line("1", "24", MOVE))
    # The images of the finer mip were moved along, for what stage 1 writes there.
    assert offsets(0) == offsets(1) == EXPECTED
    assert not np.array_equal(images_in(f"data/{PLACE}_MIP0.h5"), unmoved)
    inspect_dataset(InspectRequest(Path("data")))
    init_pyramid(Path("pyramid"), [2, 1, 0])

    class Reached(Exception):
        """Raised where the first stage would start, after all checks."""

    def prepare(*args):
        raise Reached

    monkeypatch.setattr("metroem.training.run._prepare", prepare)
    one = {"train_stages": [1], "generate_field_stages": [1]}
    with pytest.raises(Reached):
        train_pyramid(TrainRequest(Path("pyramid"), Path("data"), **one, device="cpu"))

    # Each line once more, as in a script that was stopped: nothing is read.
    count = ReadCount(monkeypatch)
    for line in (image_line("0 1", "40 24"), field_line(), image_line("1", "24", MOVE)):
        run(line)
    assert not count.times and offsets(0) == offsets(1) == EXPECTED
    assert f"data/{PLACE}_MIP0.h5: already exists, moved by a field" in caplog.text


def test_stages_before_do_not_make_the_priors_of_a_download(run, monkeypatch):
    run(field_line())
    run(image_line("1", "24", MOVE))
    init_pyramid(Path("pyramid"), [2, 1])
    configs = []
    monkeypatch.setattr(
        "metroem.training.run.train_stage", lambda config, *a: configs.append(config)
    )
    monkeypatch.setattr("metroem.training.run.write_fields", lambda *a: None)
    one = {"train_stages": [1], "generate_field_stages": [1], "val_pairs": 0}
    name = {"checkpoint_name": "precomputed", "device": "cpu"}
    train_pyramid(TrainRequest(Path("pyramid"), Path("data"), **one, **name))
    (config,) = configs
    assert config.stage == 1 and config.earlier == ()


@pytest.mark.parametrize("anchor", ["corner", "center"])
def test_mips_moved_along_are_as_if_they_were_asked_for(run, anchor):
    run(field_line("--place", f"{PLACE}_{anchor}"))
    moving = f"--field_dset data/field_0_{PLACE}_{anchor}_MIP1_precomputed.h5"
    line = image_line("1 0", "24 20", f"--anchor {anchor} --suffix {anchor}")
    run(f"{line} {moving}".replace("_folder data", "_folder other"))
    run(line)
    run(f"{line} --mip 1 --patch_size 24 {moving}")
    for name in (f"{PLACE}_MIP0_{anchor}.h5", f"{PLACE}_MIP1_{anchor}.h5"):
        there, asked = (images_in(f"{folder}/{name}") for folder in ("data", "other"))
        np.testing.assert_array_equal(there, asked)


def test_a_run_killed_between_two_mips_is_finished_by_the_same_command(
    run, monkeypatch
):
    run(image_line("1 0", "24 40"))
    run(field_line())
    make = _ImageFile.make

    def killed(this):
        if this.grid.mip == 0:
            raise KeyboardInterrupt
        make(this)

    with monkeypatch.context() as patch:
        patch.setattr(_ImageFile, "make", killed)
        with pytest.raises(KeyboardInterrupt):
            run(image_line("1", "24", MOVE))
    assert (offsets(1), offsets(0)) == (EXPECTED, NOT_MOVED)
    run(image_line("1", "24", MOVE))
    assert offsets(0) == EXPECTED


def test_images_that_differ_in_more_than_where_they_are_read_are_kept(run, caplog):
    run(image_line("0", "40").replace("--normalize", ""))
    run(image_line("1", "24"))
    run(field_line())
    assert "normalization" in refusal(run, image_line("0", "40", MOVE))
    # Of another mip it is said, with what makes it fit.
    run(image_line("1", "24", MOVE))
    assert offsets(0) == NOT_MOVED
    assert f"{PLACE}_MIP0.h5: src of pair 0 was moved by (0, 0)" in caplog.text
    assert f"--field_dset data/{FIELD}" in caplog.text


def test_images_that_another_field_moved_are_replaced_when_asked_for(run):
    run(field_line())
    run(image_line("1 0", "24 40", MOVE))
    other = np.full((5, 2, 64, 48), 4.5, np.float32)
    make_volume(Path("other").resolve(), [np.zeros((5, 2, 128, 96), np.float32), other])
    run(field_line("--overwrite").replace("cv_path field", "cv_path other"))
    assert "offsets" in refusal(run, image_line("1", "24", MOVE))
    assert offsets(1) == offsets(0) == EXPECTED
    run(image_line("1", "24", MOVE, "--overwrite"))
    assert offsets(1) == offsets(0) == [[(4, 4), (4, 4)]] * 2


def test_a_coarser_mip_that_the_field_cannot_move_stays_and_is_named(run, caplog):
    run(image_line("2 1", "16 24"))
    run(field_line())
    run(image_line("1", "24", MOVE))
    assert (offsets(1), offsets(2)) == (EXPECTED, NOT_MOVED)
    assert f"mip 2 cannot be moved by {FIELD}: download it with --dst_mip 2" in (
        caplog.text
    )


def moved_unlike(run):
    """Download mip 1 moved by the field, then mip 0 without the field."""
    run(field_line())
    run(image_line("1", "24", MOVE))
    run(image_line("0", "40"))
    assert (offsets(1), offsets(0)) == (EXPECTED, NOT_MOVED)


def test_a_mip_downloaded_without_the_field_of_its_place_is_named(run, caplog):
    moved_unlike(run)
    (warning,) = [r for r in caplog.records if r.levelname == "WARNING"][-1:]
    assert f"{PLACE}_MIP1.h5: src of pair 0 was moved by (10, -8)" in warning.message


def called(command):
    """Commands that read several mips, and refuse mips that were moved differently."""
    data, pyramid = Path("data"), Path("pyramid")
    if command == "inspect":
        return lambda: inspect_dataset(InspectRequest(data))
    if command == "evaluate":
        init_pyramid(pyramid, [1, 0])
        return lambda: evaluate_dataset(EvaluateRequest(pyramid, data))
    init_pyramid(pyramid, [2, 1, 0] if command == "write" else [1, 0])
    one = {"train_stages": [1], "generate_field_stages": [1]}
    stages = one if command == "write" else {}
    request = TrainRequest(pyramid, data, **stages, device="cpu")
    return lambda: train_pyramid(request)


@pytest.mark.parametrize("command", ["inspect", "evaluate", "train", "write"])
def test_mips_moved_unlike_are_refused_with_the_command_that_mends_them(run, command):
    if command == "evaluate":
        # Large enough to measure.
        run(field_line("--patch_size 40"))
        run(image_line("1", "40", MOVE))
        run(image_line("0", "80"))
    else:
        moved_unlike(run)
    found = refusal(called(command))
    match = re.search(r"move mip 0 too: (download_image.py .*)", found)
    assert match, found
    run(match[1])
    assert offsets(0) == EXPECTED
    if command == "inspect":
        called(command)()


def test_images_that_were_not_moved_as_their_field_are_refused_with_the_command(run):
    run(field_line())
    run(image_line("1", "24"))
    found = refusal(inspect_dataset, InspectRequest(Path("data")))
    match = re.search(r"with --field_dset: (download_image.py .*)", found)
    assert match, found
    export = ["export-fields", "--dataset_path", "data", "--dst_path", "out"]
    export += ["--checkpoint_name", "precomputed", "--warped", "warped"]
    assert "was moved by (0, 0), its field by (10, -8)" in refusal(main, export)
    run(match[1])
    assert offsets(1) == EXPECTED
    inspect_dataset(InspectRequest(Path("data")))
    main(export)


def test_fields_of_src_alone_know_the_images_that_they_were_made_of(run):
    run(field_line())
    run(image_line("1", "24", MOVE))
    images = ImageSet(Path(f"data/{PLACE}_MIP1.h5"))
    frames = [
        PairLocation(
            images.grid(i), images.sections(i), tuple(map(tuple, offsets(1)[i]))
        )
        for i in range(2)
    ]
    path = Path(f"data/field_0_{PLACE}_MIP1_mine.h5")
    vectors = [np.zeros((2, *images.shape), np.float32)] * 2
    write_field_set(path, vectors, FieldSetMeta(frames, "", "", {}, tag="mine"))
    assert open_prior(images, 1, "mine").num_sides == 1
    run(image_line("1", "24", "--overwrite"))
    found = refusal(open_prior, ImageSet(images.path), 1, "mine")
    assert "(10, -8) was taken out of pair 0" in found
