"""Test that the modes `classic` and `classic_finetune` are the original's schedules.

The values are those of `metroem/params/scratch.json` and `finetune.json` of the
original's repository (seung-lab/metroem at eceffd74 and 9525e492); its packages on PyPI
have none. Of a metric loss without `pre_align_weight` it took 0.7.
"""

import pytest
import torch

from metroem.data.sample import Sample, seeded_generator
from metroem.imaging.mask_rules import MaskRule, MaskRules
from metroem.models.types import Prediction
from metroem.specs.augmentations import RandomSrcTgtSwap, RandomTranspose, RandomWarp
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase, load_schedule
from metroem.training.phase_loss import phase_loss

SWAPS = (RandomTranspose(0.5), RandomSrcTgtSwap(0.5))


def shift(prob, max_disp):
    return RandomWarp(prob, 0, -8, max_disp, False, False)


def data_of(side, mask_value=0.0):
    return MaskRule(side, 0, "neq", 0.0, (0.0, 0.0), mask_value, ((1, 0.0),))


SIMILARITY = MaskRules((data_of("src"),), (data_of("tgt"),))
SMOOTHNESS = MaskRules((data_of("src", 1e-5),), (data_of("tgt"),))
PLAIN = LossSpec("plain")

# Mode, mip: lr, epochs, smoothness, loss, augmentations of each phase.
PHASES = {
    ("classic", 3): [
        (3e-5, 100, 15, PLAIN, ()),
        (3e-5, 4000, 15, LossSpec("metric", (0,), 32, 0.7), ()),
    ],
    ("classic", 4): [
        (3e-5, 100, 15, PLAIN, ()),
        (3e-5, 4000, 15, LossSpec("metric", (0,), 32, 0.7), ()),
    ],
    ("classic", 5): [
        (3e-5, 100, 25, PLAIN, ()),
        (3e-5, 4000, 25, LossSpec("metric", (0,), 32, 0.8), ()),
    ],
    ("classic", 6): [
        (3e-5, 100, 50, PLAIN, (*SWAPS, shift(1.0, 8))),
        (3e-5, 4000, 50, LossSpec("metric", (0,), 32, 0.9), (*SWAPS, shift(1.0, 8))),
    ],
    ("classic", 7): [
        (3e-5, 100, 100, PLAIN, ()),
        (3e-5, 4000, 100, LossSpec("metric", (0,), 16, 0.9), (*SWAPS, shift(0.8, 8))),
    ],
    ("classic_finetune", 4): [
        (1e-5, 500, 15, LossSpec("metric", (0,), 32, 0.7), ()),
    ],
    ("classic_finetune", 5): [
        (1e-5, 500, 25, LossSpec("metric", (0,), 32, 0.7), ()),
    ],
    ("classic_finetune", 6): [
        (3e-5, 4000, 50, LossSpec("metric", (0,), 32, 0.7), (*SWAPS, shift(1.0, 12))),
    ],
    ("classic_finetune", 7): [
        (5e-6, 4000, 100, LossSpec("metric", (0,), 16, 0.7), (*SWAPS, shift(0.8, 8))),
    ],
}


@pytest.mark.parametrize(("mode", "mip"), PHASES)
def test_each_value_is_that_of_the_original(mode, mip):
    expected = [
        Phase(
            lr=lr,
            num_epochs=num_epochs,
            smoothness=smoothness,
            losses=(loss,),
            augmentations=augmentations,
            similarity_rules=SIMILARITY,
            smoothness_rules=SMOOTHNESS,
        )
        for lr, num_epochs, smoothness, loss, augmentations in PHASES[mode, mip]
    ]

    assert list(load_schedule(mode, None).phases[mip]) == expected


@pytest.mark.parametrize("mode", ["classic", "classic_finetune"])
def test_it_has_the_mips_of_the_original_and_no_others(mode):
    assert sorted(load_schedule(mode, None).phases) == [
        m for n, m in PHASES if n == mode
    ]


@pytest.mark.parametrize(("mode", "mip"), PHASES)
@pytest.mark.parametrize("blank", ["src", "tgt"])
def test_a_field_may_tear_where_a_section_has_no_data(mode, mip, blank):
    rows, cols = 90, 130  # more than the border of 32 px that losses leave out
    image = torch.randn(1, 1, rows, cols, generator=seeded_generator(3)) + 9
    hole = torch.zeros_like(image, dtype=torch.bool)
    hole[..., 40:50, 40:80] = True
    # Torn inside of the hole alone: beyond its border nothing moves.
    field = torch.zeros(1, 2, rows, cols)
    field[..., 43:47, 43:77] = 4.0
    phase = load_schedule(mode, None).phases[mip][0]
    embedding = type("Embedding", (), {"src": image.expand(-1, 2, -1, -1)})
    embedding.tgt = embedding.src

    def rigidity(**sides):
        sample = Sample(
            **({"src": image, "tgt": image} | sides), prior_field=None, pair=()
        )
        prediction = Prediction(field, {0: embedding})
        return float(
            phase_loss(phase, sample, prediction, seeded_generator(0)).rigidity
        )

    seen = rigidity()
    assert seen > 0.01
    assert rigidity(**{blank: torch.where(hole, 0.0, image)}) < 1e-4 * seen
