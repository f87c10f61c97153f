"""Test known warps: the truth leads back to the section wherever it is valid."""

import pytest
import torch
import torch.nn.functional as F

from metroem.data.known_warp import known_warp, warp_section
from metroem.data.sample import Sample, seeded_generator
from metroem.geometry.field import (
    compose,
    downsample_field,
    pixel_positions,
    upsample_field,
    warp,
)
from metroem.imaging.masks import dilate
from metroem.specs.augmentations import KnownWarp

ROWS, COLS = 120, 168
UNTORN, TORN = KnownWarp(prob=1, same=0, tear=0), KnownWarp(prob=1, same=0, tear=1)
# The way back is found at every 4th pixel. Waves of 16 px bend it by up to 0.15 px per
# px and px there, so it is off by 4**2 / 8 * 0.15 = 0.3 px between, of which two more
# steps leave half; most of it bends far less.
INVERSE_ERROR_PX, USUAL_ERROR_PX = 0.3, 0.06
# Near the tip of a crack its sides differ by less than a pixel, and a pixel between
# them reads a bit of each.
TIP_ERROR_PX = 0.5
# Of `section`: bilinear sampling errs by (1/7**2 + 1/9**2) / 8, cubic splines by less.
SAMPLING_ERROR, STEEPEST = 0.0042 + 0.001, 1 / 7 + 1 / 9

every_seed = pytest.mark.parametrize("seed", range(8))


def section(*, has_gaps=False):
    rows, cols = torch.meshgrid(
        torch.arange(float(ROWS)), torch.arange(float(COLS)), indexing="ij"
    )
    image = (torch.sin(rows / 7) + torch.cos(cols / 9) + 3)[None, None]
    if has_gaps:
        image[..., :25, :40] = 0
        image[..., 70:78, 60:] = 0
    return image


def make_sample(**given):
    tgt = section(has_gaps=True)
    return Sample(section().flip(-1), tgt, None, ("a",))._replace(**given)


def shrink(mask, pixels):
    """(1, 1, H, W) bool, less what lies within some pixels of where it is False."""
    return ~dilate(~mask, pixels)


def shown_places(warped):
    """(1, 1, H, W) bool: pixels of the section that some pixel of src shows."""
    seen = (warped.image != 0) & ~warped.hidden
    read = (pixel_positions(warped.warp_field) + warped.warp_field)[0].round().long()
    inside = (read[0] >= 0) & (read[0] < COLS) & (read[1] >= 0) & (read[1] < ROWS)
    shown = torch.zeros(1, 1, ROWS, COLS, dtype=torch.bool)
    col, row = read[:, inside & seen[0, 0]]
    shown[0, 0, row, col] = True
    return shown


def steps(field):
    """(1, 1, H, W): the largest change of a field to the pixel below or beside, px."""
    down = (field[..., 1:, :] - field[..., :-1, :]).norm(dim=1, keepdim=True)
    beside = (field[..., 1:] - field[..., :-1]).norm(dim=1, keepdim=True)
    return torch.maximum(F.pad(down, (0, 0, 0, 1)), F.pad(beside, (0, 1)))


@every_seed
@pytest.mark.parametrize(
    ("options", "bound"), [(UNTORN, INVERSE_ERROR_PX), (TORN, TIP_ERROR_PX)]
)
def test_the_way_back_undoes_the_warp(options, bound, seed):
    warped = warp_section(section(has_gaps=True), options, seeded_generator(seed))
    left = compose(warped.field, warped.warp_field).norm(dim=1, keepdim=True)
    assert warped.valid.float().mean() > 0.3
    assert left[warped.valid].max() < bound
    assert (left[warped.valid] > USUAL_ERROR_PX).float().mean() < 0.01


@every_seed
@pytest.mark.parametrize("has_gaps", [False, True])
@pytest.mark.parametrize("options", [UNTORN, TORN])
def test_src_warped_by_the_truth_is_the_section_again(options, has_gaps, seed):
    image = section(has_gaps=has_gaps)
    warped = warp_section(image, options, seeded_generator(seed))
    error = (warp(warped.image, warped.field) - image).abs()
    # Within 4 px of a border or a defect, splines read beyond it.
    touched = warp(dilate(warped.hidden, 4).float(), warped.field) > 0
    inside = shrink(warped.valid, 4) & ~touched
    assert inside.float().mean() > 0.2
    bound = SAMPLING_ERROR + STEEPEST * USUAL_ERROR_PX
    assert (error[inside] > bound).float().mean() < 0.01
    assert error[inside].max() < SAMPLING_ERROR + STEEPEST * INVERSE_ERROR_PX
    # Nor was there anything to be found at rest.
    assert (warped.image - image).abs()[inside].mean() > 0.1


