"""Compute losses of a field: similarity, rigidity, metric and endpoint loss.

Similarity is a weighted mean of squared differences of grey levels or features.
Rigidity is a weighted mean of squared changes of length, px^2. Both leave out a border,
where the field points outside the images.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.geometry.field import downsample_field, upsample_field, warp
from metroem.geometry.rigidity import rigidity_map
from metroem.imaging.loss_weights import PairWeight
from metroem.specs.losses import LossSpec

BORDER_PX = 32
# Weight of a level's field relative to the next finer level's.
COARSER = 0.3
# Endpoint errors well below this are minimised as squares, px of the finest level.
_SOFT_PX = 0.01


class LossTerms(NamedTuple):
    """A loss and its terms, scalars; NaN for terms that it does not have."""

    total: Tensor  # the value to minimise
    similarity: Tensor  # of the aligned images or embeddings
    rigidity: Tensor  # px^2, before it is multiplied by smoothness
    before: Tensor  # similarity of the unaligned embeddings; 0 for the plain loss
    epe: Tensor  # px, mean distance from the target field


def sum_losses(terms: Sequence[LossTerms], weights: Sequence[float]) -> LossTerms:
    """Add up losses, each times its weight; average the other terms."""
    total = sum(w * t.total for w, t in zip(weights, terms, strict=True))
    columns = list(zip(*terms, strict=True))[1:]
    means = [torch.stack(column).detach().nanmean() for column in columns]
    return LossTerms(total, *means)  # type: ignore[arg-type]


class Target(NamedTuple):
    """The field that a network should find."""

    field: Tensor  # (B, 2, H, W), px
    weight: Tensor  # (B, 1, H, W)


def endpoint_loss(
    field: Tensor,
    coarse: Mapping[int, Tensor],
    target: Target,
    *,
    nothing: float = 0.0,
) -> LossTerms:
    """Compute the mean distance of each level's field from a target field.

    The distance is not squared, so that regions where the images do not show the truth
    do not dominate. Each coarser level has `COARSER` times the weight of the next
    finer one.

    Args:
        field: (B, 2, H, W), px.
        coarse: level -> (B, 2, >= H / 2**level, >= W / 2**level), px of the
            level; `field` is the finest of them, upsampled. May be empty.
        target: the field to compare with, at the size of `field`.
        nothing: see `weighted_mean`.

    Returns:
        The terms; `total` and `epe` in px of `field`.
    """
    levels = dict(coarse) or {0: field}
    finest = min(levels)
    truth = downsample_field(target.field, finest)
    rows, cols = truth.shape[-2:]
    # The weight of a coarse pixel is the minimum of its pixels.
    weight = target.weight
    if finest:
        weight = -F.max_pool2d(-weight, 2**finest, ceil_mode=True)
    errors = {}
    for level, found in levels.items():
        at_finest = upsample_field(found, level - finest)[..., :rows, :cols]
        square = ((at_finest - truth) ** 2).sum(1, keepdim=True)
        length = (square + _SOFT_PX**2).sqrt() * 2**finest
        errors[level] = weighted_mean(length, weight, nothing=nothing)
    factors = {level: COARSER ** (level - finest) for level in errors}
    total = sum(factors[level] * error for level, error in errors.items())
    unknown = torch.full_like(errors[finest].detach(), float("nan"))
    return LossTerms(
        total,  # type: ignore[arg-type]
        unknown,
        unknown,
        unknown,
        errors[finest],
    )


def border_of(shape: torch.Size) -> int:
    """Choose the border to leave out: `BORDER_PX`, or an eighth of a small image.

    The original always leaves out 32 px, which leaves nothing of a 64 px image.
    """
    return min(BORDER_PX, min(shape[-2:]) // 8)


def weighted_mean(
    values: Tensor,
    weight: Tensor | None = None,
    *,
    border: int = 0,
    nothing: float = 0.0,
) -> Tensor:
    """Compute the weighted mean of a map without its border.

    Each sample is averaged separately. So the loss of a batch is the same for one
    process and for several.

    Args:
        values: (B, C, H, W).
        weight: (B, 1, H, W), or None for 1 everywhere.
        border: pixels left out on each side.
        nothing: value of a sample whose weights are all 0: 0 in a loss, which then has
            no gradient, and NaN in a score.

    Returns:
        Scalar.
    """
    rows, cols = values.shape[-2:]
    inner = (..., slice(border, rows - border), slice(border, cols - border))
    values = values[inner]
    if weight is None:
        return values.mean()
    weight = weight[inner]
    total = weight.sum((1, 2, 3)) * values.shape[1]
    weighted = (values * weight).sum((1, 2, 3))
    means = weighted / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, means, nothing).mean()


def similarity(
    warped_src: Tensor, tgt: Tensor, weight: Tensor | None = None, *, border: int
) -> Tensor:
    """Compute the weighted mean of (tgt - warped src)^2.

    Args:
        warped_src: (B, C, H, W), grey levels or features.
        tgt: (B, C, H, W).
        weight: (B, 1, H, W), or None for 1 everywhere.
        border: pixels left out on each side.

    Returns:
        Scalar, 0 where the images agree.
    """
    return weighted_mean((tgt - warped_src) ** 2, weight, border=border)


def rigidity(field: Tensor, power: float = 2, diagonal_mult: float = 1.0) -> Tensor:
    """Compute `rigidity_map` through the original's interface, for code that calls it.

    Args:
        field: (B, 2, H, W), pixels.
        power: as in `rigidity_map`.
        diagonal_mult: as in `rigidity_map`.

    Returns:
        (H, W) for one field, (B, H, W) for several.
    """
    strain = rigidity_map(field, power=power, diagonal_mult=diagonal_mult)[:, 0]
    return strain[0] if len(strain) == 1 else strain


def normalize_features(features: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale each feature to mean 0 and std 1 over the valid pixels.

    Args:
        features: (B, C, H, W).
        mask: (B, 1, H, W) bool, valid pixels.

    Returns:
        (B, C, H, W), 0 where not valid.
    """
    weight = mask.to(features.dtype)
    count = weight.sum((-2, -1), keepdim=True).clamp(min=1)
    mean = (features * weight).sum((-2, -1), keepdim=True) / count
    centred = (features - mean) * weight
    variance = (centred**2).sum((-2, -1), keepdim=True) / count
    return centred / (variance + 1e-10).sqrt()


