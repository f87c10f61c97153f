import math

import pytest
import torch

from metroem.geometry.rigidity import rigidity_map
from metroem.imaging.loss_weights import PairWeight
from metroem.loss import (
    COARSER,
    LossTerms,
    PairLoss,
    Target,
    endpoint_loss,
    metric_loss,
    normalize_features,
    plain_loss,
    rigidity,
    similarity,
    sum_losses,
    unaligned_similarity,
    weighted_mean,
)
from metroem.specs.losses import LossSpec

ROWS, COLS = 40, 56


def full_weight(rows=ROWS, cols=COLS):
    return PairWeight(torch.ones(1, 1, rows, cols), torch.ones(1, 1, rows, cols))


def pair_loss(field, smoothness=1.0):
    weight = full_weight(*field.shape[-2:])
    return PairLoss(field, weight, weight, smoothness)


def texture():
    rows, cols = torch.meshgrid(
        torch.arange(float(ROWS)), torch.arange(float(COLS)), indexing="ij"
    )
    return (torch.sin(rows / 4) + torch.cos(cols / 3))[None, None]


def test_a_weighted_mean_is_taken_per_sample():
    values = torch.tensor([[1.0, 3.0], [10.0, 30.0]]).view(2, 1, 1, 2)
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).view(2, 1, 1, 2)
    assert float(weighted_mean(values, weight)) == (2 + 30) / 2
    nothing = torch.zeros_like(weight)
    assert float(weighted_mean(values, nothing)) == 0


def test_similarity_by_hand():
    src, tgt = torch.zeros(1, 1, 4, 6), torch.full((1, 1, 4, 6), 3.0)
    tgt[..., 0, :] = 100  # in the border
    assert float(similarity(src, tgt, border=1)) == 9


def test_a_rigid_motion_strains_nothing():
    angle = math.radians(7)
    rows, cols = torch.meshgrid(torch.arange(12.0), torch.arange(17.0), indexing="ij")
    d_cols = (math.cos(angle) - 1) * cols - math.sin(angle) * rows + 5
    d_rows = math.sin(angle) * cols + (math.cos(angle) - 1) * rows - 2
    strain = rigidity_map(torch.stack([d_cols, d_rows])[None])
    assert strain.max() < 1e-10


