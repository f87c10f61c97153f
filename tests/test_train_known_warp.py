"""train.py on sections that it warps itself, whose truth is known."""

import json

import pytest
import torch

import train
from metroem.io.h5 import FieldSet
from metroem.models.module_folders import init_pyramid
from metroem.specs.schedule import load_schedule
from metroem.training import stage
from metroem.training.targets import EarlierStages
from tests.models.specs import CORRELATION, write_spec
from tests.pairs import write_pairs
from tests.test_train import arguments, digest, twin_of

PHASE = {
    "lr": 3e-3,
    "num_epochs": 8,
    "num_samples": 32,
    "smoothness": 0,
    "crop_size": 64,
    "batch_size": 4,
    "lr_schedule": "cosine",
    "warmup_steps": 4,
    "max_grad_norm": 1.0,
    "loss_spec": {"type": "known_warp"},
    "augmentations": [
        {"type": "random_flip"},
        {"type": "known_warp", "peak_px": 4, "shift_px": 4, "tear": 0, "same": 1},
        {"type": "photometric"},
    ],
}
# Pairs as they are: what the network knows by then becomes part of their truth.
PAIRS = {
    **PHASE,
    "lr": 1e-3,
    "num_epochs": 1,
    "augmentations": [{"type": "known_warp", "peak_px": 4, "shift_px": 4, "same": 0.5}],
}


@pytest.fixture
def run(tmp_path):
    """A pyramid of two stages whose pairs lie 3 mip-0 pixels apart."""
    write_pairs(tmp_path / "data", mips=(2, 1), num_pairs=6, shape=(160, 208))
    for path in init_pyramid(tmp_path / "pyramid", [2, 1], "correlation"):
        write_spec(path / "model", CORRELATION)
    (tmp_path / "schedule.json").write_text(json.dumps({"1": [PHASE, PAIRS]}))
    return tmp_path


def metrics(run):
    lines = (run / "pyramid/.train/ck/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_networks_learn_from_sections_that_are_warped(run):
    train.main(arguments(run))

    first, second = (
        [m["validation"]["epe_px"] for m in metrics(run) if m["stage"] == stage]
        for stage in (0, 1)
    )
    assert len(first) == len(second) == 9
    assert first[7] < 0.8 * first[0]
    # The second starts from what the first has learned, at twice the size.
    assert second[7] < second[0] < 2 * first[0]
    # What a loss does not know is null, which is JSON; NaN would not be.
    assert metrics(run)[0]["training"]["similarity"] is None
    assert metrics(run)[0]["validation"]["epe_px"] > 0
    assert "(epe " in (run / "pyramid" / "ck.log").read_text()
    assert FieldSet(run / "data" / "field_1_x0_y0_z1_MIP1_ck.h5").read(0).any()


def first_weights(run):
    """What stage 1 had before its first step, and what stage 0 has."""
    train.main(arguments(run, "--train_stages", "0"))
    found = {}

    class Reached(Exception):
        pass

    def first_step(model, *args, **options):
        found.update(model.net.state_dict())
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "train_step", first_step)
        with pytest.raises(Reached):
            train.main(
                arguments(run, "--train_stages", "1", "--generate_field_stages", "0")
            )
    weights = run / "pyramid/0_mip2in_correlation/model/ck.state.pth.tar"
    return found, torch.load(weights, weights_only=True)


def test_a_stage_without_weights_starts_from_the_stage_before(run, caplog):
    (run / "schedule.json").write_text(json.dumps({"1": [PAIRS]}))
    found, before = first_weights(run)
    assert all(torch.equal(found[name], before[name]) for name in before)
    assert (
        "stage 1: no weights yet; it starts from the weights of stage 0" in caplog.text
    )


def test_a_stage_with_another_network_starts_afresh(run, caplog):
    (run / "schedule.json").write_text(json.dumps({"1": [PAIRS]}))
    levels = [*CORRELATION["levels"], CORRELATION["levels"][1]]
    module = run / "pyramid" / "1_mip1in_correlation" / "model"
    write_spec(module, {**CORRELATION, "levels": levels})
    found, before = first_weights(run)
    assert found.keys() > before.keys() and "starts from the weights" not in caplog.text


@pytest.mark.long
def test_a_run_that_was_stopped_ends_with_the_same_bytes(run):
    other = twin_of(run)
    train.main(arguments(other, "--max_epochs", "1"))

    for _ in range(3):
        train.main(arguments(run, "--max_epochs", "1", "--max_minutes", "0.005"))
    train.main(arguments(run, "--max_epochs", "1"))

    assert digest(run) == digest(other)


@pytest.fixture
def steps(monkeypatch):
    """What each step is given: pairs, rate, earlier stages, and has it a prior."""
    noted = []
    step, add_prior = stage.train_step, EarlierStages.add_prior

    def noting(model, optimizer, batches, *args, **options):
        (sample,) = seen = list(batches)
        done = step(model, optimizer, seen, *args, **options)
        rates = {group["lr"] for group in optimizer.param_groups}
        noted[-1] = (len(sample.src), *rates, *noted[-1])
        return done

    def noting_prior(self, sample):
        sample = add_prior(self, sample)
        noted.append((len(self.aligners), sample.prior_field is not None))
        return sample

    monkeypatch.setattr(stage, "train_step", noting)
    monkeypatch.setattr(EarlierStages, "add_prior", noting_prior)
    return noted


def test_each_step_has_the_size_and_rate_of_the_schedule(run, steps):
    phase = {**PHASE, "num_epochs": 2}
    (run / "schedule.json").write_text(json.dumps({"1": [phase]}))
    train.main(arguments(run, "--val_pairs", "0"))

    (parsed,) = load_schedule("custom", run / "schedule.json").for_mip(1)
    rates = [parsed.rate(step, 16) for step in range(16)]
    assert [step[0] for step in steps] == [4] * 32
    assert [step[1] for step in steps] == rates * 2  # of both stages
    assert [step[2:] for step in steps] == [(0, False)] * 16 + [(1, True)] * 16


def test_the_batch_size_of_the_command_goes_before_that_of_the_schedule(run, steps):
    zero = ("--train_stages", "0", "--generate_field_stages", "0", "--max_epochs", "1")
    train.main(arguments(run, *zero, "--val_pairs", "0", "--batch_size", "16"))
    # 32 samples in each of two phases.
    assert [step[0] for step in steps] == [16] * 4
