"""Files that earlier commits of this project wrote, by `make_earlier.py`."""

import shutil

import h5py
import numpy as np
import pytest
import torch

import train
from metroem import versions
from metroem.aligner import Aligner
from metroem.errors import CheckpointError, DatasetError
from metroem.io.h5 import FieldSet, ImageSet, verify
from metroem.report.curves import read_curves
from metroem.training import checkpoint, distributed
from metroem.training.checkpoint import load_state
from tests.compatibility.make_earlier import (
    COLS,
    EARLIER,
    FIXTURES,
    PAIRS,
    ROWS,
    VECTORS,
    arguments,
    given_field,
    section,
)

IMAGES = "x8_y-4_z5_MIP1_a.h5"
FIELDS = "field_0_x8_y-4_z5_a_MIP1_{}.h5"


@pytest.fixture(params=EARLIER)
def folder(request, tmp_path):
    """What one commit wrote."""
    shutil.unpack_archive(FIXTURES / f"{request.param}.zip", tmp_path)
    return tmp_path


def test_images_of_earlier_commits_are_read(folder):
    images = ImageSet(folder / "data" / IMAGES)
    assert (len(images), images.shape, images.mip) == (PAIRS, (ROWS, COLS), 1)
    assert images.normalization == {"kind": "tissue"}
    for index in range(PAIRS):
        pair, z = images.read(index), 5 + index
        np.testing.assert_array_equal(pair.src, section(z))
        np.testing.assert_array_equal(pair.tgt, section(z - 1))
        assert images.box(index, 1) == (8, -4, z - 1, 8 + 2 * ROWS, 2 * COLS - 4, z)
        assert images.has_tissue(index)
    masks = images.read_defects(0)
    assert masks is None or (masks.src.sum(), masks.tgt.sum()) == (10, 10)
    assert verify(images.path) == []


def test_fields_of_earlier_commits_are_read(folder):
    expected = np.broadcast_to(np.array(VECTORS)[:, None, None], (2, ROWS, COLS))
    between = FieldSet(folder / "data" / FIELDS.format("between"))
    loaded = FieldSet(folder / "data" / FIELDS.format("down"))
    assert (between.num_sides, loaded.num_sides) == (1, 2)
    for index in range(PAIRS):
        for fields, side, sign in ((between, 0, 1), (loaded, 0, 1), (loaded, 1, -1)):
            found = fields.read(index, side)
            np.testing.assert_allclose(found, sign * expected, atol=1e-6)
    assert verify(between.path) == verify(loaded.path) == []


def test_weights_of_earlier_commits_are_loaded(folder):
    (module,) = (folder / "pyramid").glob("0_*")
    net = Aligner(module / "model", checkpoint_name="given", finetune=False).net
    for weight in net.parameters():
        wanted = torch.linspace(-0.1, 0.1, weight.numel()).reshape(weight.shape)
        assert torch.equal(weight.data, wanted)


def test_weights_of_earlier_commits_make_the_fields_that_they_made(folder):
    (module,) = (folder / "pyramid").glob("0_*")
    check_field(module / "model")


def check_field(model):
    made = np.load(model / "given.npy")
    assert np.abs(made).max() > 0.01
    # px; convolutions are summed in another order on another machine.
    found = given_field(model)[..., ::4, ::4]
    np.testing.assert_allclose(found, made, atol=1e-4)


@pytest.mark.parametrize("commit", EARLIER[EARLIER.index("cd6cc5d") :])
def test_networks_that_search_make_the_fields_that_they_made(tmp_path, commit):
    shutil.unpack_archive(FIXTURES / f"{commit}.zip", tmp_path)
    check_field(tmp_path / "correlation")


def test_networks_that_search_of_before_their_votes_were_weighed_are_refused(tmp_path):
    shutil.unpack_archive(FIXTURES / "2c41c25.zip", tmp_path)
    with pytest.raises(CheckpointError, match="given.state.pth.tar.*tolerance"):
        given_field(tmp_path / "correlation")


