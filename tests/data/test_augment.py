import pytest
import torch
from msgspec.structs import replace

from metroem.data.augment import (
    augment,
    change_section,
    flip,
    random_field,
    swap_src_tgt,
    transpose,
    warp_tgt,
)
from metroem.data.paint_defects import fold
from metroem.data.sample import Sample, seeded_generator, stack_samples
from metroem.geometry.field import warp
from metroem.specs.augmentations import (
    Crack,
    Defocus,
    Fold,
    Missing,
    Photometric,
    RandomFlip,
    RandomSrcTgtSwap,
    RandomTranspose,
    RandomWarp,
    Stain,
)

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
    changed = transpose(sample)
    assert changed.src.shape[-2:] == (COLS, ROWS)
    assert misfit(changed) < BILINEAR_ERROR


@pytest.mark.parametrize("dims", [(-2,), (-1,), (-2, -1)])
def test_a_flipped_pair_still_fits_its_flipped_field(sample, dims):
    flipped = sample
    for dim in dims:
        flipped = flip(flipped, dim)
    assert torch.equal(flipped.src, sample.src.flip(dims))
    # Exactly what warping gave before, mirrored: the same pixels are blended.
    warped, before = (warp(s.src, s.prior_field) for s in (flipped, sample))
    torch.testing.assert_close(warped, before.flip(dims), atol=1e-4, rtol=0)
    assert misfit(flipped) < BILINEAR_ERROR


def test_every_field_of_a_sample_turns_and_flips_as_the_prior_does(sample):
    prior = sample.prior_field
    known = sample._replace(truth=prior, unwarped_prior=prior)
    for changed in (transpose(known), flip(known, -2), flip(known, -1)):
        assert torch.equal(changed.truth, changed.prior_field)
        assert torch.equal(changed.unwarped_prior, changed.prior_field)


def test_flips_happen_along_rows_and_along_cols(sample):
    flips = (RandomFlip(0.5),)
    srcs = [augment(sample, flips, seeded_generator(i)).src for i in range(20)]
    for dims in ((), (-2,), (-1,), (-2, -1)):
        expected = sample.src.flip(dims) if dims else sample.src
        assert any(torch.equal(src, expected) for src in srcs)


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
    changed, swapped = transpose(marked), swap_src_tgt(marked)
    mirrored = flip(marked, -1)
    assert torch.equal(mirrored.src_defects, src_defects.flip(-1))
    assert torch.equal(mirrored.tgt_defects, tgt_defects.flip(-1))
    assert torch.equal(changed.src_defects, src_defects.transpose(-1, -2))
    assert torch.equal(changed.tgt_defects, tgt_defects.transpose(-1, -2))
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
    # Away from the border, beyond which an image is 0 but a mask is repeated.
    inner = (..., slice(6, -6), slice(6, -6))
    assert torch.equal(moved.tgt_defects[inner], (moved.tgt == 0)[inner])
    assert torch.equal(moved.src_defects, band)


SECTION_CHANGES = (
    Fold(0.5, width_px=8),
    Crack(0.5, width_px=8),
    Missing(0.5),
    Stain(0.5, radius_px=12),
    Defocus(0.5, width_px=30),
    Photometric(0.5),
)


@pytest.mark.parametrize("options", SECTION_CHANGES, ids=lambda o: type(o).__name__)
def test_each_side_draws_its_own_change(sample, options):
    one = replace(options, prob=0.5)
    srcs, tgts = set(), set()
    for seed in range(12):
        changed = augment(sample, (one,), seeded_generator(seed))
        srcs.add(not torch.equal(changed.src, sample.src))
        tgts.add(not torch.equal(changed.tgt, sample.tgt))
        assert torch.equal(changed.prior_field, sample.prior_field)
    assert srcs == tgts == {False, True}
    same = sample._replace(tgt=sample.src)
    both = augment(same, (replace(options, prob=1.0),), seeded_generator(1))
    assert not torch.equal(both.src, both.tgt)


def test_what_damage_hides_joins_the_defects_of_its_side(sample):
    marked = sample._replace(src_defects=mask(slice(5)))
    generators = seeded_generator(3), seeded_generator(3)
    damaged = change_section(marked, "src", Fold(width_px=8), generators[0])
    hidden = fold(sample.src, Fold(width_px=8), generators[1]).hidden
    assert hidden.any() and torch.equal(
        damaged.src_defects, marked.src_defects | hidden
    )
    assert damaged.tgt_defects is None and torch.equal(damaged.tgt, sample.tgt)
    assert change_section(sample, "tgt", Fold(), generators[0]).tgt_defects is not None


def test_the_images_of_a_batch_are_damaged_each_on_its_own(sample):
    batch = stack_samples([sample, sample])
    damaged = change_section(batch, "src", Stain(radius_px=12), seeded_generator(3))
    assert damaged.src.shape == batch.src.shape
    assert not torch.equal(damaged.src[0], damaged.src[1])


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


def test_random_numbers_depend_on_the_key_only(sample):
    augmentations = (
        RandomTranspose(0.5),
        RandomFlip(0.5),
        RandomSrcTgtSwap(0.5),
        RandomWarp(0.5, randomize_d=True),
        *SECTION_CHANGES,
    )
    before = torch.get_rng_state()
    once = augment(sample, augmentations, seeded_generator(0, 1, 2, 3))
    again = augment(sample, augmentations, seeded_generator(0, 1, 2, 3))
    others = [
        augment(sample, augmentations, seeded_generator(0, 1, 2, i))
        for i in range(4, 12)
    ]
    for one, other in zip(once, again, strict=True):
        assert (
            torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        )
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


@pytest.mark.parametrize("randomize", [False, True])
def test_one_knot_without_epicenters_shifts_the_whole_of_tgt(randomize):
    options = RandomWarp(1.0, 0, -8, 12, randomize, random_epicenters=False)
    shifts = []
    for seed in range(20):
        field = random_field((ROWS, COLS), options, seeded_generator(seed))
        spread = field.amax((2, 3)) - field.amin((2, 3))
        assert spread.max() < 1e-5
        shifts.append(field[0, :, 0, 0])
    low, high = torch.stack(shifts).aminmax(dim=0)
    # 20 draws leave less than a third of the range at either end: (2/3)**20 < 4e-4.
    assert (
        (low < -1).all() and (high > 5).all() and low.min() >= -8 and high.max() <= 12
    )
    assert all(abs(float(cols - rows)) > 1e-3 for cols, rows in shifts)


def test_without_epicenters_the_knots_lie_evenly_and_the_field_turns_back_beyond():
    options = RandomWarp(1.0, 1, -8, 8, random_epicenters=False)
    field = random_field((10, 18), options, seeded_generator(4))
    # Knots at rows 2 and 7, at cols 4 and 13.
    top, bottom = (field[..., row, :] for row in (2, 7))

    def at(row, col):
        down, right = (row - 2) / 5, (col - 4) / 9
        left = torch.lerp(top[..., 4], bottom[..., 4], down)
        return torch.lerp(left, torch.lerp(top[..., 13], bottom[..., 13], down), right)

    assert not torch.allclose(at(2, 4), at(7, 13), atol=0.1)
    torch.testing.assert_close(field[..., 3, 6], at(3, 6))
    torch.testing.assert_close(field[..., 0, 6], at(2 * 2 - 0, 6))
    torch.testing.assert_close(field[..., 3, 17], at(3, 2 * 13 - 17))
