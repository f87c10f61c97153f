"""Test pseudo-labels of pairs whose natural field is unknown."""

import pytest
import torch

from metroem.data.known_warp import known_warp
from metroem.data.sample import Sample, seeded_generator, stack_samples
from metroem.geometry.field import compose, invert, pixel_positions, warp
from metroem.imaging.masks import dilate
from metroem.models.types import Prediction
from metroem.specs.augmentations import KnownWarp
from metroem.training.targets import add_pseudo_label

ROWS, COLS = 96, 144
D_COLS, D_ROWS = 4.0, -3.0
WARP = KnownWarp(prob=1, same=0, tear=0, peak_px=8, shift_px=4, knot_px=16)


def position():
    col, row = pixel_positions(torch.zeros(1, 2, ROWS, COLS)).split(1, 1)
    return row, col


def texture(*, d_rows=0.0, d_cols=0.0):
    row, col = position()
    return torch.sin((row + d_rows) / 7) + torch.cos((col + d_cols) / 9) + 3


def natural_field():
    field = torch.tensor([D_COLS, D_ROWS]).view(1, 2, 1, 1)
    return field.repeat(1, 1, ROWS, COLS)


class Knows:
    """A network that finds one natural field, and notes what it was shown.

    It is shown each pair, then each pair swapped.
    """

    def __init__(self, field, back=None):
        self.fields = field, invert(field) if back is None else back
        self.shown = []

    def __call__(self, sample, levels):
        assert not torch.is_grad_enabled() and levels == ()
        self.shown.append(sample)
        num = len(sample.src) // 2
        fields = [field.expand(num, -1, -1, -1) for field in self.fields]
        return Prediction(torch.cat(fields), {})


def unaligned(seed, prior=None):
    """src lies `natural_field` from tgt, and is warped on top of that."""
    tgt = texture(d_cols=D_COLS, d_rows=D_ROWS)
    given = Sample(texture(), tgt, prior, (f"pair {seed}",))
    return known_warp(given, WARP, seeded_generator(seed))


@pytest.mark.parametrize("seed", range(4))
def test_a_natural_field_completes_the_truth(seed):
    known, natural = unaligned(seed), natural_field()
    done = add_pseudo_label(known, Knows(natural), WARP)

    expected = compose(natural, known.truth)
    torch.testing.assert_close(done.truth, expected, atol=1e-3, rtol=0)
    # h at the place in the natural src that belongs to a pixel of tgt.
    expected = natural[..., 3:, :-4] + known.truth[..., :-3, 4:]
    torch.testing.assert_close(done.truth[..., 3:, :-4], expected, atol=2e-3, rtol=0)
    inside = ~dilate(~done.truth_valid, 4)
    error = (warp(done.src, done.truth) - done.tgt).abs()
    # (1/7**2 + 1/9**2) / 8 and some hundredths of a pixel on a slope of 1/7 + 1/9.
    assert inside.float().mean() > 0.4 and error[inside].max() < 0.02
    before = (warp(known.src, known.truth) - known.tgt).abs()
    assert before[inside].mean() > 0.1


def test_an_error_that_is_alike_in_both_directions_is_not_learned():
    known, natural = unaligned(0), natural_field()
    error = torch.tensor([1.5, -2.0]).view(1, 2, 1, 1)
    done = add_pseudo_label(known, Knows(natural + error, error - natural), WARP)
    expected = compose(natural, known.truth)
    torch.testing.assert_close(done.truth, expected, atol=1e-3, rtol=0)


def test_what_moves_to_and_fro_within_some_pixels_is_not_natural():
    row, col = position()
    fro = torch.cat((torch.sin(col / 3), torch.cos(row / 2)), 1)
    known = unaligned(0)
    done = add_pseudo_label(known, Knows(natural_field() + 1.5 * fro), WARP)
    smooth = add_pseudo_label(known, Knows(natural_field()), WARP)
    # exp(-(16 / 3)**2 / 2) is nothing; the borders see half a wave too much.
    inner = (..., slice(36, -36), slice(36, -36))
    off = (done.truth - smooth.truth)[inner]
    assert off.abs().max() < 0.02
    assert torch.equal(done.truth_valid[inner], smooth.truth_valid[inner])


