"""train.py with averaged weights, accumulated gradients and mixed set sizes."""

import json
import shutil

import pytest
import torch

import train
from metroem.errors import MetroEMError
from metroem.models.module_folders import init_pyramid
from tests.models.specs import scalenet, write_spec
from tests.pairs import write_pairs
from tests.test_train import arguments, digest, twin_of

PHASE = {
    "lr": 2e-3,
    "num_epochs": 2,
    "smoothness": 5,
    "crop_size": 48,
    "batch_size": 2,
    "accumulate": 2,
    "ema": 0.9,
    "augmentations": [{"type": "random_transpose"}],
}
ONE_STAGE = ("--train_stages", "0", "--generate_field_stages", "0")


@pytest.fixture
def run(tmp_path):
    """A pyramid of one small module, and two sets of which one has small patches."""
    write_pairs(tmp_path / "data", mips=(1,), num_pairs=6, shape=(96, 112))
    small = {"num_pairs": 6, "shape": (80, 72), "corner": (512, 512)}
    write_pairs(tmp_path / "data", mips=(1,), **small)
    (module,) = init_pyramid(tmp_path / "pyramid", [1], "scalenet")
    write_spec(module / "model", scalenet(4, 6))
    (tmp_path / "schedule.json").write_text(json.dumps({"1": [PHASE, PHASE]}))
    return tmp_path


def weights(run, which):
    state = torch.load(run / "pyramid/.train/ck/stage_0.state.pt", weights_only=True)
    if which == "state":
        return state["net"], state
    return torch.load(
        run / "pyramid/.train/ck" / f"stage_0_{which}.state.pth.tar", weights_only=True
    )


def test_a_run_with_averages_that_was_stopped_ends_with_the_same_bytes(run):
    other = twin_of(run)
    train.main(arguments(other, *ONE_STAGE))
    for _ in range(3):
        train.main(arguments(run, *ONE_STAGE, "--max_minutes", "0.0005"))
    train.main(arguments(run, *ONE_STAGE))
    assert digest(run) == digest(other)


def test_what_is_kept_is_the_average(run):
    train.main(arguments(run, *ONE_STAGE, "--max_epochs", "1"))
    net, state = weights(run, "state")
    last = weights(run, "last")
    # Done: the phase has left its average to the network.
    assert state["phase"] == 2 and all(torch.equal(net[k], last[k]) for k in last)

    plain = twin_of(run)
    for part in ("data", "pyramid"):
        assert (plain / part).is_dir()
    shutil.rmtree(plain / "pyramid/.train")
    (plain / "pyramid/0_mip1in_scalenet/model/ck.state.pth.tar").unlink()
    phases = [{k: v for k, v in PHASE.items() if k != "ema"}] * 2
    (plain / "schedule.json").write_text(json.dumps({"1": phases}))
    train.main(arguments(plain, *ONE_STAGE, "--max_epochs", "1"))
    without = weights(plain, "last")
    assert any(not torch.equal(last[k], without[k]) for k in last)


def test_the_flag_averages_in_all_phases(run):
    twin = twin_of(run)
    phases = [{**PHASE, "ema": None}, {**PHASE, "ema": 0.1}]
    (twin / "schedule.json").write_text(json.dumps({"1": phases}))
    train.main(arguments(run, *ONE_STAGE, "--max_epochs", "1"))
    train.main(arguments(twin, *ONE_STAGE, "--max_epochs", "1", "--ema", "0.9"))
    assert digest(run) == digest(twin)
    with pytest.raises(MetroEMError, match="--ema 1.0: expected 0 <= decay < 1"):
        train.main(arguments(twin, *ONE_STAGE, "--ema", "1"))


def test_activations_computed_again_change_no_weight(run):
    twin = twin_of(run)
    short = (*ONE_STAGE, "--max_epochs", "1")
    train.main(arguments(run, *short))
    train.main(arguments(twin, *short, "--checkpoint_activations"))
    assert digest(run) == digest(twin)
