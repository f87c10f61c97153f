"""The finetuner's correction is held to the network's field where it is not sure."""

import pytest
import torch

from metroem.geometry.field import warp
from metroem.imaging.loss_weights import PairMasks
from metroem.models.finetuning import hold_to_network
from tests.pairs import texture

ROWS, COLS, SPACING = 160, 192, 16
INNER = (..., slice(32, -32), slice(32, -32))


def images(noise, shift=0.0, seed=0):
    """Src and tgt, normalised: tgt(p) = src(p + shift along cols), each with noise."""
    generator = torch.Generator().manual_seed(seed)
    src = texture(ROWS, COLS, seed=4)
    field = torch.zeros(1, 2, ROWS, COLS)
    field[:, 0] = shift
    tgt = warp(src, field, padding="border")
    sides = [(one - src.mean()) / src.std() for one in (src, tgt)]
    return [s + noise * torch.randn(s.shape, generator=generator) for s in sides]


def masks(src, tgt, defects=None):
    return PairMasks(src, tgt, None, defects)


def shifted(px):
    """A field of `px` along cols."""
    field = torch.zeros(1, 2, ROWS, COLS)
    field[:, 0] = px
    return field


def kept(found_px, start_px, pair):
    """The fraction of a constant correction that is kept, in the middle."""
    held = hold_to_network(shifted(found_px), shifted(start_px), pair, SPACING)
    fraction = (held[:, :1] - start_px)[INNER] / (found_px - start_px)
    return float(fraction.mean())


def test_a_correction_that_makes_equal_images_agree_is_kept():
    pair = masks(*images(noise=0.0, shift=2.0))

    assert kept(2.0, 1.5, pair) > 0.95


def test_a_small_correction_of_noisy_images_is_taken_back_and_a_large_one_kept():
    pair = masks(*images(noise=1.5, shift=6.0))

    small, large = kept(6.0, 5.7, pair), kept(6.0, -9.0, pair)

    assert small < 0.3 and large > 0.9


def test_a_correction_after_which_images_agree_less_is_taken_back():
    pair = masks(*images(noise=0.3, shift=2.0))

    better, worse = kept(2.0, 5.0, pair), kept(5.0, 2.0, pair)

    assert worse < 0.1 < 0.9 < better


def test_detail_of_a_correction_is_kept():
    pair = masks(*images(noise=1.5))
    waves = torch.sin(torch.arange(COLS) * 2 * torch.pi / 8)  # 8 px: no smooth part
    found = shifted(0.0)
    found[:, 0] = 0.5 * waves

    held = hold_to_network(found, shifted(0.0), pair, SPACING)

    assert (held - found)[INNER].abs().max() < 0.02


def test_v_is_a_tenth_near_defects_unless_they_are_everywhere():
    src, tgt = images(noise=1.2)
    defects = torch.zeros(1, 1, ROWS, COLS, dtype=torch.bool)
    defects[..., :8] = True
    found, start = shifted(0.5), shifted(0.0)

    def v(held):
        return 0.5 * (0.5 / held - 1).sqrt()  # held = 0.5 * 0.5**2 / (0.5**2 + v**2)

    held = hold_to_network(found, start, masks(src, tgt, defects), SPACING)[0, 0]

    # Within 4 distances of control points; at 128 px nothing is changed.
    near, far = v(held[40:-40, 8:56]), v(held[40:-40, 136:])
    assert far.mean() > 0.3
    torch.testing.assert_close(near / far.mean(), torch.full_like(near, 0.1))
    torch.testing.assert_close(far / far.mean(), torch.ones_like(far))
    everywhere = torch.zeros_like(defects)
    everywhere[..., ::60] = True
    held = hold_to_network(found, start, masks(src, tgt, everywhere), SPACING)
    torch.testing.assert_close(v(held[0, 0])[INNER], far.mean().expand(96, 128))


def test_samples_are_held_each_by_its_own_correlation():
    pairs = [images(noise=0.0, shift=0.5), images(noise=1.5, shift=0.5)]
    src, tgt = (torch.cat(side) for side in zip(*pairs, strict=True))
    found, start = shifted(0.5).repeat(2, 1, 1, 1), shifted(0.0).repeat(2, 1, 1, 1)

    together = hold_to_network(found, start, masks(src, tgt), SPACING)

    for index, pair in enumerate(pairs):
        alone = hold_to_network(found[:1], start[:1], masks(*pair), SPACING)
        torch.testing.assert_close(together[index : index + 1], alone)


@pytest.mark.parametrize("side", [0, 1])
def test_images_without_tissue_do_no_harm(side):
    pair = images(noise=0.1)
    pair[side] = torch.zeros_like(pair[side])

    held = hold_to_network(shifted(1.0), shifted(0.0), masks(*pair), SPACING)

    assert torch.isfinite(held).all()