def test_figures_of_earlier_commits_are_read(folder):
    curves = {curve.figure: curve for curve in read_curves(folder / "metrics.jsonl")}
    # An epoch of each of two phases.
    assert curves["loss"].phases == (0, 1)
    assert np.isfinite(curves["loss"].values["training"]).all()


def test_a_training_of_an_earlier_commit_is_gone_on_with(folder):
    path = folder / "pyramid" / ".train" / "ck" / "stage_0.state.pt"
    before = torch.load(path, weights_only=True)
    assert (before["phase"], before["epoch"], before["step"]) == (0, 0, 1)
    train.main(arguments(folder))
    after = torch.load(path, weights_only=True)
    assert after["phase"] == 2
    (field,) = (folder / "data").glob("field_0_*_ck.h5")
    assert np.isfinite(FieldSet(field).read(0)).all()


@pytest.fixture
def state(request, tmp_path):
    """The path of the state of a commit, and its content."""
    shutil.unpack_archive(FIXTURES / f"{request.param}.zip", tmp_path)
    path = tmp_path / "pyramid" / ".train" / "ck" / "stage_0.state.pt"
    return path, torch.load(path, weights_only=True)


def rewritten(state, **settings):
    """A state whose settings are changed, saved, and these settings."""
    path, tree = state
    tree["settings"] = {**tree["settings"], **settings}
    torch.save(tree, path)
    return path, tree["settings"]


PHASES = "the phases of the schedule"


@pytest.mark.parametrize("state", ["2c41c25", "8016db9"], indirect=True)
def test_rules_that_a_schedule_asked_for_stay_those_of_the_state(state, tmp_path):
    # What was the default before masks of tgt were known, now asked for; this commit
    # wrote it with the keys that phases have had since.
    shutil.unpack_archive(FIXTURES / "2c41c25.zip", tmp_path / "later")
    later = tmp_path / "later" / "pyramid" / ".train" / "ck" / "stage_0.state.pt"
    settings = torch.load(later, weights_only=True)["settings"]
    assert "tgt_defects" not in str(settings[PHASES])
    path, _ = state
    assert load_state(path, settings).step == 1
    faster = [phase.replace("lr=0.001", "lr=0.002") for phase in settings[PHASES]]
    with pytest.raises(CheckpointError, match="other settings: the phases"):
        load_state(path, {**settings, PHASES: faster})


@pytest.mark.parametrize("state", ["8016db9", "8ed16c9"], indirect=True)
def test_a_batch_that_was_asked_for_stays_that_of_the_state(state):
    path, settings = rewritten(state, **{"--batch_size": 1})
    assert load_state(path, settings).step == 1
    with pytest.raises(CheckpointError, match="--batch_size was 1, is 3"):
        load_state(path, {**settings, "--batch_size": 3})


@pytest.mark.parametrize("state", ["8ed16c9"], indirect=True)
def test_a_state_that_does_not_say_how_many_ranks_began_it(state, monkeypatch, caplog):
    path, settings = rewritten(state, **{"--batch_size": None})
    now = {**settings, "--batch_size": 2}
    with pytest.raises(CheckpointError, match="--batch_size was None, is 2"):
        load_state(path, now)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(checkpoint, "check_same", lambda *_: None)
    assert load_state(path, now).step == 1
    assert "does not say how many began it" in caplog.text


def test_newer_files_are_refused(tmp_path):
    shutil.unpack_archive(FIXTURES / f"{EARLIER[-1]}.zip", tmp_path)
    path = tmp_path / "data" / IMAGES
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = versions.SETS + 1
    with pytest.raises(DatasetError, match="version 2, .* up to 1; .*upgrade metroem"):
        ImageSet(path)
    path = tmp_path / "pyramid" / ".train" / "ck" / "stage_0.state.pt"
    state = torch.load(path, weights_only=True)
    newer = {"version": versions.STATE + 1, "a key to come": 1}
    torch.save(state | newer, path)
    with pytest.raises(CheckpointError, match="version 2, .* up to 1; .*upgrade"):
        load_state(path, state["settings"])
