import numpy as np
import pytest
import torch

from metroem.stack.jumps import (
    MIN_SIGNIFICANCE,
    SEARCH_PX,
    WINDOW_PX,
    measure_jumps,
)
from tests.stack.textures import waves

SIDE = WINDOW_PX


def pair(shift, seed=0):
    """A window and the same texture moved: (1, SIDE, SIDE) each."""
    return (
        torch.from_numpy(waves(SIDE, SIDE, move, seed))[None]
        for move in (shift, (0.0, 0.0))
    )


@pytest.mark.parametrize(
    "shift", [(0.0, 0.0), (3.0, -7.0), (0.5, 0.25), (-11.3, 2.8), (6.0, 15.0)]
)
def test_the_displacement_is_found_to_a_tenth_of_a_pixel(shift):
    src, tgt = pair(shift)
    jumps = measure_jumps(src, tgt)
    assert jumps.matched.item() and not jumps.lost.item()
    # Channel 0 is along cols.
    found = jumps.vectors[0].numpy()[::-1]
    assert np.hypot(*(found - shift)) < 0.1


def test_noise_on_both_sides_does_not_move_the_peak():
    shift = (4.4, -2.7)
    src, tgt = pair(shift)
    noise = torch.from_numpy(np.random.default_rng(1).normal(0, 30, (2, 1, SIDE, SIDE)))
    jumps = measure_jumps((src + noise[0]).float(), (tgt + noise[1]).float())
    assert jumps.matched.item()
    assert np.hypot(*(jumps.vectors[0].numpy()[::-1] - shift)) < 0.15


def test_contrast_and_slow_brightness_do_not_matter():
    shift = (-5.0, 9.0)
    src, tgt = pair(shift)
    slope = torch.arange(SIDE)[:, None].float() * 2
    jumps = measure_jumps(0.3 * src + slope + 10, tgt)
    assert np.hypot(*(jumps.vectors[0].numpy()[::-1] - shift)) < 0.1


def test_blank_pixels_do_not_pull_the_peak():
    shift = (7.0, -4.0)
    src, tgt = pair(shift)
    src[:, :40], tgt[:, :, :50] = 0, 0
    jumps = measure_jumps(src, tgt)
    assert jumps.matched.item()
    assert np.hypot(*(jumps.vectors[0].numpy()[::-1] - shift)) < 0.1


def test_other_tissue_is_lost():
    for seed in range(8):
        src, _ = pair((0, 0), seed=seed)
        _, tgt = pair((0, 0), seed=seed + 100)
        jumps = measure_jumps(src, tgt)
        assert jumps.significance.item() < MIN_SIGNIFICANCE
        assert jumps.lost.item() and not jumps.matched.item()


def test_a_jump_beyond_the_search_is_lost_and_not_cut_off():
    src, tgt = pair((SEARCH_PX + 5.0, 0.0))
    jumps = measure_jumps(src, tgt)
    assert jumps.lost.item() and not jumps.matched.item()


def test_what_has_no_texture_is_neither_matched_nor_lost():
    generator = torch.Generator().manual_seed(0)
    noise = 100 + 30 * torch.rand(2, SIDE, SIDE, generator=generator)
    flat = torch.full((1, SIDE, SIDE), 77.0)
    src = torch.cat([noise[:1], flat, torch.zeros(1, SIDE, SIDE)])
    tgt = torch.cat([noise[1:], flat, flat])
    jumps = measure_jumps(src, tgt)
    assert not jumps.matched.any() and not jumps.lost.any()
    assert bool(torch.isfinite(jumps.vectors).all())


def test_16_bit_grey_levels_give_the_same():
    shift = (2.0, 5.0)
    src, tgt = pair(shift)
    few, many = measure_jumps(src, tgt), measure_jumps(200 * src, 200 * tgt)
    torch.testing.assert_close(few.vectors, many.vectors, atol=2e-3, rtol=0)


def test_windows_of_a_batch_do_not_see_each_other():
    pairs = [tuple(pair(shift, seed)) for seed, shift in enumerate([(3, 1), (-6, 8)])]
    together = measure_jumps(
        *(torch.cat([one[side] for one in pairs]) for side in (0, 1))
    )
    for index, one in enumerate(pairs):
        alone = measure_jumps(*one)
        torch.testing.assert_close(together.vectors[index], alone.vectors[0])
