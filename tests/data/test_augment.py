import pytest
import torch

from metroem.data.augment import (
    augment,
    random_field,
    swap_src_tgt,
    transpose,
    warp_tgt,
)
from metroem.data.sample import Sample, seeded_generator, stack_samples
from metroem.field import warp
from metroem.specs.schedule import RandomSrcTgtSwap, RandomTranspose, RandomWarp

ROWS, COLS = 48, 72


def formula(rows, cols):
    return (torch.sin(rows / 5) + torch.cos(cols / 7) + 3)[None, None]


@pytest.fixture
def sample():
    """tgt is exactly src seen through the prior field."""
    rows, cols = torch.meshgrid(
        torch.arange(float(ROWS)), torch.arange(float(COLS)), indexing="ij"
    )
    d_cols, d_rows = 3 * torch.sin(rows / 15), 2 * torch.cos(cols / 18)
    tgt = formula(rows + d_rows, cols + d_cols)
    prior = torch.stack([d_cols, d_rows])[None]
    return Sample(formula(rows, cols), tgt, prior, ("a",))


def misfit(sample):
    """How much src warped by the prior differs from tgt, off the border."""
    difference = warp(sample.src, sample.prior_field) - sample.tgt
    return float(difference[..., 6:-6, 6:-6].abs().max())


# Bilinear sampling: (1/5**2 + 1/7**2) / 8 grey levels at most.
BILINEAR_ERROR = 0.008


def test_a_transposed_pair_still_fits_its_transposed_field(sample):
    assert misfit(sample) < BILINEAR_ERROR
    turned = transpose(sample)
    assert turned.src.shape[-2:] == (COLS, ROWS)
    assert misfit(turned) < BILINEAR_ERROR


def test_a_swapped_pair_fits_the_inverse_field(sample):
    swapped = swap_src_tgt(sample)
    assert torch.equal(swapped.src, sample.tgt) and torch.equal(swapped.tgt, sample.src)
    assert misfit(swapped) < 2 * BILINEAR_ERROR


def test_a_warp_moves_tgt_alone_and_keeps_no_data(sample):
    tgt = sample.tgt.clone()
    tgt[..., :10, :10] = 0
    options = RandomWarp(min_disp=-3, max_disp=3)
    field = random_field((ROWS, COLS), options, seeded_generator(1))
    warped = warp_tgt(sample._replace(tgt=tgt), options, seeded_generator(1))
    assert torch.equal(warped.src, sample.src)
    assert torch.equal(warped.prior_field, sample.prior_field)
    assert (warped.tgt[..., :5, :5] == 0).all()
    inner = (..., slice(16, -6), slice(16, -6))
    torch.testing.assert_close(warped.tgt[inner], warp(tgt, field)[inner])


@pytest.mark.parametrize("difficulty", [0, 1, 3])
@pytest.mark.parametrize("epicenters", [True, False])
def test_a_random_field_has_its_size_and_range(difficulty, epicenters):
    options = RandomWarp(
        difficulty=difficulty, min_disp=-8, max_disp=12, random_epicenters=epicenters
    )
    field = random_field((33, 50), options, seeded_generator(difficulty))
    assert field.shape == (1, 2, 33, 50)
    assert field.min() >= -8 and field.max() <= 12
    # Smooth: two knots are at least 50 / 2**difficulty px apart along cols.
    steepest = (field[..., 1:] - field[..., :-1]).abs().max()
    assert steepest <= 20 / (33 / 2**difficulty)


def test_chance_is_a_function_of_the_key_alone(sample):
    augmentations = (
        RandomTranspose(0.5),
        RandomSrcTgtSwap(0.5),
        RandomWarp(0.5, randomize_d=True),
    )
    before = torch.get_rng_state()
    once = augment(sample, augmentations, seeded_generator(0, 1, 2, 3))
    again = augment(sample, augmentations, seeded_generator(0, 1, 2, 3))
    others = [
        augment(sample, augmentations, seeded_generator(0, 1, 2, i))
        for i in range(4, 12)
    ]
    assert all(torch.equal(a, b) for a, b in zip(once[:3], again[:3], strict=True))
    assert any(o.src.shape != once.src.shape for o in others)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_stack_to_a_batch(sample):
    batch = stack_samples([sample, sample._replace(pair=("b",))])
    assert batch.src.shape == (2, 1, ROWS, COLS) and batch.pair == ("a", "b")
    assert batch.prior_field is not None and batch.prior_field.shape[0] == 2
    assert stack_samples([sample._replace(prior_field=None)]).prior_field is None
