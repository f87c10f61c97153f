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
from metroem.specs.augmentations import RandomSrcTgtSwap, RandomTranspose, RandomWarp

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


def mask(*area):
    defects = torch.zeros(1, 1, ROWS, COLS, dtype=torch.bool)
    defects[(..., *area)] = True
    return defects


def test_defects_turn_and_swap_with_their_images(sample):
    src_defects, tgt_defects = mask(slice(4), slice(60)), mask(slice(9), slice(2))
    marked = sample._replace(src_defects=src_defects, tgt_defects=tgt_defects)
    turned, swapped = transpose(marked), swap_src_tgt(marked)
    assert torch.equal(turned.src_defects, src_defects.transpose(-1, -2))
    assert torch.equal(turned.tgt_defects, tgt_defects.transpose(-1, -2))
    assert torch.equal(swapped.src_defects, tgt_defects)
    assert torch.equal(swapped.tgt_defects, src_defects)


def test_a_warp_of_tgt_takes_its_defects_along(sample):
    # Defects are where the image is, so both move alike.
    band = mask(slice(None), slice(30, 38))
    tgt = torch.where(band, 0.0, sample.tgt)
    options = RandomWarp(min_disp=-6, max_disp=6)
    marked = sample._replace(tgt=tgt, src_defects=band, tgt_defects=band)
    moved = warp_tgt(marked, options, seeded_generator(2))
    assert not torch.equal(moved.tgt_defects, band)
    # Off the border, beyond which an image is 0 and a mask goes on.
    inner = (..., slice(6, -6), slice(6, -6))
    assert torch.equal(moved.tgt_defects[inner], (moved.tgt == 0)[inner])
    assert torch.equal(moved.src_defects, band)


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


def test_a_batch_of_which_one_has_defects_has_masks_for_all(sample):
    marked = sample._replace(src_defects=mask(slice(4), slice(60)))
    batch = stack_samples([sample, marked])
    assert batch.src_defects is not None and batch.tgt_defects is None
    assert not batch.src_defects[0].any()
    assert torch.equal(batch.src_defects[1:], marked.src_defects)


def test_a_sample_takes_its_masks_to_a_device(sample):
    marked = sample._replace(tgt_defects=mask(slice(4), slice(60)))
    moved = marked.to(torch.device("meta"))
    assert moved.tgt_defects.device.type == "meta" and moved.src_defects is None
    assert moved.pair == ("a",)
