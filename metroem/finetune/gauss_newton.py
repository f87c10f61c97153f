"""Optimise the field of one pair by Gauss-Newton, on ever finer control points.

The field is f = start + interpolate(change), the change given at control points. Each
sample of a batch is optimised independently. The loss is

    loss = log(D + 0.01) + s * sqrt(B + 0.003)

    r(p) = mean_c (g_c src_c(p + f(p)) - tgt_c(p))^2        squares; g_c equals powers
    w(p) = w_src(p + f(p)) w_tgt(p), divided by its sum     weights
    D    = (1 - lost) sum_p w(p) r(p) / (r(p) + 1) + lost * lost_cost    dissimilarity
    B    = bending energy of f (`metroem.finetune.control_points`)
    s    = smoothness * U^2, U = how unlike the structure of the sections is, 0 to 1

`lost` is the fraction of the weight that the field moves out of sight, counted from
0.1 on: below that it is free. A step solves

    (R^T H R + 2 k A) step = -gradient      R: interpolation, A: half gradient of B,

with k the slope of the loss by B, and H the curvature of log(D) by displacements, from
the slopes of the warped src. Conjugate gradients solve it; a line search shortens it.

The logarithm, and a smoothness that grows with U, let the field follow features as
closely as they agree. Sections that are alike are aligned in detail; where the tissue
differs, the field stays smooth. Affine maps have no bending energy; the rigidity of the
original penalises them. The root of B is used because B itself holds rough warps back
more than smooth ones (8 % more error within a section, 1 to 2 % between neighbours,
2026-11).

Source: Gauss-Newton with robust weights as in Brox et al. 2004
(doi:10.1007/978-3-540-24673-2_3); thin plates: Bookstein 1989 (doi:10.1109/34.24792).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.errors import FieldError, UsageError
from metroem.finetune.adam import FinetuneResult
from metroem.finetune.analytic_loss import per_sample
from metroem.finetune.control_points import BendingEnergy, ControlPoints
from metroem.geometry.field import check_field, downsample_field, upsample_field, warp
from metroem.geometry.rigidity import inside_border
from metroem.imaging.loss_weights import PairWeight

# Squared difference, of features of variance 1, at which a pixel's term is half its
# maximum.
_OUTLIER = 1.0
# Fields move borders out of the image. Up to _FREE_LOSS of the weight may be lost for
# free. The rest costs _LOST_COST times the dissimilarity at the start, at most 1:
# otherwise the best field would be one that leaves nothing to compare.
_FREE_LOSS, _LOST_COST = 0.1, 2.0
# Added to the dissimilarity, so that its logarithm is finite for equal images.
_MIN_DISSIMILARITY = 1e-2
# Least weight of bending, also where a mask sets 0. Without it nothing holds a field at
# a tear, and it drifts (2.3 px more error near stains, 2026-11).
_MIN_STIFFNESS = 0.05
# Added to the bending energy: fields well below it are equally smooth.
_MIN_BENDING = 3e-3
# Features are averaged down until this many of their pixels lie between control points.
_PIXELS_PER_SPACING = 16
_FINEST_LEVEL = 1
# U is measured at pixels of 8 px, where noise is averaged away. There the sections
# differ because tissue changes from one section to the next. A change looks like a
# small displacement. Networks follow it, but smoothness should keep the field from it.
# So U must not be measured after the network's own detail has hidden the change: src is
# warped without detail of less than 3 px. Detail is the difference from control points
# 128 px apart. Larger detail is kept, since it is a real warp. Without it, rough warps
# are lost (error of neighbours warped by 30 px: 2.02 px instead of 1.46; of sections on
# themselves warped by 60 px: up to 1.7 instead of 0.3).
# Mean error, px, with all detail, and without detail below 1.5, 3 and 6 px (a pyramid
# trained by `aligned`, 11 pairs of its own sections; 2026-11):
#     sections on themselves           0.25  0.25  0.22  0.18
#     neighbours warped by 12 px       1.06  1.05  1.04  1.03
#     neighbours warped by 30 px       1.46  1.47  1.48  1.72
#     with defects                     1.20  1.20  1.18  1.16
#     synthetic, briefly trained       1.34  1.33  1.28  1.19
_STRUCTURE_LEVEL, _STRUCTURE_PX, _SECTION_CHANGE_PX = 3, 128, 3.0
_MIN_UNLIKE = 0.02
_MIN_POWER = 1e-6
# Lengths of a step that are tried, in steps of Gauss-Newton, which overestimates the
# curvature.
_TRIALS, _SHORTEST, _LONGEST = 2, 0.1, 2.0
_LEAST_DETERMINANT = 0.2  # of the field, where the slope of src is found from it
_SOLVER_STEPS = 50
_SOLVED = 3e-2  # fraction of the first residual
_LEAST_DIAGONAL = 1e-20
_DAMPING = 1e-3  # fraction of the mean curvature


@dataclass(frozen=True)
class GaussNewtonOptions:
    """Options of finetuning by Gauss-Newton.

    Attributes:
        spacing_px: distances of the control points, coarse first, powers of 2, pixels.
            Detail of the start field that is finer than the last one is dropped: it is
            noise of the network.
        smoothness: factor of the root of the bending energy. It is multiplied by U^2,
            with U from 0 to 1: about 0.2 for noise alone, 0.5 for neighbours 40 nm
            apart.
        num_iter: largest number of steps, for all distances together.
        min_gain: a distance is finished when a step lowers the loss by less.
        border: px left out of the loss on each side.

    Raises:
        UsageError: no distances, or some that are not powers of 2 from 4 on.
    """

    spacing_px: tuple[int, ...] = (64, 32, 16)
    smoothness: float = 16.0
    num_iter: int = 30
    min_gain: float = 2e-3
    border: int = 1

    def __post_init__(self) -> None:
        powers = all(px >= 4 and px & (px - 1) == 0 for px in self.spacing_px)
        if not self.spacing_px or not powers:
            raise UsageError(
                f"knots {self.spacing_px} px apart: expected powers of 2 from 4 on, "
                "coarse first, for example (64, 32, 16)"
            )


def finetune_gauss_newton(
    features: tuple[Tensor, Tensor],
    field: Tensor,
    weights: tuple[PairWeight, PairWeight],
    options: GaussNewtonOptions,
    *,
    level: int = 0,
) -> FinetuneResult:
    """Improve a field on the features of its pair.

    Args:
        features: features of src and tgt, (B, C, H / 2**level, W / 2**level) rounded
            up, each of mean 0 and variance 1.
        field: start field, (B, 2, H, W), pixels. Not written into.
        weights: weights of similarity and of smoothness, at the size of the field.
        options: see `GaussNewtonOptions`.
        level: level of the features.

    Returns:
        The field found, or the start field if its loss is lower; detached.

    Raises:
        FieldError: `field` is not a field of the size of the features and weights.
        UsageError: features of a level that is coarser than the control points.
    """
    _check(features, field, weights, level)
    if (finest := min(options.spacing_px)) < 2**level:
        raise UsageError(
            f"knots {finest} px apart on features of level {level}, {2**level} px a "
            f"pixel: give knots of {2**level} px or more"
        )
    with torch.no_grad():
        start = field.detach().float()
        found = _without_detail(start, finest)
        steps, problem = 0, None
        for done, spacing in enumerate(options.spacing_px):
            # The steps that are left are shared by the distances that are left.
            left = len(options.spacing_px) - done
            max_steps = -(-(options.num_iter - steps) // left)
            problem = _Problem(features, found, weights, options, (level, spacing))
            change, made = _search(problem, max_steps)
            steps += made
            found = found + problem.at_full_size(change)
        assert problem is not None
        before, after = problem.compare(start, found)
        found = torch.where(per_sample(after > before), start, found)
        return FinetuneResult(found, before, torch.minimum(before, after), steps)


def _without_detail(field: Tensor, spacing: int) -> Tensor:
    """Smooth a field to the detail of control points `spacing` px apart."""
    points = ControlPoints((field.shape[-2], field.shape[-1]), spacing, like=field)
    return points.interpolate(points.mean(field))


def _check(
    features: tuple[Tensor, Tensor],
    field: Tensor,
    weights: tuple[PairWeight, PairWeight],
    level: int,
) -> None:
    """Refuse a field, features and weights whose sizes do not fit."""
    check_field(field)
    rows, cols = (-(-size // 2**level) for size in field.shape[-2:])
    sizes = {tuple(f.shape[-2:]) for f in features}
    weighed = {tuple(w.shape[-2:]) for pair in weights for w in pair}
    if sizes != {(rows, cols)} or weighed != {tuple(field.shape[-2:])}:
        raise FieldError(
            f"a field of {tuple(field.shape)} with features of {sorted(sizes)} px at "
            f"level {level} and weights of {sorted(weighed)} px: expected features of "
            f"({rows}, {cols}) px and weights of the size of the field"
        )


class _Loss(NamedTuple):
    """The loss of a change, and the maps that its derivatives are made of."""

    value: Tensor  # (B,)
    values: Tensor  # (B, 2, h, w), the field at the control points
    field: Tensor  # (B, 2, rows, cols), f at each pixel of the scale
    warped: Tensor  # (B, C, rows, cols), src there
    power: Tensor  # (B, C, 1, 1), of warped src
    gain: Tensor  # (B, C, 1, 1), g
    squares: Tensor  # (B, 1, rows, cols), r
    weight: Tensor  # (B, 1, rows, cols), w
    unlike: Tensor  # (B,), D
    kept: Tensor  # (B,), 1 - lost


class _Derivatives(NamedTuple):
    """The derivatives of a loss."""

    gradient: Tensor  # (B, 2, h, w), by the values at the control points
    curvature: Tensor  # (B, 3, rows, cols), H: cc, rr, cr at each pixel of the scale
    stiffness: Tensor  # (B, 1, 1, 1), k: slope of the loss by the bending energy


class _Problem:
    """The loss of a change to a field, at control points of one distance."""

    def __init__(
        self,
        features: tuple[Tensor, Tensor],
        field: Tensor,
        weights: tuple[PairWeight, PairWeight],
        options: GaussNewtonOptions,
        where: tuple[int, int],
    ) -> None:
        """Bring all maps to the scale that fits the control points.

        Args:
            features: features of src and tgt.
            field: the field to change, (B, 2, H, W), pixels.
            weights: weights of similarity and of smoothness.
            options: see `GaussNewtonOptions`.
            where: level of the features, and distance of the control points, px.
        """
        level, spacing = where
        coarsest = int(math.log2(spacing / _PIXELS_PER_SPACING))
        self.scale = max(level, _FINEST_LEVEL, coarsest)
        self._size = field.shape[-2:]
        self._field = downsample_field(field, self.scale)
        self._src, self._tgt = (_block_mean(f, self.scale - level) for f in features)
        similarity, smoothness = weights
        self._src_weight = _block_minimum(similarity.src, self.scale)
        self._tgt_weight = _block_minimum(
            inside_border(similarity.tgt, options.border), self.scale
        )
        self._points = ControlPoints(
            (self._field.shape[-2], self._field.shape[-1]),
            spacing >> self.scale,
            like=field,
        )
        stiffness = self._points.minimum(
            _block_minimum(smoothness.along(field), self.scale)
        )
        self._bending = BendingEnergy(stiffness.clamp(min=_MIN_STIFFNESS), spacing)
        self._due_weight = self._weight(self._field)
        self._lost_cost, self._smoothness = 0.0, 0.0
        at_start = self.loss(self.no_change()).unlike
        is_blank = self._due_weight.sum((1, 2, 3)) == 0
        lost_cost = (_LOST_COST * at_start).clamp(max=1.0)
        self._lost_cost = torch.where(is_blank, 1.0, lost_cost)
        unlike = self._unlike_structure(max(0, _STRUCTURE_LEVEL - self.scale))
        self._smoothness = options.smoothness * unlike.flatten().square()
        self.min_gain = options.min_gain

    def no_change(self) -> Tensor:
        """Make a change of 0 at all control points, (B, 2, h, w)."""
        return torch.zeros_like(self._points.mean(self._field))

    def at_full_size(self, change: Tensor) -> Tensor:
        """Interpolate a change to the size of the field: (B, 2, H, W), pixels."""
        rows, cols = self._size
        full = upsample_field(self._points.interpolate(change), self.scale)
        return full[..., :rows, :cols]

    def compare(self, start: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the losses, (B,), of two fields of full size, (B, 2, H, W).

        The due weight is the weight of which `lost` is a fraction. For both fields it
        is, at each pixel, the larger of the weights under `start` and under no field.
        """
        fields = [downsample_field(field, self.scale) for field in (start, found)]
        none = torch.zeros_like(fields[0])
        self._due_weight = torch.maximum(self._weight(fields[0]), self._weight(none))
        before, after = (self._loss(f, self.no_change()).value for f in fields)
        return before, after

    def loss(self, change: Tensor) -> _Loss:
        """Compute the loss of a change, (B, 2, h, w)."""
        return self._loss(self._field, change)

    def _loss(self, start: Tensor, change: Tensor) -> _Loss:
        """Compute `loss` of a change to any field at this scale."""
        field = start + self._points.interpolate(change)
        warped = warp(self._src, field)
        weight, lost = self._weight_fraction(field)
        power = self._power(warped, weight)
        gain = (self._power(self._tgt, weight) / power).sqrt()
        squares = (gain * warped - self._tgt).square().mean(1, keepdim=True)
        unlike = (weight * squares / (squares + _OUTLIER)).sum((1, 2, 3))
        unlike = (1 - lost) * unlike + lost * self._lost_cost
        values = self._points.mean(start) + change
        bending, _ = self._bending_term(values)
        value = torch.log(unlike + _MIN_DISSIMILARITY) + bending
        return _Loss(
            *(value, values, field, warped, power, gain, squares, weight, unlike),
            1 - lost,
        )

    def derivatives(self, loss: _Loss) -> _Derivatives:
        """Compute the derivatives of a loss.

        The slope of src is found from differences of warped src. That weights change
        with the field is left out.
        """
        slope = 2 * loss.weight * _OUTLIER / (loss.squares + _OUTLIER).square()
        slope = slope / per_sample(loss.unlike + _MIN_DISSIMILARITY)
        d_cols, d_rows = _differences(loss.warped)
        off = loss.gain * loss.warped - self._tgt
        by_gain = torch.einsum("bchw,bohw->bc", off * loss.warped, slope)
        by_gain = by_gain[..., None, None] * loss.gain / loss.power
        off = loss.gain * slope * off - by_gain * loss.weight * loss.warped
        pulls = [(off * d).mean(1, keepdim=True) for d in (d_cols, d_rows)]
        gradient = per_sample(loss.kept) * _slope_of_src(pulls, loss.field)
        products = (d_cols * d_cols, d_rows * d_rows, d_cols * d_rows)
        curvature = torch.cat([p.mean(1, keepdim=True) for p in products], 1)
        _, stiffness = self._bending_term(loss.values)
        bending = 2 * stiffness * self._bending.half_gradient(loss.values)
        return _Derivatives(
            self._points.interpolate_transpose(gradient) + bending,
            slope * curvature,
            stiffness,
        )

    def _bending_term(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Compute s * sqrt(B + 0.003), (B,), and its slope by B, see `_State`."""
        # The energy needs pixels of level 0; here a pixel is 2**scale of them.
        squares = 4**self.scale * self._bending.value(values) + _MIN_BENDING
        cost = self._smoothness * squares.sqrt()
        return cost, per_sample(4**self.scale * cost / (2 * squares))

    def _weight(self, field: Tensor) -> Tensor:
        """Compute the weight of each pixel, src warped by a field: (B, 1, h, w)."""
        return warp(self._src_weight, field) * self._tgt_weight

    def _weight_fraction(self, field: Tensor) -> tuple[Tensor, Tensor]:
        """Compute w, which sums to 1, (B, 1, h, w), and the fraction `lost`, (B,)."""
        weight = self._weight(field)
        total = weight.sum((1, 2, 3), keepdim=True)
        due = self._due_weight.sum((1, 2, 3)).clamp(min=1e-6)
        lost = (self._due_weight - weight).clamp(min=0).sum((1, 2, 3)) / due
        lost = (lost - _FREE_LOSS).clamp(min=0) / (1 - _FREE_LOSS)
        return weight / torch.where(total > 0, total, 1.0), lost

    def _unlike_structure(self, levels: int) -> Tensor:
        """Compute U, how unlike the structure of the sections is, (B, 1, 1, 1).

        The features are averaged down by `levels`, which removes noise. U is their
        summed squared difference divided by their summed power: 0 for equal tissue, 1
        for unrelated tissue.
        """
        smooth = _without_detail(self._field, max(1, _STRUCTURE_PX >> self.scale))
        detail = self._field - smooth
        detail_px = 2**self.scale * detail.norm(dim=1, keepdim=True)
        smooth = smooth + detail * (
            1 - torch.exp(-((detail_px / _SECTION_CHANGE_PX) ** 2))
        )
        warped = warp(self._src, smooth)
        whole = _block_minimum((self._weight(smooth) > 0).float(), levels)
        src, tgt = _block_mean(warped, levels), _block_mean(self._tgt, levels)
        power = (whole * (src.square() + tgt.square())).sum((1, 2, 3), keepdim=True)
        unlike = (whole * (src - tgt).square()).sum((1, 2, 3), keepdim=True)
        return unlike / (power + _MIN_POWER) + _MIN_UNLIKE

    def _power(self, features: Tensor, fraction: Tensor) -> Tensor:
        """Compute the mean square of each feature, (B, C, 1, 1).

        The power of src is scaled to equal the power of tgt. Sampling between pixels
        averages noise away; without the scale, fields of half pixels would win for that
        reason alone.
        """
        sums = torch.einsum("bchw,bohw->bc", features.square(), fraction)
        return sums[..., None, None] + _MIN_POWER

    def solve(self, at: _Derivatives) -> Tensor:
        """Solve for the step of Gauss-Newton, (B, 2, h, w)."""
        cc, rr, cr = at.curvature.split(1, 1)
        damping = _DAMPING * (cc + rr).mean((1, 2, 3), keepdim=True)
        cc, rr = cc + damping, rr + damping
        diagonal = self._points.weighted_diagonal(torch.cat((cc, rr), 1))
        diagonal += 2 * at.stiffness * self._bending.diagonal()

        def multiply(values: Tensor) -> Tensor:
            d_cols, d_rows = self._points.interpolate(values).split(1, 1)
            curved = torch.cat(
                (cc * d_cols + cr * d_rows, cr * d_cols + rr * d_rows), 1
            )
            bent = self._bending.half_gradient(values)
            return self._points.interpolate_transpose(curved) + (
                2 * at.stiffness * bent
            )

        return _conjugate_gradients(multiply, -at.gradient, diagonal)


def _search(problem: _Problem, max_steps: int) -> tuple[Tensor, int]:
    """Minimise the loss: the change at the control points, and the number of steps."""
    change = problem.no_change()
    loss = problem.loss(change)
    for made in range(max_steps):
        at = problem.derivatives(loss)
        step = problem.solve(at)
        slope = (at.gradient * step).sum((1, 2, 3))
        # The model's own gain is half of this. It overestimates the curvature.
        if bool((-slope < problem.min_gain).all()):
            return change, made
        before = loss.value
        change, loss = _line_search(problem, change, loss, (step, slope))
        if bool((before - loss.value < problem.min_gain).all()):
            return change, made + 1
    return change, max_steps


def _line_search(
    problem: _Problem, change: Tensor, loss: _Loss, along: tuple[Tensor, Tensor]
) -> tuple[Tensor, _Loss]:
    """Find how much of a step to make, each sample independently.

    The whole step is tried. Then the minimum of the parabola is tried that has the
    losses at 0 and 1 and the slope at 0.

    Args:
        problem: the loss.
        change: where the step starts, (B, 2, h, w).
        loss: the loss of `change`.
        along: the step, (B, 2, h, w), and the slope of the loss along it, (B,).

    Returns:
        The best change, `change` itself if no trial is better, and its loss.
    """
    step, slope = along
    best, least = torch.zeros_like(slope), loss.value
    trial = torch.ones_like(slope)
    for _ in range(_TRIALS):
        found = problem.loss(change + per_sample(trial) * step)
        best = torch.where(found.value < least, trial, best)
        least = torch.minimum(least, found.value)
        last = trial
        bend = (found.value - loss.value - slope * trial) / trial.square()
        trial = torch.where(bend > 0, -slope / (2 * bend), _LONGEST)
        trial = trial.clamp(_SHORTEST, _LONGEST)
    change = change + per_sample(best) * step
    is_last = bool((best == last).all())
    return change, found if is_last else problem.loss(change)


def _conjugate_gradients(
    multiply: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor
) -> Tensor:
    """Solve multiply(x) = right approximately, each sample independently.

    Args:
        multiply: product with a symmetric matrix, (B, 2, h, w) -> (B, 2, h, w).
        right: (B, 2, h, w).
        diagonal: diagonal of the matrix, for preconditioning.
    """
    diagonal = diagonal.clamp(min=_LEAST_DIAGONAL)  # 0 where nothing is to be seen
    x, residual = torch.zeros_like(right), right
    scaled = residual / diagonal
    direction, size = scaled, _dot(residual, scaled)
    first = size
    for _ in range(_SOLVER_STEPS):
        product = multiply(direction)
        length = size / _dot(direction, product).clamp(min=1e-30)
        x = x + length * direction
        residual = residual - length * product
        scaled = residual / diagonal
        size, before = _dot(residual, scaled), size
        if bool((size <= _SOLVED**2 * first).all()):
            break
        direction = scaled + size / before.clamp(min=1e-30) * direction
    return x


def _differences(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Compute central differences along cols and rows, (B, C, h, w) each."""
    padded = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    d_cols = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    d_rows = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return d_cols, d_rows


def _slope_of_src(along: Sequence[Tensor], field: Tensor) -> Tensor:
    """Turn slopes of warped src along cols and rows into those of src at p + f(p).

    Those of warped src are those of src times the transposed Jacobian of p + f(p).

    Args:
        along: two maps, (B, 1, h, w).
        field: f, (B, 2, h, w).
    """
    by_cols, by_rows = _differences(field)
    (aa, ba), (ab, bb) = (one.split(1, 1) for one in (by_cols, by_rows))
    aa, bb = 1 + aa, 1 + bb
    determinant = (aa * bb - ab * ba).clamp(min=_LEAST_DETERMINANT)
    d_cols, d_rows = along
    slopes = bb * d_cols - ba * d_rows, aa * d_rows - ab * d_cols
    return torch.cat(slopes, 1) / determinant


def _block_mean(values: Tensor, levels: int) -> Tensor:
    """Average blocks of 2**levels pixels a side, (B, C, H, W)."""
    if levels == 0:
        return values
    return F.avg_pool2d(values, 2**levels, ceil_mode=True, count_include_pad=False)


def _block_minimum(values: Tensor, levels: int) -> Tensor:
    """Find the minimum of each block of 2**levels pixels a side, (B, C, H, W)."""
    return -F.max_pool2d(-values, 2**levels, ceil_mode=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum products of two fields, (B, 2, h, w) -> (B, 1, 1, 1)."""
    return (a * b).sum((1, 2, 3), keepdim=True)
