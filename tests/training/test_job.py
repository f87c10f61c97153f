from pathlib import Path

import torch
from msgspec.structs import replace

from metroem.data.dataset import Split
from metroem.specs.pyramid import ModuleSpec
from metroem.specs.schedule import Phase
from metroem.training.job import StageJob, TrainingSettings


def phases_of(*phases):
    settings = TrainingSettings("ck", torch.device("cpu"), 0, None, 0, "fp32")
    module = ModuleSpec(0, 1, "x", Path())
    job = StageJob(module, phases, Split([], []), settings)
    return job.fingerprint()["the phases of the schedule"]


def test_states_of_earlier_programs_know_the_phases_that_they_were_made_with():
    # As version 1.0.0 wrote it, but for the rules, which are those of today.
    phase = Phase(0.001, 2, 5.0, similarity_rules=(), smoothness_rules=())
    before = (
        "Phase(lr=0.001, num_epochs=2, smoothness=5.0, num_samples=None, "
        "print_every=1, crop_size=1024, batch_size=None, lr_schedule='constant', "
        "warmup_steps=0, "
        f"max_grad_norm=None, losses={phase.losses!r}, similarity_rules=(), "
        "smoothness_rules=(), augmentations=())"
    )
    assert phases_of(phase) == [before]


def test_an_update_has_the_pairs_of_all_its_batches():
    settings = TrainingSettings("ck", torch.device("cpu"), 0, None, 0, "fp32")
    phase = Phase(0.001, 2, 5.0, batch_size=3, accumulate=4)
    assert settings.batch_of(phase) == 3 and settings.pairs_of_update(phase) == 12
    assert phases_of(phase) != phases_of(replace(phase, accumulate=1))
    assert phases_of(phase) != phases_of(replace(phase, ema=0.5))