class PairLoss(NamedTuple):
    """Field and weights of a batch, for a loss."""

    field: Tensor  # (B, 2, H, W), pixels
    similarity_weight: PairWeight
    smoothness_weight: PairWeight
    smoothness: float  # factor of rigidity
    # For a score: the earlier field, (B, 2, H, W), pixels. Its weights are used, and
    # weight that `field` loses counts as unlike. None for a loss, which uses the
    # weights of `field`.
    due_along: Tensor | None = None


def plain_loss(src: Tensor, tgt: Tensor, pair: PairLoss) -> LossTerms:
    """Compute similarity of the aligned images plus smoothness times rigidity.

    Args:
        src: (B, C, H, W), grey levels or features.
        tgt: (B, C, H, W).
        pair: field and weights.

    Returns:
        The terms; `before` is 0.
    """
    border, nothing = border_of(src.shape), 0.0
    difference = (tgt - warp(src, pair.field)) ** 2
    weight = pair.similarity_weight.along(pair.field)
    strain_weight = pair.smoothness_weight.along(pair.field)
    if pair.due_along is not None:
        due = pair.similarity_weight.along(pair.due_along)
        kept = torch.where(due > 0, torch.minimum(weight / due, due.new_ones(())), 0.0)
        # Unrelated images differ by the sum of both powers, about 2 * tgt^2.
        difference = kept * difference + (1 - kept) * 2 * tgt**2
        weight, nothing = due, float("nan")
        strain_weight = pair.smoothness_weight.along(pair.due_along)
    alike = weighted_mean(difference, weight, border=border, nothing=nothing)
    strain = weighted_mean(rigidity_map(pair.field), strain_weight, border=border)
    total = alike + pair.smoothness * strain
    zero, unknown = torch.zeros_like(total), torch.full_like(total, float("nan"))
    return LossTerms(total, alike, strain, zero, unknown)