def test_what_is_slower_than_the_warps_is_natural():
    row, col = position()
    slow = torch.cat((torch.sin(row / 90), torch.cos(col / 90)), 1)
    known, natural = unaligned(0), natural_field() + 6 * slow
    done = add_pseudo_label(known, Knows(natural), WARP)
    expected = compose(natural, known.truth)
    # 1 - exp(-(16 / 90)**2 / 2) of 6 px, and at the borders as much again.
    off = (done.truth - expected).abs().amax(1, keepdim=True)
    assert off[done.truth_valid].max() < 0.25 and off.max() < 0.4


def test_a_tear_between_the_sections_is_nothing_to_learn():
    row, col = position()
    jump = 20.0 * (col >= 70)
    known = unaligned(0)
    torn = natural_field() + torch.cat((jump, torch.zeros_like(jump)), 1)
    done = add_pseudo_label(known, Knows(torn), WARP)
    calm = add_pseudo_label(known, Knows(natural_field()), WARP)
    assert not done.truth_valid[..., 66:74].any()
    # Left of it, beyond three deviations of the Gaussian, all is as without it.
    left = (..., slice(None), slice(None, 70 - 3 * 16))
    torch.testing.assert_close(done.truth[left], calm.truth[left], atol=0.1, rtol=0)
    surely = ~dilate(~calm.truth_valid, 1)
    assert done.truth_valid[left][surely[left]].all()


@pytest.mark.parametrize("side", ["src", "tgt"])
def test_what_is_found_where_a_section_shows_nothing_does_not_count(side):
    blank = torch.zeros(1, 1, ROWS, COLS, dtype=torch.bool)
    blank[..., 80:] = True
    given = Sample(texture(), texture(d_cols=D_COLS, d_rows=D_ROWS), None, ("a",))
    given = given._replace(**{side: torch.where(blank, 0, getattr(given, side))})
    known = known_warp(given, WARP, seeded_generator(1))
    # In pixels of tgt: src is blank where it is read from beyond col 80.
    nowhere = blank if side == "tgt" else blank.roll(-int(D_COLS), 3)
    wild = torch.where(nowhere, 30.0, natural_field())
    _, col = position()
    wild_back = torch.where(col >= 80 + D_COLS, 30.0, -natural_field())
    done = add_pseudo_label(known, Knows(wild, wild_back), WARP)
    calm = add_pseudo_label(known, Knows(natural_field()), WARP)
    shown = (..., slice(None), slice(0, 70))
    torch.testing.assert_close(done.truth[shown], calm.truth[shown], atol=0.02, rtol=0)


def test_a_network_that_finds_nothing_but_noise_teaches_nothing():
    noise = 40 * torch.randn(1, 2, ROWS, COLS, generator=seeded_generator(5))
    done = add_pseudo_label(unaligned(0), Knows(noise), WARP)
    assert done.truth_valid.float().mean() < 0.01


def test_the_network_is_shown_the_pair_before_the_warp():
    prior = torch.ones(1, 2, ROWS, COLS)
    known = unaligned(1, prior)
    tgt = texture(d_cols=D_COLS, d_rows=D_ROWS)
    # As a stain or noise would: drawn after the warp, for the trained network only.
    known = known._replace(tgt=known.tgt + 1)
    network = Knows(natural_field())
    done = add_pseudo_label(known, network, WARP)
    (shown,) = network.shown
    assert torch.equal(shown.src, torch.cat((texture(), tgt)))
    assert torch.equal(shown.tgt, torch.cat((tgt, texture())))
    torch.testing.assert_close(shown.prior_field, torch.cat((prior, -prior)))
    assert done.unwarped_src is done.unwarped_tgt is done.unwarped_prior is None
    assert torch.equal(done.prior_field, known.prior_field)
    assert torch.equal(done.src, known.src)


