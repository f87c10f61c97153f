"""Test fields of a trained pyramid for other data sets, and for replaced data."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

import train
from metroem.__main__ import main
from metroem.errors import (
    CheckpointError,
    DatasetError,
    MetroEMError,
    StorageError,
    UsageError,
)
from metroem.geometry.field import resample_field
from metroem.geometry.grid import Grid
from metroem.io import files
from metroem.io.h5 import (
    FieldSet,
    FieldSetMeta,
    ImageSet,
    PairLocation,
    write_field_set,
)
from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from metroem.prepare.inspect import inspect_dataset
from metroem.prepare.requests import InspectRequest
from metroem.training import write_fields as writing
from tests.export.sets import export
from tests.pairs import write_pairs

LEVEL = {"features": 4, "blocks": 0, "radius": [1], "hidden": 4, "dilations": [1]}
NET = {"type": "correlation", "levels": [LEVEL, LEVEL]}
SHAPE = (64, 80)
FIRST = "field_0_x0_y0_z1_MIP0_ck.h5"
LAST = "field_1_x0_y0_z1_MIP0_ck.h5"
COARSE, FINE = "x0_y0_z1_MIP1.h5", "x0_y0_z1_MIP0.h5"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pyramid of two stages with random weights, and pairs at both mips."""
    folder = tmp_path_factory.mktemp("made")
    for stage, module in enumerate(init_pyramid(folder / "pyramid", [1, 0])):
        (module / "model" / "model_spec.json").write_text(json.dumps(NET))
        torch.manual_seed(stage)
        load_module(module, checkpoint_name="ck").aligner.save_checkpoint(
            module / "model"
        )
    write_pairs(folder / "data", mips=(1, 0), num_pairs=3, shape=SHAPE)
    phase = {"lr": 1e-3, "num_epochs": 1, "smoothness": 5, "crop_size": 32}
    (folder / "schedule.json").write_text(json.dumps({"0": [phase]}))
    return folder