@every_seed
@pytest.mark.parametrize("options", [UNTORN, TORN])
def test_the_truth_is_valid_where_src_shows_the_place_and_only_there(options, seed):
    image = section(has_gaps=True)
    warped = warp_section(image, options, seeded_generator(seed))
    shown = shown_places(warped)
    # Pixels of src lie up to 2 px apart in the section.
    assert not (warped.valid & ~dilate(shown, 2)).any()
    assert warped.valid[shrink(dilate(shown, 1), 4)].float().mean() > 0.97
    assert not warped.valid[image == 0].any()


def test_a_fold_swallows_tissue_that_is_then_not_valid():
    # What no pixel of src shows, although it is not out of the frame.
    swallowed = []
    for seed in range(12):
        warped = warp_section(section(), TORN, seeded_generator(seed))
        lost = shrink(~dilate(shown_places(warped), 1), 2)
        reach = warped.field.norm(dim=1).max().ceil().int()
        middle = (..., slice(reach, ROWS - reach), slice(reach, COLS - reach))
        swallowed.append(int(lost[middle].sum()))
        assert not warped.valid[lost].any()
    assert sum(count > 100 for count in swallowed) >= 3


@every_seed
def test_the_truth_of_a_torn_section_jumps_at_the_tear_and_nowhere_else(seed):
    smooth, torn = (
        warp_section(section(), options, seeded_generator(seed))
        for options in (UNTORN, TORN)
    )
    # h' = -g' / (1 + g') with a determinant of 1 + g' of at least 0.3.
    assert steps(smooth.field).max() < 2.5
    assert not smooth.hidden.any() and not smooth.near.any()
    # A fold swallows 10 px and more, a crack opens by up to as much.
    assert steps(torn.field).max() > 4
    far = torn.valid & ~torn.near
    assert steps(torn.field)[shrink(far, 1)].max() < 2.5


@every_seed
@pytest.mark.parametrize("options", [UNTORN, TORN])
def test_no_data_stays_0_and_tissue_never_becomes_it(options, seed):
    image = section(has_gaps=True)
    # Grey levels that cross 0, as those of normalised images do.
    image = torch.where(image == 0, 0.0, image - 3 + 1e-3)
    warped = warp_section(image, options, seeded_generator(seed))
    tissue = warp((image != 0).float(), warped.warp_field) > 0.5
    assert torch.equal(warped.image != 0, tissue)
    assert not warped.hidden[~tissue].any()
    assert warped.image.isfinite().all()


def test_the_sample_has_the_truth_of_its_warp():
    sample = make_sample()
    known = known_warp(sample, TORN, seeded_generator(1))
    assert known.tgt is sample.tgt and known.pair == sample.pair
    error = (warp(known.src, known.truth) - sample.src).abs()
    inside = shrink(known.truth_valid, 4)
    assert inside.any() and error[inside].mean() < SAMPLING_ERROR + 0.01
    assert known.src_defects.any() and known.prior_field is None


def test_without_a_warp_the_pair_stays_and_its_truth_is_rest():
    sample = make_sample(src=section(has_gaps=True))
    known = known_warp(sample, KnownWarp(prob=0, same=0), seeded_generator(1))
    assert torch.equal(known.src, sample.src)
    assert not known.truth.any() and not known.src_defects.any()
    assert torch.equal(known.truth_valid, sample.src != 0)


def test_one_section_twice_is_that_of_tgt():
    band = torch.zeros(1, 1, ROWS, COLS, dtype=torch.bool)
    band[..., 40:60, :] = True
    sample = make_sample(
        prior_field=torch.ones(1, 2, ROWS, COLS), src_defects=~band, tgt_defects=band
    )
    twice = known_warp(sample, KnownWarp(prob=1, same=1), seeded_generator(3))
    as_src = sample._replace(src=sample.tgt, src_defects=band)
    other = known_warp(as_src, KnownWarp(prob=1, same=0), seeded_generator(3))
    for name in ("src", "tgt", "truth", "src_defects", "tgt_defects"):
        assert torch.equal(getattr(twice, name), getattr(other, name)), name
    assert twice.unwarped_src is None


def test_the_natural_field_of_one_section_twice_is_known():
    prior = torch.ones(1, 2, ROWS, COLS)
    sample = make_sample(prior_field=prior)
    twice = known_warp(sample, KnownWarp(same=0.999), seeded_generator(3))
    assert torch.equal(twice.unwarped_src, torch.zeros_like(sample.src))
    assert not twice.unwarped_prior.any()