def unaligned_similarity(
    src: Tensor, tgt: Tensor, weight: Tensor, *, sample_px: int | None
) -> Tensor:
    """Compute how much two images differ before they are aligned.

    The mean is taken over square tiles that are more than half valid, with differences
    between their 15th percentile and their median. This leaves out tiles without
    content and tiles that will never agree.

    Args:
        src: (B, C, H, W) features.
        tgt: (B, C, H, W).
        weight: (B, 1, H, W).
        sample_px: side of a tile, px; None takes the whole image.

    Returns:
        Scalar; a sample with fewer than 10 valid tiles adds 0.
    """
    if sample_px is None:
        return similarity(src, tgt, weight, border=border_of(src.shape))
    valid_fraction = F.avg_pool2d(weight, sample_px)
    tiles = F.avg_pool2d((src - tgt) ** 2 * weight, sample_px)
    tiles = tiles / (valid_fraction + 1e-8)
    valid = (valid_fraction > 0.5).expand_as(tiles) & (tiles != 0)
    per_sample = [_typical(t[v]) for t, v in zip(tiles, valid, strict=True)]
    return torch.stack(per_sample).mean()


def _typical(differences: Tensor) -> Tensor:
    """Average the differences between their 15th percentile and median."""
    if differences.numel() < 10:
        return differences.new_zeros(())
    low, high = differences.detach().quantile(differences.new_tensor([0.15, 0.5]))
    return differences[(differences > low) & (differences < high)].mean()


def metric_loss(
    levels: list[tuple[int, Tensor, Tensor]],
    pair: PairLoss,
    spec: LossSpec,
    *,
    moved: Tensor | None = None,
) -> LossTerms:
    """Reward embeddings that differ before alignment and agree after it.

    The loss of a level is the plain loss of the embeddings minus
    `spec.pre_align_weight` times the difference of the unaligned ones.

    Args:
        levels: (level, src, tgt) with (B, C, H / 2**level, W / 2**level)
            embeddings whose channel 0, the image itself, is left out.
        pair: field and weights at level 0.
        spec: options of the loss.
        moved: field that warps tgt for "before alignment", (B, 2, H, W),
            pixels of level 0; None leaves tgt unchanged.

    Returns:
        The terms, averaged over the levels.
    """
    terms = []
    for level, src, tgt in levels:
        at_level = _at_level(pair, level, spec.sm_div)
        weight = at_level.similarity_weight
        src, tgt = src[:, 1:], tgt[:, 1:]
        if not spec.train_thru:
            src, tgt = src.detach(), tgt.detach()
        if spec.norm_embeddings:
            src = normalize_features(src, weight.src > 0)
            tgt = normalize_features(tgt, weight.tgt > 0)
        after = plain_loss(src, tgt, at_level)
        unaligned = tgt if moved is None else warp(tgt, downsample_field(moved, level))
        before = unaligned_similarity(
            src, unaligned, weight.src * weight.tgt, sample_px=spec.pre_align_sample
        )
        total = after.total - spec.pre_align_weight * before
        terms.append(after._replace(total=total, before=before))
    return LossTerms(*(torch.stack(term).mean() for term in zip(*terms, strict=True)))


def _at_level(pair: PairLoss, level: int, divide_smoothness: bool) -> PairLoss:
    """Bring field and weights to a level."""

    def coarsen(weight: PairWeight) -> PairWeight:
        # The weight of a coarse pixel is the minimum of its pixels.
        size = 2**level
        return PairWeight(
            *(-F.max_pool2d(-side, size, ceil_mode=True) for side in weight)
        )

    if level == 0:
        return pair
    return PairLoss(
        downsample_field(pair.field, level),
        coarsen(pair.similarity_weight),
        coarsen(pair.smoothness_weight),
        pair.smoothness / 2**level if divide_smoothness else pair.smoothness,
        None if pair.due_along is None else downsample_field(pair.due_along, level),
    )