# A network errs by (1.5, -2) px in the orientation that it sees: along cols, rows.
@pytest.mark.parametrize(
    ("orientation", "learned"),
    [
        (0, (1.5, -2.0)),
        (1, (1.5, 2.0)),
        (2, (-1.5, -2.0)),
        (3, (-1.5, 2.0)),
        (4, (-2.0, 1.5)),
        (5, (-2.0, -1.5)),
        (6, (2.0, 1.5)),
        (7, (2.0, -1.5)),
    ],
)
def test_the_network_sees_the_pair_in_an_orientation(orientation, learned):
    known = unaligned(0)
    shape = (COLS, ROWS) if orientation >= 4 else (ROWS, COLS)
    error = torch.tensor([1.5, -2.0]).view(1, 2, 1, 1).expand(1, 2, *shape)
    network = Knows(error, -error)

    done = add_pseudo_label(known, network, WARP, orientation)

    natural = torch.tensor(learned).view(1, 2, 1, 1).expand(1, 2, ROWS, COLS)
    expected = compose(natural, known.truth)
    torch.testing.assert_close(done.truth, expected, atol=1e-3, rtol=0)
    (shown,) = network.shown
    dims = [-2] * (orientation & 1) + [-1] * (orientation >> 1 & 1)
    seen = shown.src[:1].mT if orientation >= 4 else shown.src[:1]
    assert torch.equal(seen.flip(dims), known.unwarped_src)


def test_validity_moves_with_the_natural_field():
    known = unaligned(2)
    valid = torch.zeros_like(known.truth_valid)
    valid[..., 20:40, 50:80] = True
    known = known._replace(truth_valid=valid)
    done = add_pseudo_label(known, Knows(natural_field()), WARP)
    expected = torch.zeros_like(valid)
    expected[..., 23:43, 46:76] = True
    assert torch.equal(done.truth_valid, expected)


def test_each_pair_of_a_batch_gets_its_own_truth():
    pairs = [unaligned(seed) for seed in range(3)]
    network = Knows(natural_field())
    done = add_pseudo_label(stack_samples(pairs), network, WARP)
    assert len(network.shown) == 1
    for i, pair in enumerate(pairs):
        alone = add_pseudo_label(pair, network, WARP)
        torch.testing.assert_close(done.truth[i : i + 1], alone.truth)


def test_a_pair_of_one_section_has_no_natural_field():
    pair, twice = unaligned(0), unaligned(1)
    twice = twice._replace(unwarped_src=torch.zeros_like(twice.src))
    network = Knows(natural_field())
    done = add_pseudo_label(stack_samples([pair, twice]), network, WARP)
    # Nor does the network spend time on it.
    assert [len(shown.src) for shown in network.shown] == [2]
    assert torch.equal(network.shown[0].src[:1], pair.unwarped_src)
    # Sampled in place: positions are rounded by 1e-5 px.
    torch.testing.assert_close(done.truth[1:], twice.truth, atol=1e-3, rtol=0)
    assert torch.equal(done.truth_valid[1:], twice.truth_valid)
    alone = add_pseudo_label(pair, network, WARP)
    torch.testing.assert_close(done.truth[:1], alone.truth)

    network.shown.clear()
    done = add_pseudo_label(twice, network, WARP)
    assert not network.shown and torch.equal(done.truth, twice.truth)
    assert done.unwarped_src is done.unwarped_tgt is done.unwarped_prior is None


def test_an_aligned_pair_is_left_as_it_is():
    sample = Sample(texture(), texture(), None, ("a",))
    assert add_pseudo_label(sample, Knows(natural_field()), None) is sample
