"""Files of version 1.0.0: data, fields and weights are read, a half-done run refused.

`fixtures/version_1_0_0.zip` holds what commit a702686 of 2026-11-22, the day of 1.0.0,
wrote: images and fields by formula, weights by formula with the field that they make, a
training that was stopped after its first step, and the figures of another.
"""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import train
from metroem.aligner import Aligner
from metroem.errors import CheckpointError, DatasetError
from metroem.evaluation.report.curves import read_curves
from metroem.io.h5 import FieldSet, ImageSet, verify
from metroem.utils import format_versions

FIXTURE = Path(__file__).parent / "fixtures" / "version_1_0_0.zip"
IMAGES = "x8_y-4_z5_MIP1_a.h5"
FIELDS = "field_0_x8_y-4_z5_a_MIP1_{}.h5"
ROWS, COLS, PAIRS = 48, 64, 6
VECTORS = (1.5, -2.25)  # along cols, along rows: whole hundredths of a pixel


def section(z: int) -> np.ndarray:
    """(ROWS, COLS) float32: pixels by formula, in few distinct values; none is 0."""
    rows, cols = np.meshgrid(np.arange(ROWS), np.arange(COLS), indexing="ij")
    return ((rows + 2 * cols + 3 * z) % 7 / 4 - 0.8).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    shutil.unpack_archive(FIXTURE, tmp_path)
    return tmp_path


def test_images_are_read(folder):
    images = ImageSet(folder / "data" / IMAGES)
    assert (len(images), images.shape, images.mip) == (PAIRS, (ROWS, COLS), 1)
    assert images.normalization == {"kind": "tissue"}
    for index in range(PAIRS):
        pair, z = images.read(index), 5 + index
        np.testing.assert_array_equal(pair.src, section(z))
        np.testing.assert_array_equal(pair.tgt, section(z - 1))
        assert images.box(index, 1) == (8, -4, z - 1, 8 + 2 * ROWS, 2 * COLS - 4, z)
        assert images.has_tissue(index)
    assert images.read_defects(0) is None
    assert verify(images.path) == []


def test_fields_are_read(folder):
    expected = np.broadcast_to(np.array(VECTORS)[:, None, None], (2, ROWS, COLS))
    between = FieldSet(folder / "data" / FIELDS.format("between"))
    loaded = FieldSet(folder / "data" / FIELDS.format("down"))
    assert (between.num_sides, loaded.num_sides) == (1, 2)
    for index in range(PAIRS):
        for fields, side, sign in ((between, 0, 1), (loaded, 0, 1), (loaded, 1, -1)):
            found = fields.read(index, side)
            np.testing.assert_allclose(found, sign * expected, atol=1e-6)
    assert verify(between.path) == verify(loaded.path) == []


def test_weights_are_loaded(folder):
    (module,) = (folder / "pyramid").glob("0_*")
    net = Aligner(module / "model", checkpoint_name="given", finetune=False).net
    for weight in net.parameters():
        expected = torch.linspace(-0.1, 0.1, weight.numel()).reshape(weight.shape)
        assert torch.equal(weight.data, expected)


def test_weights_make_the_field_that_they_made(folder):
    (module,) = (folder / "pyramid").glob("0_*")
    model = module / "model"
    made = np.load(model / "given.npy")  # each fourth pixel
    assert np.abs(made).max() > 0.01
    aligner = Aligner(model, checkpoint_name="given", operators="corrected")
    src, tgt = (torch.from_numpy(section(z))[None, None] for z in (5, 4))
    with torch.no_grad():
        found = aligner.predict(src, tgt).field[0].numpy()
    # px; convolutions are summed in another order on another machine.
    np.testing.assert_allclose(found[..., ::4, ::4], made, atol=1e-4)


def test_figures_are_read(folder):
    curves = {curve.figure: curve for curve in read_curves(folder / "metrics.jsonl")}
    # An epoch of each of two phases.
    assert curves["loss"].phases == (0, 1)
    assert np.isfinite(curves["loss"].values["training"]).all()


def test_a_half_done_training_is_refused_until_it_is_begun_again(folder):
    path = folder / "pyramid" / ".train" / "ck" / "stage_0.state.pt"
    arguments = [
        *("--pyramid_path", str(folder / "pyramid")),
        *("--dataset_path", str(folder / "data")),
        *("--train_mode", "custom"),
        *("--train_params_path", str(folder / "schedule.json")),
        *("--device", "cpu", "--checkpoint_name", "ck", "--val_pairs", "1"),
    ]
    with pytest.raises(CheckpointError) as refused:
        train.main(arguments)
    assert str(refused.value) == (
        f"{path}: a training that MetroEM 1.0.0 began, which this version cannot "
        "resume: finish it with MetroEM 1.0.0, or begin it again with --restart. "
        "What it has trained can be used: leave its stage out (--train_stages)"
    )
    train.main([*arguments, "--restart"])
    assert torch.load(path, weights_only=True)["phase"] == 2
    (field,) = (folder / "data").glob("field_0_*_ck.h5")
    assert np.isfinite(FieldSet(field).read(0)).all()


def test_newer_images_are_refused(folder):
    path = folder / "data" / IMAGES
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = format_versions.SETS + 1
    with pytest.raises(DatasetError, match="version 2, .* up to 1; .*upgrade metroem"):
        ImageSet(path)