@pytest.fixture
def true_place(made, tmp_path):
    """A copy of it for one test."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def place(true_place, monkeypatch):
    """The same, where fields are a formula of images and prior: networks take long."""

    def field_of(aligner, sources, sample, index):
        field = 0.25 * torch.cat([sample.src, sample.tgt], 1)
        if sample.prior_field is not None:
            field = field + sample.prior_field
        grids = (one.grid(index) for one in (sources.images, sources.target))
        return resample_field(field, *grids)[0].numpy(), None

    monkeypatch.setattr(writing, "_field_of", field_of)
    return true_place


def write_fields(place, *flags):
    words = ["--pyramid_path", place / "pyramid", "--dataset_path", place / "data"]
    words += ["--checkpoint_name", "ck", "--device", "cpu", *flags]
    main(["write-fields", *map(str, words)])


def run_train(place, *flags):
    words = ["--pyramid_path", place / "pyramid", "--dataset_path", place / "data"]
    words += ["--train_mode", "custom", "--train_params_path", place / "schedule.json"]
    words += ["--checkpoint_name", "ck", "--device", "cpu", "--val_pairs", "0", *flags]
    train.main([str(word) for word in words])


def written(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stamps(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("field_*")}


def change_images(path, *, pairs=slice(None)):
    """Other images under the same name, as a download with --overwrite leaves them."""
    with h5py.File(path, "r+") as file:
        if "checksum" in file:
            sums = file["checksum"][:]
            sums[pairs] += 1
            file["checksum"][:] = sums
        file["img" if "img" in file else "main"][pairs] *= -0.5


def forget(path, *keys):
    """Leave of a field set what version 1.0.0 wrote."""
    with h5py.File(path, "r+") as file:
        request = json.loads(file.attrs["request"])
        file.attrs["request"] = json.dumps(
            {key: value for key, value in request.items() if key not in keys}
        )


def test_a_pyramid_writes_the_fields_of_data_that_it_was_not_trained_on(place):
    before = written(place / "pyramid")
    write_fields(place)
    # Its weights and its states are as they were, and nothing lies beside them.
    assert written(place / "pyramid") == before
    assert sorted(stamps(place / "data")) == [FIRST, LAST]
    for name, module in ((FIRST, "0_mip1in"), (LAST, "1_mip0in")):
        fields = FieldSet(place / "data" / name)
        assert fields.shape == SHAPE and len(fields) == 3
        (weights,) = (place / "pyramid").glob(f"{module}*/model/ck.state.pth.tar")
        sha = hashlib.sha256(weights.read_bytes()).hexdigest()
        assert fields.request["weights_sha256"] == sha
        assert sha in fields.attributes["source_path"]
    assert set(FieldSet(place / "data" / FIRST).request["data"]) == {COARSE}
    assert set(FieldSet(place / "data" / LAST).request["data"]) == {COARSE, FINE}
    export(place / "data", place / "out", "--checkpoint_name", "ck", *RESOLUTION)
    assert (place / "out" / "info").is_file()


RESOLUTION = ("--resolution", 4, 4, 40)


def test_train_py_without_a_stage_to_train_writes_the_same_fields(true_place):
    place = true_place
    write_fields(place, "--fields_path", place / "fields")
    before = written(place / "pyramid")
    run_train(place, "--train_stages", "--no_redirect_stdout")
    assert written(place / "pyramid") == before
    for name in (FIRST, LAST):
        one, other = (FieldSet(place / f / name) for f in ("data", "fields"))
        assert one.request == other.request
        for index in range(3):
            np.testing.assert_array_equal(one.read(index), other.read(index))


def test_what_is_written_is_left_and_a_stopped_run_is_gone_on_with(place, monkeypatch):
    made_now, field_of = [], writing._field_of

    def counted(aligner, sources, sample, index):
        if len(made_now) == 2:
            raise KeyboardInterrupt
        made_now.append(index)
        return field_of(aligner, sources, sample, index)

    monkeypatch.setattr(writing, "_field_of", counted)
    with pytest.raises(KeyboardInterrupt):
        write_fields(place, "--stages", 0)
    made_now.clear()
    write_fields(place, "--stages", 0)
    assert made_now in ([1, 2], [2])  # one may have been made and not kept
    made_now.clear()
    before = stamps(place / "data")
    write_fields(place, "--stages", 0)
    assert made_now == [] and stamps(place / "data") == before


def test_fields_of_replaced_images_are_written_again_and_no_others(place):
    write_fields(place)
    before = stamps(place / "data")
    change_images(place / "data" / FINE)
    write_fields(place)
    after = stamps(place / "data")
    # Those of stage 0 are of the coarse images alone.
    assert after[FIRST] == before[FIRST] and after[LAST] != before[LAST]
    change_images(place / "data" / COARSE, pairs=1)
    write_fields(place)
    last = stamps(place / "data")
    assert last[FIRST] != after[FIRST] and last[LAST] != after[LAST]


def test_fields_of_other_weights_are_written_again(place):
    write_fields(place)
    before = stamps(place / "data")
    (module,) = (place / "pyramid").glob("0_*")
    path = module / "model" / "ck.state.pth.tar"
    weights = torch.load(path, weights_only=True)
    torch.save({key: 2 * value for key, value in weights.items()}, path)
    for flags in (["--train_stages", "1"], ["--train_stages"]):
        with pytest.raises(DatasetError, match=f"{FIRST}: written by other weights"):
            run_train(place, *flags, "--generate_field_stages", "1")
    with pytest.raises(DatasetError, match="write-fields. 0 1"):
        write_fields(place, "--stages", 1)
    write_fields(place)
    assert all(stamps(place / "data")[name] != before[name] for name in before)


@pytest.mark.parametrize("is_earlier", [False, True])
def test_with_more_sections_the_same_command_writes_all_fields(place, is_earlier):
    write_fields(place)
    if is_earlier:
        for name in (FIRST, LAST):
            forget(place / "data" / name, "data", "place")
    write_pairs(place / "data", mips=(1, 0), num_pairs=4, shape=SHAPE)
    with pytest.raises(DatasetError, match="write the fields again: .*write-fields"):
        write_fields(place, "--stages", 1)
    write_fields(place)
    for name in (FIRST, LAST):
        assert len(FieldSet(place / "data" / name)) == 4


@pytest.mark.parametrize("is_earlier", [False, True])
def test_fields_of_images_that_lie_elsewhere_now_are_written_again(place, is_earlier):
    write_fields(place, "--stages", 0)
    if is_earlier:
        forget(place / "data" / FIRST, "data", "place")
    with h5py.File(place / "data" / FINE, "r+") as file:
        file["box"][:, :, [0, 3]] += 4  # mip-0 pixels along x
    with pytest.raises(DatasetError, match="or lie elsewhere.*write-fields"):
        export(place / "data", place / "out", "--checkpoint_name", "ck", *RESOLUTION)
    write_fields(place, "--stages", 0)
    assert FieldSet(place / "data" / FIRST).grid(0) == Grid(0, 4, 0, *SHAPE)


def test_fields_of_version_1_0_0_are_left_alone(place):
    write_fields(place)
    for name in (FIRST, LAST):
        forget(place / "data" / name, "data", "place")
    before = stamps(place / "data")
    write_fields(place)
    assert stamps(place / "data") == before
    export(place / "data", place / "out", "--checkpoint_name", "ck", *RESOLUTION)
    inspect_dataset(InspectRequest(place / "data"))


def test_images_of_the_original_are_known_by_what_they_hold(place):
    for name in (COARSE, FINE):
        images = [np.stack(ImageSet(place / "data" / name).read(i)) for i in range(3)]
        (place / "data" / name).unlink()
        with h5py.File(place / "data" / name, "w") as file:
            file["main"] = np.stack(images)
    write_fields(place)
    before = stamps(place / "data")
    write_fields(place)
    assert stamps(place / "data") == before
    change_images(place / "data" / FINE, pairs=2)
    write_fields(place)
    after = stamps(place / "data")
    assert after[FIRST] == before[FIRST] and after[LAST] != before[LAST]


def test_parts_of_other_images_are_not_gone_on_with(place, monkeypatch):
    joined = writing.FieldSetWriter.join
    monkeypatch.setattr(
        writing.FieldSetWriter,
        "join",
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        write_fields(place, "--stages", 0)
    monkeypatch.setattr(writing.FieldSetWriter, "join", joined)
    other = place / "other"
    shutil.copytree(place / "data", other)
    for folder in (place / "data", other):
        change_images(folder / COARSE)
    shutil.rmtree(other / f".{FIRST}.parts")
    write_fields(place, "--stages", 0)
    write_fields(place, "--stages", 0, "--dataset_path", other)
    one, two = (FieldSet(folder / FIRST) for folder in (place / "data", other))
    for index in range(3):
        np.testing.assert_array_equal(one.read(index), two.read(index))


def test_fields_of_other_images_are_not_served(place):
    write_fields(place, "--fields_path", place / "fields")
    where = ("--fields_path", place / "fields", "--checkpoint_name", "ck", *RESOLUTION)
    export(place / "data", place / "before", *where)
    inspect_dataset(InspectRequest(place / "data", fields_path=place / "fields"))
    change_images(place / "data" / COARSE)
    with pytest.raises(DatasetError) as refused:
        export(place / "data", place / "out", *where)
    assert f"{LAST}: made from other data than {COARSE} holds now" in str(refused.value)
    assert not (place / "out").exists()
    with pytest.raises(DatasetError, match=f"{FIRST}: made from other data than"):
        inspect_dataset(InspectRequest(place / "data", fields_path=place / "fields"))
    # The command that the message gives makes them again.
    _, command = str(refused.value).split("write the fields again: ")
    words = shlex.split(command)
    assert words[0] == "metroem"
    main([*words[1:], "--device", "cpu"])
    export(place / "data", place / "out", *where)


def downloaded_field(place, value):
    """A field that takes the place of stage 0."""
    images = ImageSet(place / "data" / FINE)
    field = np.full((2, 2, *SHAPE), value, np.float32)
    frames = [PairLocation(images.grid(i), images.sections(i)) for i in range(3)]
    meta = FieldSetMeta(frames, "test", "", {"cv_path": "a"}, tag="ck", num_sides=2)
    write_field_set(place / "data" / FIRST, [field] * 3, meta)


def test_fields_that_start_from_a_replaced_download_are_made_again(place):
    downloaded_field(place, 0.5)
    write_fields(place, "--stages", 1, "--fields_path", place / "fields")
    before = stamps(place / "fields")
    write_fields(place, "--stages", 1, "--fields_path", place / "fields")
    assert stamps(place / "fields") == before
    downloaded_field(place, 0.75)
    where = ("--fields_path", place / "fields", "--checkpoint_name", "ck", *RESOLUTION)
    with pytest.raises(DatasetError, match=f"than {FIRST} holds now; .* --stages 1 "):
        export(place / "data", place / "out", *where)
    write_fields(place, "--stages", 1, "--fields_path", place / "fields")
    assert stamps(place / "fields") != before
    assert list(stamps(place / "data")) == [FIRST]


def test_a_download_is_not_written_over(place):
    downloaded_field(place, 0.5)
    with pytest.raises(DatasetError, match="was not made by this program's training"):
        write_fields(place)


def test_stages_without_weights_are_named_before_any_work(place):
    (module,) = (place / "pyramid").glob("1_*")
    (module / "model" / "ck.state.pth.tar").unlink()
    with pytest.raises(CheckpointError, match=r"1_mip0in.*there are: none.*stage 1"):
        write_fields(place)
    assert not stamps(place / "data")
    with pytest.raises(CheckpointError, match=r"typo.*\(there are: ck\)"):
        write_fields(place, "--checkpoint_name", "typo")


def test_weights_that_are_replaced_while_they_are_loaded_are_refused(
    place, monkeypatch
):
    load = writing.load_module

    def replaced(path, **more):
        module = load(path, **more)
        (path / "model" / "ck.state.pth.tar").write_bytes(b"another epoch")
        return module

    monkeypatch.setattr(writing, "load_module", replaced)
    with pytest.raises(CheckpointError, match="replaced while it was read"):
        write_fields(place, "--stages", 0)
    assert not stamps(place / "data")


def test_a_stage_needs_no_images_of_the_stage_before(place):
    write_fields(place, "--stages", 0)
    (place / "data" / COARSE).unlink()
    inspect_dataset(InspectRequest(place / "data", place / "pyramid", "ck"))
    run_train(place, "--train_stages", "1")
    assert list(stamps(place / "data")) == [FIRST, LAST]
    assert (place / "pyramid/.train/ck/stage_1.state.pt").is_file()


def test_a_training_that_writes_no_fields_needs_no_images_of_the_next_stage(place):
    (place / "data" / FINE).unlink()
    run_train(place, "--train_stages", "0", "--generate_field_stages")
    assert (place / "pyramid/.train/ck/stage_0.state.pt").is_file()
    with pytest.raises(DatasetError, match="no image set at mip 0"):
        run_train(place, "--train_stages", "0")


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--train_stages", "--generate_field_stages"), "nothing to do"),
        (("--train_stages", "--restart"), "no training to begin"),
        (("--checkpoint_name", ".."), r"--checkpoint_name \.\.: "),
        (("--checkpoint_name", "."), r"--checkpoint_name \.: "),
    ],
)
def test_flags_that_cannot_work_together_are_refused(place, flags, match):
    before = written(place)
    with pytest.raises(UsageError, match=match):
        run_train(place, *flags)
    assert written(place) == before


@pytest.mark.parametrize(
    "command", [["evaluate", "--dataset_path", "data"], ["inspect", "data"]]
)
def test_no_command_takes_a_checkpoint_name_that_is_another_folder(place, command):
    where = ["--pyramid_path", str(place / "pyramid"), "--checkpoint_name", ".."]
    with pytest.raises(UsageError, match="another folder"):
        main([*command, *where])


def test_a_data_set_that_is_read_only_is_trained_on(place, monkeypatch):
    before = written(place / "data")
    refuse(monkeypatch, place / "data")
    run_train(place, "--fields_path", place / "fields")
    assert written(place / "data") == before
    assert sorted(stamps(place / "fields")) == [FIRST, LAST]
    # Stage 1 started from the fields that stage 0 wrote there.
    first, last = (FieldSet(place / "fields" / name).request for name in (FIRST, LAST))
    assert last["prior"]["weights_sha256"] == first["weights_sha256"]


def refuse(monkeypatch, folder):
    """Make a folder refuse files, for root too."""
    make = files.tempfile.TemporaryFile

    def made(*, dir):
        if dir == folder:
            raise OSError(30, "Read-only file system")
        return make(dir=dir)

    monkeypatch.setattr(files.tempfile, "TemporaryFile", made)


@pytest.mark.parametrize("where", ["data", "pyramid/0_mip1in_correlation/model"])
def test_folders_that_take_no_files_are_named_before_the_training(
    place, monkeypatch, where
):
    refuse(monkeypatch, place / where)
    named = " .--fields_path names" if where == "data" else ""
    with pytest.raises(StorageError, match=f"{where}: Read-only file system.*{named}"):
        run_train(place, "--train_stages", "0")
    assert not list(place.glob("pyramid/.train/ck/stage_0*"))
    # Where nothing is to be written to it, it is not tried.
    if where == "data":
        run_train(place, "--train_stages", "0", "--generate_field_stages")
        before = written(place / "pyramid")
        with pytest.raises(StorageError, match="Read-only"):
            run_train(place, "--train_stages", "0", "--restart", "--no_redirect_stdout")
        after = written(place / "pyramid")
        log = place / "pyramid" / "ck.log"  # of the run before, still open here
        assert after | {log: before[log]} == before


def test_figures_that_cannot_be_written_are_named_before_the_pairs_are_aligned(
    place, monkeypatch
):
    write_pairs(place / "large", mips=(1, 0), num_pairs=1, shape=(160, 192))
    refuse(monkeypatch, place / "out")
    monkeypatch.setattr("metroem.pyramid.Pyramid.load", lambda *_: pytest.fail("late"))
    with pytest.raises(StorageError, match="out: Read-only file system"):
        main(
            ["evaluate", "--pyramid_path", str(place / "pyramid"), "--dataset_path"]
            + [str(place / "large"), "--checkpoint_name", "ck"]
            + ["--json", str(place / "out" / "figures.json")]
        )


def remove_weights(place):
    """Forget the weights, so that a training starts from random weights."""
    for weights in place.glob("pyramid/*/model/ck.state.pth.tar"):
        weights.unlink()


@pytest.mark.parametrize("share", ["finished", "half"])
def test_a_training_does_not_go_on_with_other_images(place, share):
    remove_weights(place)
    zero = ("--train_stages", "0", "--generate_field_stages")
    run_train(place, *zero, *(("--max_minutes", "1e-9") if share == "half" else ()))
    change_images(place / "data" / COARSE, pairs=2)
    with pytest.raises(CheckpointError, match="the images of the pairs are not the"):
        run_train(place, *zero)
    run_train(place, *zero, "--restart")
    run_train(place, *zero)


def test_a_training_does_not_go_on_with_another_download(place):
    one = ("--train_stages", "1", "--generate_field_stages")
    downloaded_field(place, 0.5)
    run_train(place, *one)
    downloaded_field(place, 0.5)
    run_train(place, *one)
    downloaded_field(place, 0.75)
    with pytest.raises(CheckpointError, match="the prior fields of the pairs are not"):
        run_train(place, *one)


def test_a_training_does_not_go_on_with_other_prior_fields(place):
    write_fields(place, "--stages", 0)
    one = ("--train_stages", "1", "--generate_field_stages")
    run_train(place, *one)
    change_images(place / "data" / COARSE)
    with pytest.raises(DatasetError, match=f"{FIRST}: made from other data"):
        run_train(place, *one)
    write_fields(place, "--stages", 0)
    with pytest.raises(CheckpointError, match="the prior fields of the pairs are not"):
        run_train(place, *one)


def test_held_out_pairs_are_part_of_what_a_training_is_of(place):
    remove_weights(place)
    write_pairs(place / "data", mips=(1,), num_pairs=4, shape=SHAPE)
    zero = ("--train_stages", "0", "--generate_field_stages", "--val_pairs", "1")
    run_train(place, *zero)
    change_images(place / "data" / COARSE, pairs=3)
    with pytest.raises(CheckpointError, match="the images of the pairs are not the"):
        run_train(place, *zero)


def test_a_set_that_names_what_is_no_set_is_refused(place):
    write_fields(place, "--stages", 0)
    path = place / "data" / FIRST
    for data in (["a"], {"../../etc/passwd": "1"}):
        with h5py.File(path, "r+") as file:
            request = json.loads(file.attrs["request"])
            file.attrs["request"] = json.dumps({**request, "data": data})
        with pytest.raises(MetroEMError, match=f"{FIRST}: says that it was made from"):
            inspect_dataset(InspectRequest(place / "data"))


@pytest.mark.long  # the pages' commands train on two ranks, and write fields
@pytest.mark.slow
def test_two_ranks_write_the_fields_of_one(true_place):
    place = true_place
    write_fields(place, "--fields_path", place / "fields")
    words = [sys.executable, "-m", "metroem", "write-fields", "--device", "cpu"]
    words += ["--pyramid_path", "pyramid", "--dataset_path", "data", "--gpu", "0,1"]
    done = subprocess.run(
        [*words, "--checkpoint_name", "ck"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in (FIRST, LAST):
        one, two = (FieldSet(place / f / name) for f in ("fields", "data"))
        for index in range(3):
            np.testing.assert_allclose(one.read(index), two.read(index), atol=0.02)
