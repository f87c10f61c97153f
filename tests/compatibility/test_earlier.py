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
from metroem.training.checkpoint import load_state
from tests.compatibility.make_earlier import (
    COLS,
    EARLIER,
    FIXTURES,
    PAIRS,
    ROWS,
    VECTORS,
    arguments,
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


def test_a_training_of_an_earlier_commit_is_gone_on_with(folder):
    path = folder / "pyramid" / ".train" / "ck" / "stage_0.state.pt"
    before = torch.load(path, weights_only=True)
    assert (before["phase"], before["epoch"], before["step"]) == (0, 0, 1)
    train.main(arguments(folder))
    after = torch.load(path, weights_only=True)
    assert after["phase"] == 2
    (field,) = (folder / "data").glob("field_0_*_ck.h5")
    assert np.isfinite(FieldSet(field).read(0)).all()


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