def test_rigidity_of_a_stretch_by_hand():
    # Stretched by 10% along cols: straight springs along cols are 1.1 long,
    # diagonal ones sqrt(1.1**2 + 1), those along rows stay 1.
    cols = torch.arange(9.0).expand(7, 9)
    strain = rigidity_map(torch.stack([0.1 * cols, torch.zeros(7, 9)])[None])
    diagonal = (math.sqrt(1.1**2 + 1) - math.sqrt(2)) ** 2
    expected = (2 * 0.1**2 + 4 * diagonal) / 8
    torch.testing.assert_close(
        strain[0, 0, 2:-2, 2:-2], torch.full((3, 5), expected), rtol=1e-4, atol=0
    )
    border = torch.ones(7, 9, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert not strain[0, 0][border].any()


def test_rigidity_agrees_with_the_original():
    # Values of metroem 0.1.3, loss.rigidity, on this field.
    rows, cols = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    field = torch.stack([(rows * cols) % 3, (rows + 2 * cols) % 4])[None] / 4
    expected = torch.tensor(
        [[0.056161, 0.245072, 0.121372], [0.122012, 0.076479, 0.195698]]
    )
    torch.testing.assert_close(rigidity(field)[2:-2, 2:-2], expected, atol=1e-5, rtol=0)
    assert rigidity(field.repeat(3, 1, 1, 1)).shape == (3, 6, 7)


def test_plain_loss_is_zero_at_rest():
    terms = plain_loss(texture(), texture(), pair_loss(torch.zeros(1, 2, ROWS, COLS)))
    # The sampler rounds positions to 1e-7 of the image.
    assert float(terms.total) < 1e-10


def test_smoothness_is_the_factor_of_rigidity():
    field = 0.3 * torch.randn(
        1, 2, ROWS, COLS, generator=torch.Generator().manual_seed(0)
    )
    terms = plain_loss(texture(), texture(), pair_loss(field, smoothness=7.0))
    expected = terms.similarity + 7 * terms.rigidity
    torch.testing.assert_close(terms.total, expected)


def test_the_gradient_leads_towards_the_true_shift():
    image = texture()
    tgt = torch.roll(image, -2, dims=-1)  # tgt(p) = src(p + 2 cols)
    field = torch.zeros(1, 2, ROWS, COLS, requires_grad=True)
    plain_loss(image, tgt, pair_loss(field)).total.backward()
    assert field.grad is not None
    assert field.grad[0, 0].sum() < 0  # a longer field would lower the loss


def test_features_become_mean_0_and_std_1_over_the_valid_pixels():
    features = 5 + 3 * torch.rand(2, 4, 6, 9)
    mask = torch.ones(2, 1, 6, 9, dtype=torch.bool)
    mask[:, :, :2] = False
    normalized = normalize_features(features, mask)
    assert not normalized[:, :, :2].any()
    valid = normalized[:, :, 2:].flatten(2)
    torch.testing.assert_close(valid.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        valid.std(-1, correction=0), torch.ones(2, 4), atol=1e-4, rtol=0
    )


def test_unaligned_similarity_takes_the_middle_tiles():
    # Tile i differs by i: 20 tiles 1..20, of which those strictly between the
    # 15th percentile (3.85) and the median (10.5) of the squares count.
    difference = torch.arange(1.0, 21.0).sqrt().repeat_interleave(4)
    src = difference.expand(1, 1, 4, 80)
    value = unaligned_similarity(
        src, torch.zeros_like(src), torch.ones(1, 1, 4, 80), sample_px=4
    )
    assert float(value) == pytest.approx(sum(range(4, 11)) / 7, rel=1e-5)


def test_unaligned_similarity_of_too_few_tiles_is_zero():
    src = torch.rand(1, 1, 8, 12)
    weight = torch.ones(1, 1, 8, 12)
    assert float(unaligned_similarity(src, -src, weight, sample_px=4)) == 0


def test_the_metric_loss_rewards_a_difference_before_alignment():
    image = torch.cat([torch.zeros(1, 1, ROWS, COLS), texture()], dim=1)
    tgt = torch.roll(image, -2, dims=-1)
    field = torch.zeros(1, 2, ROWS, COLS)
    field[:, 0] = 2
    spec = LossSpec("metric", pre_align_sample=4, pre_align_weight=0.5)
    terms = metric_loss([(0, image, tgt)], pair_loss(field), spec)
    assert float(terms.before) > 0.01
    expected = terms.similarity + terms.rigidity - 0.5 * terms.before
    torch.testing.assert_close(terms.total, expected)


def test_levels_see_the_field_at_their_own_scale():
    coarse = texture()[..., ::2, ::2].repeat(1, 2, 1, 1)
    tgt = torch.roll(coarse, -1, dims=-1)
    field = torch.zeros(1, 2, ROWS, COLS)
    field[:, 0] = 2  # one pixel of level 1
    spec = LossSpec("metric", levels=(1,))
    terms = metric_loss([(1, coarse, tgt)], pair_loss(field), spec)
    # The rolled-in column lies in the border that is left out.
    assert float(terms.similarity) < 1e-6


def test_without_train_thru_the_embeddings_are_not_trained():
    features = texture().repeat(1, 2, 1, 1).requires_grad_()
    field = torch.zeros(1, 2, ROWS, COLS, requires_grad=True)
    spec = LossSpec("metric", train_thru=False)
    tgt = torch.roll(features, -2, dims=-1)
    metric_loss([(0, features, tgt)], pair_loss(field), spec).total.backward()
    assert features.grad is None and field.grad is not None


def constant(d_cols, d_rows, rows=ROWS, cols=COLS, batch=1):
    field = torch.tensor([d_cols, d_rows], dtype=torch.float32).view(1, 2, 1, 1)
    return field.repeat(batch, 1, rows, cols)


def wanted(field, weight=None):
    rows, cols = field.shape[-2:]
    full = torch.ones(len(field), 1, rows, cols)
    return Target(field, full if weight is None else weight)


def test_the_endpoint_error_by_hand():
    terms = endpoint_loss(constant(4, -3), {}, wanted(constant(1, 1)))
    assert float(terms.epe) == pytest.approx(5, rel=1e-5)  # |(3, -4)|
    assert terms.total == terms.epe
    for term in (terms.similarity, terms.rigidity, terms.before):
        assert math.isnan(term) and not term.requires_grad


def test_the_endpoint_error_is_weighted_per_sample():
    # 3 px off on the left, 1 on the right; the first sample counts the left once
    # and the right three times, the second the right alone.
    field = constant(3, 0, batch=2)
    field[..., COLS // 2 :] = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    weight = torch.ones(2, 1, ROWS, COLS)
    weight[0, ..., COLS // 2 :] = 3
    weight[1, ..., : COLS // 2] = 0
    terms = endpoint_loss(field, {}, wanted(constant(0, 0, batch=2), weight))
    assert float(terms.epe) == pytest.approx(((3 + 3) / 4 + 1) / 2, rel=1e-4)


def test_where_nothing_counts_the_endpoint_error_is_0():
    nothing = torch.zeros(1, 1, ROWS, COLS)
    terms = endpoint_loss(constant(9, 9), {}, wanted(constant(0, 0), nothing))
    assert float(terms.total) == 0


def test_fields_of_coarser_levels_count_less():
    # Off by 2, 4 and 8 px of the input: by 1, 1 and 1 px of levels 1, 2 and 3.
    # The truth, (8, -16) px, is (4, -8), (2, -4), (1, -2) px of them.
    coarse = {
        3: constant(1 + 1, -2, 5, 7),
        1: constant(4, -8 + 1, 20, 28),
        2: constant(2 - 1, -4, 10, 14),
    }
    field = constant(8, -14)
    terms = endpoint_loss(field, coarse, wanted(constant(8, -16)))
    assert float(terms.epe) == pytest.approx(2, rel=1e-3)
    expected = 2 + 4 * COARSER + 8 * COARSER**2
    assert float(terms.total) == pytest.approx(expected, rel=1e-3)


def test_levels_of_a_padded_network_are_cut_to_the_truth():
    # 37 x 45 px in a network that pads to 48 x 48: what it finds there is nothing.
    rows, cols = 37, 45
    coarse = {1: constant(1, 0, 24, 24), 3: constant(0.25, 0, 6, 6)}
    coarse[1][..., 19:, :], coarse[1][..., 23:] = 1e6, 1e6
    terms = endpoint_loss(
        constant(2, 0, rows, cols), coarse, wanted(constant(2, 0, rows, cols))
    )
    assert float(terms.epe) < 0.03


def test_a_coarse_pixel_counts_as_the_least_of_its_pixels():
    field = torch.zeros(1, 2, ROWS // 2, COLS // 2)
    field[..., 10] = 1000
    weight = torch.ones(1, 1, ROWS, COLS)
    weight[..., 21] = 0  # one of the two cols of coarse col 10
    terms = endpoint_loss(constant(0, 0), {1: field}, wanted(constant(0, 0), weight))
    assert float(terms.epe) < 0.03


def test_the_endpoint_error_leads_to_the_truth_and_rests_there():
    field = constant(0, 0).requires_grad_()
    endpoint_loss(field, {}, wanted(constant(3, -2))).total.backward()
    assert (field.grad[0, 0] < 0).all() and (field.grad[0, 1] > 0).all()
    at_rest = constant(3, -2).requires_grad_()
    endpoint_loss(at_rest, {}, wanted(constant(3, -2))).total.backward()
    assert not at_rest.grad.any()


def test_losses_are_added_and_their_terms_averaged_where_known():
    nothing = torch.tensor(float("nan"))
    one = LossTerms(*map(torch.tensor, (1.0, 2.0, 3.0)), nothing, nothing)
    two = LossTerms(torch.tensor(10.0), nothing, torch.tensor(5.0), nothing, nothing)
    terms = sum_losses([one, two], [2.0, 0.5])
    assert (terms.total, terms.similarity, terms.rigidity) == (7, 2, 4)
    assert math.isnan(terms.before) and math.isnan(terms.epe)


def test_gradients_of_added_losses_keep_their_weights():
    a, b = (torch.tensor(2.0, requires_grad=True) for _ in range(2))
    terms = [LossTerms(*[leaf] * 5) for leaf in (a, b)]
    sum_losses(terms, [3.0, 0.25]).total.backward()
    assert (a.grad, b.grad) == (3, 0.25)