@pytest.mark.parametrize("prior", [None, torch.full((1, 2, ROWS, COLS), 2.0)])
def test_what_came_before_the_warp_is_kept_unless_the_pair_is_aligned(prior):
    sample = make_sample(prior_field=prior)
    known = known_warp(sample, TORN, seeded_generator(2))
    assert torch.equal(known.unwarped_src, sample.src)
    assert torch.equal(known.unwarped_tgt, sample.tgt)
    assert known.unwarped_prior is prior
    aligned = KnownWarp(prob=1, same=0, tear=1, aligned=True)
    known = known_warp(sample, aligned, seeded_generator(2))
    assert known.unwarped_src is known.unwarped_tgt is known.unwarped_prior is None


@every_seed
@pytest.mark.parametrize("is_aligned", [True, False])
def test_a_prior_is_the_truth_smoothed_and_a_bit_off(is_aligned, seed):
    options = KnownWarp(prob=1, same=0, tear=0, aligned=is_aligned, prior_px=4)
    before = torch.tensor([5.0, -3.0]).view(1, 2, 1, 1).expand(1, 2, ROWS, COLS)
    known = known_warp(make_sample(prior_field=before), options, seeded_generator(seed))
    # The prior of a pair that is not aligned stands for its natural field.
    truth = known.truth if is_aligned else compose(before, known.truth)
    smooth = upsample_field(downsample_field(truth, 3), 3)[..., :ROWS, :COLS]
    largest = (known.prior_field - smooth).norm(dim=1).max()
    assert 0.24 < largest < 4.001
    assert known.prior_field.shape == truth.shape


def test_defects_of_the_section_move_along():
    defects = torch.zeros(1, 1, ROWS, COLS, dtype=torch.bool)
    defects[..., 40:60, :] = True
    src = torch.where(defects, 50.0, section())
    known = known_warp(
        make_sample(src=src, src_defects=defects), UNTORN, seeded_generator(4)
    )
    assert not torch.equal(known.src_defects, defects)
    # Where more than half of a pixel is defect, its grey is nearer to 50 than to 3;
    # pixels that are close to half may round either way.
    differs = known.src_defects != (known.src > 26)
    assert differs.float().mean() < 0.005
    assert not (differs & shrink(known.src_defects, 1)).any()


def test_what_a_tear_hides_joins_the_defects():
    defects = torch.zeros(1, 1, ROWS, COLS, dtype=torch.bool)
    defects[..., 40:60, :] = True
    marked = make_sample(src_defects=defects)
    hidden = warp_section(marked.src, TORN, after_two_draws(5)).hidden
    known = known_warp(marked, TORN, seeded_generator(5))
    assert hidden.any() and known.src_defects[hidden].all()
    assert known.src_defects.sum() > hidden.sum()


def after_two_draws(seed):
    """The generator as it is once `same` and `prob` have been drawn."""
    generator = seeded_generator(seed)
    torch.rand(2, generator=generator)
    return generator


def test_chance_comes_from_the_generator_alone():
    sample = make_sample(prior_field=torch.ones(1, 2, ROWS, COLS))
    before = torch.get_rng_state()
    once, again, other = (
        known_warp(sample, TORN, seeded_generator(key)) for key in (7, 7, 8)
    )
    for name, value in once._asdict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(again, name)), name
    assert not torch.equal(once.truth, other.truth)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_given_is_written_to():
    defects = torch.zeros(1, 1, ROWS, COLS, dtype=torch.bool)
    sample = make_sample(prior_field=torch.ones(1, 2, ROWS, COLS), src_defects=defects)
    copies = [v.clone() for v in sample if isinstance(v, torch.Tensor)]
    known_warp(sample, TORN, seeded_generator(7))
    kept = [v for v in sample if isinstance(v, torch.Tensor)]
    for value, copy in zip(kept, copies, strict=True):
        assert torch.equal(value, copy)


@pytest.mark.parametrize("shape", [(24, 40), (13, 9), (130, 33)])
@pytest.mark.parametrize("options", [UNTORN, TORN])
def test_small_and_odd_sizes_are_warped_too(shape, options):
    image = torch.ones(1, 1, *shape)
    warped = warp_section(image, options, seeded_generator(1))
    assert warped.image.shape == image.shape
    assert warped.field.shape == (1, 2, *shape) and warped.field.isfinite().all()


@every_seed
def test_a_warp_goes_no_further_than_asked(seed):
    options = KnownWarp(
        tear=0, peak_px=6, shift_px=3, degrees=1, stretch=0.01, knot_px=20
    )
    warped = warp_section(section(), options, seeded_generator(seed))
    # Two waves, the second 0.3 of the first at most, the shift along both axes, and
    # the corner turned by 1 degree (0.0175) and stretched by 0.01.
    corner = (ROWS**2 + COLS**2) ** 0.5 / 2
    furthest = 1.3 * 6 + 3 * 2**0.5 + corner * (0.0175 + 0.01)
    assert 0 < warped.warp_field.norm(dim=1).max() < furthest
