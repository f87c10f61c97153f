"""Fields refined at knots: what is found, what is left, and when it ends."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from metroem.errors import FieldError, UsageError
from metroem.finetune import gauss_newton
from metroem.finetune.gauss_newton import (
    GaussNewtonOptions,
    _Problem,
    finetune_gauss_newton,
)
from metroem.geometry.field import warp
from metroem.imaging.loss_weights import PairWeight

ROWS, COLS = 88, 120
OPTIONS = GaussNewtonOptions(spacing_px=(32, 16))


def positions():
    row, col = torch.meshgrid(
        torch.arange(float(ROWS)), torch.arange(float(COLS)), indexing="ij"
    )
    return row, col


def texture(row, col):
    """(1, 2, H, W) features by formula, of mean 0 and variance 1 about."""
    first = torch.sin(row / 3) + torch.cos(col / 4)
    second = 1.4 * torch.sin((row + col) / 5) * torch.cos((row - 2 * col) / 9)
    return torch.stack([first, second])[None]


def seen_through(field):
    """The texture at p + field(p): what src gives when it is warped exactly."""
    row, col = positions()
    return texture(row + field[0, 1], col + field[0, 0])


def shift(cols, rows):
    return torch.tensor([cols, rows]).view(1, 2, 1, 1).expand(1, 2, ROWS, COLS)


def ones(batch=1):
    return PairWeight(*(torch.ones(batch, 1, ROWS, COLS) for _ in range(2)))


def refine(tgt, *, start=None, src=None, weights=None, options=OPTIONS, level=0):
    src = texture(*positions()) if src is None else src
    start = torch.zeros(len(tgt), 2, ROWS, COLS) if start is None else start
    weights = weights or (ones(len(tgt)), ones(len(tgt)))
    return finetune_gauss_newton((src, tgt), start, weights, options, level=level)


def error(field, truth):
    """Mean distance, px, off the border."""
    return float((field - truth).norm(dim=1)[..., 8:-8, 8:-8].mean())


def smooth_field():
    row, col = positions()
    return torch.stack([2 * torch.sin(row / 40), 1.5 * torch.cos(col / 35)])[None]


@pytest.mark.parametrize("truth", [shift(1.5, -1.0), smooth_field()])
def test_the_field_between_two_images_is_found(truth):
    refined = refine(seen_through(truth))

    assert error(refined.field, truth) < 0.1
    assert (refined.loss_after < refined.loss_before - 1).all()


def test_features_of_a_level_are_enough():
    truth = smooth_field()
    src, tgt = (
        F.avg_pool2d(texture(*positions()), 2),
        F.avg_pool2d(seen_through(truth), 2),
    )

    assert error(refine(tgt, src=src, level=1).field, truth) < 0.2


def test_an_affine_map_is_found_however_smooth_the_field_must_be():
    row, col = positions()
    truth = torch.stack([0.03 * (col - 60) - 0.02 * row, 0.02 * (row - 40)])[None]
    stiff = replace(OPTIONS, smoothness=1e4)

    assert error(refine(seen_through(truth), options=stiff).field, truth) < 0.1


def test_more_smoothness_bends_less():
    tgt = seen_through(smooth_field())
    soft, stiff = (
        refine(tgt, options=replace(OPTIONS, smoothness=s)).field for s in (10.0, 1e6)
    )

    def curvature(field):
        return float(field[..., ::8, ::8].diff(n=2, dim=-2).square().mean())

    assert curvature(stiff) < 0.4 * curvature(soft)


def test_noise_is_not_followed():
    generator = torch.Generator().manual_seed(0)
    src, tgt = (torch.randn(1, 4, ROWS, COLS, generator=generator) for _ in range(2))

    refined = refine(tgt, src=src)

    # Sampling half way between pixels averages noise, which must not pay.
    assert refined.field.norm(dim=1).mean() < 1.0
    assert (refined.loss_before - refined.loss_after < 0.05).all()


def test_equal_images_keep_the_zero_field():
    refined = refine(texture(*positions()))

    assert refined.field.abs().max() < 1e-3
    assert torch.isfinite(refined.loss_after).all()


def test_the_result_is_never_worse_by_its_own_loss():
    generator = torch.Generator().manual_seed(1)
    start = 3 * torch.randn(2, 2, ROWS, COLS, generator=generator)
    tgt = seen_through(shift(9.0, 7.0)).expand(2, -1, -1, -1)

    refined = refine(tgt, start=start, src=texture(*positions()).expand(2, -1, -1, -1))

    assert (refined.loss_after <= refined.loss_before).all()


def test_without_steps_nothing_gets_worse():
    refined = refine(
        seen_through(smooth_field()),
        start=smooth_field(),
        options=replace(OPTIONS, num_iter=0),
    )

    assert refined.iterations == 0
    assert (refined.loss_after <= refined.loss_before).all()
    assert error(refined.field, smooth_field()) < 0.1


def test_a_better_start_takes_fewer_steps():
    truth = smooth_field()
    tgt = seen_through(truth)

    from_zero, from_truth = refine(tgt), refine(tgt, start=truth)

    # A step at a distance shows that there is nothing to gain, or none at all.
    assert from_truth.iterations <= 2 < from_zero.iterations < OPTIONS.num_iter


def test_detail_finer_than_the_knots_is_given_up():
    generator = torch.Generator().manual_seed(0)
    noise = 0.5 * torch.randn(1, 2, ROWS, COLS, generator=generator)

    field = refine(seen_through(smooth_field()), start=smooth_field() + noise).field

    assert error(field, smooth_field()) < 0.2
    # Bilinear between knots 16 px apart: hardly any step from pixel to pixel.
    assert field.diff(dim=-1).abs().max() < 0.3


def test_samples_of_a_batch_are_refined_each_for_itself():
    src = texture(*positions()).expand(2, -1, -1, -1)
    tgt = torch.cat([seen_through(shift(1.0, 0.0)), seen_through(shift(0.0, -2.0))])
    enough = replace(OPTIONS, min_gain=0.0, num_iter=8)

    together = refine(tgt, src=src, options=enough)

    for i in range(2):
        alone = refine(tgt[i : i + 1], options=enough)
        torch.testing.assert_close(together.field[i], alone.field[0], atol=0.02, rtol=0)


def test_what_weighs_nothing_is_not_aligned():
    tgt = seen_through(shift(1.5, 0.0))
    tgt[..., :44, :] = seen_through(shift(-1.5, 0.0))[..., :44, :]
    weight = ones()
    weight.tgt[..., :44, :] = 0

    field = refine(tgt, weights=(weight, ones())).field

    # The weightless half goes on as the other half begins. What it bends by then, 0.5
    # px over 44 px, costs next to nothing.
    assert (field[:, 0, :, 8:-8] > 1.0).all()


def test_the_field_tears_where_smoothness_is_relaxed():
    truth = shift(2.0, 0.0) * torch.where(positions()[1] < 60, -1.0, 1.0)
    tgt, band = seen_through(truth), ones()
    # 24 px: some knots 16 px apart lie in it.
    band.tgt[..., 48:72] = 0
    away = (..., slice(8, -8), [*range(8, 40), *range(80, 112)])

    stiff = replace(OPTIONS, smoothness=1e4)
    torn, whole = (
        refine(tgt, weights=(band, smoothness), options=stiff).field
        for smoothness in (band, ones())
    )

    misses = [float((f - truth)[away].norm(dim=1).mean()) for f in (torn, whole)]
    assert misses[0] < 0.5 * misses[1]


def test_src_warped_by_the_refined_field_is_tgt():
    src, truth = texture(*positions()), smooth_field()
    tgt = seen_through(truth)

    warped = warp(src, refine(tgt).field)

    difference = (warped - tgt)[..., 8:-8, 8:-8]
    assert difference.square().mean() < 0.02 * tgt.square().mean()


def test_the_field_given_is_left_alone_and_no_gradient_comes_back():
    start = torch.zeros(1, 2, ROWS, COLS, requires_grad=True)

    field = refine(seen_through(shift(1.0, 0.0)), start=start).field

    assert not start.any() and not field.requires_grad


@pytest.mark.parametrize("level", [1, 0])
def test_features_of_another_size_are_refused(level):
    src = tgt = torch.zeros(1, 2, ROWS // 2 + level, COLS // 2)
    with pytest.raises(FieldError, match=f"level {level}"):
        refine(tgt, src=src, level=level)


def test_few_steps_are_shared_by_all_distances():
    truth = smooth_field()
    options = GaussNewtonOptions(spacing_px=(32, 16, 8), num_iter=3)

    refined = refine(seen_through(truth), options=options)

    assert refined.iterations == 3
    assert error(refined.field, truth) < 0.5 * error(torch.zeros_like(truth), truth)


@pytest.mark.parametrize("knots", [(), (24,), (16, 2), (0,)])
def test_knots_are_powers_of_two(knots):
    with pytest.raises(UsageError, match="powers of 2"):
        GaussNewtonOptions(spacing_px=knots)


def test_knots_finer_than_the_features_are_refused():
    tgt = torch.zeros(1, 2, ROWS // 8, COLS // 8)
    with pytest.raises(UsageError, match="4 px apart on features of level 3"):
        refine(tgt, src=tgt, level=3, options=replace(OPTIONS, spacing_px=(16, 4)))


def test_a_field_that_leaves_nothing_to_compare_is_no_improvement(monkeypatch):
    tgt = seen_through(shift(2.0, 0.0))
    # A mean over nothing would be the lowest loss there is.
    away = refine(tgt, start=shift(400.0, 0.0))
    near = refine(tgt, start=shift(1.0, 0.0))
    assert float(away.loss_before) > float(near.loss_before)

    def runs_away(problem, max_steps):
        return problem.no_change() + 400.0, 1

    monkeypatch.setattr(gauss_newton, "_search", runs_away)
    kept = refine(tgt, start=shift(1.0, 0.0))
    assert torch.equal(kept.field, shift(1.0, 0.0))
    assert kept.loss_after == kept.loss_before


@pytest.mark.parametrize(("spacing", "left_px"), [(256, 4.0), (2048, 5.0)])
def test_control_points_coarser_than_the_structure_that_is_compared_work(
    spacing, left_px
):
    row, col = positions()
    truth = shift(4.0, -3.0)
    src, tgt = texture(row / 9, col / 9), texture((row - 3) / 9, (col + 4) / 9)
    options = GaussNewtonOptions(spacing_px=(spacing,))
    found = refine(tgt, src=src, options=options)
    # No field leaves 5 px. Averaged to 16 px the images still show the shift; averaged
    # to 128 px each is one pixel, which shows nothing.
    assert error(found.field, truth) <= left_px


def stiffness(features, start):
    weights = (ones(), ones())
    return float(_Problem(features, start, weights, OPTIONS, (0, 16))._smoothness)


def test_a_field_that_followed_moving_tissue_is_held_as_one_that_did_not():
    # Tissue moves to and fro by 1 px within 31 px; the sections do not. How stiff a
    # field is must not depend on how closely the one before it has followed that.
    row, col = positions()
    drift = torch.stack([torch.sin(row / 5), torch.cos(col / 5)])[None]
    features = (texture(row, col), seen_through(drift))
    followed, still = stiffness(features, drift), stiffness(features, 0 * drift)
    # Of displacements of up to 1.4 px 80 to 100 % are left out; compared as the field
    # lays src, sections look so alike that it is held a quarter as stiffly.
    assert followed == pytest.approx(still, rel=0.25)


def test_a_rough_warp_is_held_no_stiffer_than_a_smooth_one():
    # Points 128 px apart cannot lay src as a warp by 12 px within 63 px has it.
    row, col = positions()
    rough = 12 * torch.stack([torch.sin(row / 10), torch.cos(col / 10)])[None]
    smooth = 12 * torch.ones_like(rough)
    held = [stiffness((texture(row, col), seen_through(f)), f) for f in (rough, smooth)]
    assert held[0] == pytest.approx(held[1], rel=0.1)
