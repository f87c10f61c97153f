"""A field refined on the features of its pair, from coarse knots to fine ones.

Minimises log(dissimilarity) + smoothness * bending by Gauss-Newton, each sample
of a batch for itself. The logarithm, and a smoothness that grows with how unlike
the sections are, make the field follow features as closely as they agree: sections
that are alike are aligned in detail, where the tissue differs the field stays
smooth. Bending leaves affine maps alone, which the rigidity of the original does not,
and counts by its root mean square: its square would hold rough warps back more than
smooth ones (8 % more error within a section, 1 to 2 % between neighbours, 2026-11).

Source: Gauss-Newton with robust weights as in Brox et al. 2004
(doi:10.1007/978-3-540-24673-2_3); thin plates: Bookstein 1989 (doi:10.1109/34.24792).
"""

import math
from collections.abc import Callable
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

# Squared difference, of features of variance 1, at which a pixel counts half.
_OUTLIER = 1.0
# Fields move borders out of the image. What they lose beyond this share of the weight
# counts so many times as unlike as all did at the start: else the best field would be
# one that leaves nothing to compare.
_MAY_BE_LOST, _LOST = 0.1, 2.0
# Below this dissimilarity nothing is gained: images that are equal stay finite.
_ALIKE = 1e-2
# What bending counts where a mask says nothing: without any, a tear of the field
# is not held by anything and drifts (2.3 px more error near stains, 2026-11).
_LEAST_STIFFNESS = 0.05
# Mean squared bending below which fields are equally smooth.
_LEAST_BENDING = 3e-3
# Features are averaged down until so many of their pixels lie between knots.
_PIXELS_PER_KNOT = 16
_FINEST_LEVEL = 1
# Sections are compared at 8 px to see how much of their difference is no noise, but
# tissue that has moved on: as if a displacement, which smoothness holds against. A
# network that is trained follows what has moved on, so sections look alike as its own
# field lays src, and it was held the less the more it had followed. So displacements
# that leave a field of control points 128 px apart by less than 3 px count as tissue
# that has moved on: src is laid without them. Larger ones are warps: laid without
# them, too, rough warps are held so stiffly that they are lost (30 px: 2.02 px instead
# of 1.46, A 60 px up to 1.7 instead of 0.3). Mean error without this, and with 1.5, 3
# and 6 px (a pyramid trained by `aligned`, 11 pairs of its own sections; 2026-11):
# sections on themselves 0.25, 0.25, 0.22, 0.18; neighbours warped by 12 px 1.06, 1.05,
# 1.04, 1.03; by 30 px 1.46, 1.47, 1.48, 1.72; with defects 1.20, 1.20, 1.18, 1.16; made
# tissue, a briefly trained pyramid, 1.34, 1.33, 1.28, 1.19.
_STRUCTURE_LEVEL, _STRUCTURE_PX, _MOVED_ON_PX = 3, 128, 3.0
_LEAST_UNLIKE = 0.02
_NO_POWER = 1e-6
# Gauss-Newton takes the loss for more curved than it is, so that twice its step
# is tried first; half of it up to so often.
_FIRST_STEP = 2.0
_TRIALS = 4
_SOLVER_STEPS = 50
_SOLVED = 1e-2  # of the residual
_DAMPING = 1e-3  # of the mean curvature


@dataclass(frozen=True)
class GaussNewtonOptions:
    """How a field is refined.

    Attributes:
        knots_px: distance of the knots that what is added to the field is given
            at, coarse first, powers of 2, pixels. Detail of the field that is
            finer than the last is given up: it is noise of the network.
        smoothness: factor of the root mean square of bending, times the square of
            how unlike the sections are, 0 to 1 (about 0.2 for noise alone, 0.5 for
            neighbours 40 nm apart).
        num_iter: at most so many steps, for all distances together.
        min_gain: a distance ends when a step lowers the loss by less.
        border: px left out of the loss on each side.

    Raises:
        UsageError: no knots, or distances that are no powers of 2 from 4 on.
    """

    knots_px: tuple[int, ...] = (64, 32, 16)
    smoothness: float = 16.0
    num_iter: int = 30
    min_gain: float = 2e-3
    border: int = 1

    def __post_init__(self) -> None:
        powers = all(px >= 4 and px & (px - 1) == 0 for px in self.knots_px)
        if not self.knots_px or not powers:
            raise UsageError(
                f"knots {self.knots_px} px apart: expected powers of 2 from 4 on, "
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
        features: of src and tgt, (B, C, H / 2**level, W / 2**level) rounded up,
            each of mean 0 and variance 1.
        field: (B, 2, H, W), pixels; where to start. Not written into.
        weights: of similarity and of smoothness, at the size of the field.
        options: see `GaussNewtonOptions`.
        level: of the features.

    Returns:
        The best field seen, detached.

    Raises:
        FieldError: `field` is no field of the size of the features and weights.
        UsageError: features of a level that is coarser than the knots.
    """
    _check(features, field, weights, level)
    if (finest := min(options.knots_px)) < 2**level:
        raise UsageError(
            f"knots {finest} px apart on features of level {level}, {2**level} px a "
            f"pixel: give knots of {2**level} px or more"
        )
    with torch.no_grad():
        start = field.detach().float()
        found = _without_detail(start, finest)
        steps, problem = 0, None
        for done, spacing in enumerate(options.knots_px):
            # A share of the steps for each distance, if there are few.
            left = len(options.knots_px) - done
            most = -(-(options.num_iter - steps) // left)
            problem = _Problem(features, found, weights, options, (level, spacing))
            change, made = _search(problem, most)
            steps += made
            found = found + problem.at_full_size(change)
        assert problem is not None
        before, after = problem.compare(start, found)
        found = torch.where(per_sample(after > before), start, found)
        return FinetuneResult(found, before, torch.minimum(before, after), steps)


def _without_detail(field: Tensor, spacing: int) -> Tensor:
    """The field as knots `spacing` px apart can have it."""
    knots = ControlPoints((field.shape[-2], field.shape[-1]), spacing, like=field)
    return knots.expand(knots.mean(field))


def _check(
    features: tuple[Tensor, Tensor],
    field: Tensor,
    weights: tuple[PairWeight, PairWeight],
    level: int,
) -> None:
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


class _State(NamedTuple):
    """The loss of a change and how it goes on from there."""

    loss: Tensor  # (B,)
    gradient: Tensor  # (B, 2, h, w), by the values at the knots
    curvature: Tensor  # (B, 3, H, W), of the loss by each displacement: cc, rr, cr
    stiffness: Tensor  # (B, 1, 1, 1), slope of the loss by the mean squared bending


class _Problem:
    """The loss of what is added to a field at knots of one spacing."""

    def __init__(
        self,
        features: tuple[Tensor, Tensor],
        field: Tensor,
        weights: tuple[PairWeight, PairWeight],
        options: GaussNewtonOptions,
        where: tuple[int, int],
    ) -> None:
        """Bring everything to the scale that fits the knots.

        Args:
            features: of src and tgt.
            field: what is added to, (B, 2, H, W), pixels.
            weights: of similarity and of smoothness.
            options: see `GaussNewtonOptions`.
            where: level of the features, and distance of the knots, px.
        """
        level, spacing = where
        per_knot = int(math.log2(spacing / _PIXELS_PER_KNOT))
        self.scale = max(level, _FINEST_LEVEL, per_knot)
        self._size = field.shape[-2:]
        self._field = downsample_field(field, self.scale)
        self._src, self._tgt = (_mean(f, self.scale - level) for f in features)
        similarity, smoothness = weights
        self._src_weight = _least(similarity.src, self.scale)
        self._tgt_weight = _least(
            inside_border(similarity.tgt, options.border), self.scale
        )
        self._knots = ControlPoints(
            (self._field.shape[-2], self._field.shape[-1]),
            spacing >> self.scale,
            like=field,
        )
        stiffness = self._knots.least(_least(smoothness.along(field), self.scale))
        self._bending = BendingEnergy(stiffness.clamp(min=_LEAST_STIFFNESS), spacing)
        self._due, self._lost_cost = self._weight(self._field), 0.0
        _, here = self._dissimilarity(self._field, warp(self._src, self._field))
        nothing = self._due.sum((1, 2, 3)) == 0
        self._lost_cost = torch.where(nothing, 1.0, (_LOST * here).clamp(max=1.0))
        unlike = self._unlike_structure(_STRUCTURE_LEVEL - self.scale)
        self._smoothness = options.smoothness * unlike.flatten().square()
        self.min_gain = options.min_gain

    def nothing(self) -> Tensor:
        """The change that changes nothing, (B, 2, h, w)."""
        return torch.zeros_like(self._knots.mean(self._field))

    def at_full_size(self, change: Tensor) -> Tensor:
        """A change as it is added to the field, (B, 2, H, W), pixels."""
        rows, cols = self._size
        full = upsample_field(self._knots.expand(change), self.scale)
        return full[..., :rows, :cols]

    def compare(self, start: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """The losses, (B,), of two fields of full size, (B, 2, H, W).

        Both are taken over what `start`, or no field at all, leaves to compare.
        """
        fields = [downsample_field(field, self.scale) for field in (start, found)]
        none = torch.zeros_like(fields[0])
        self._due = torch.maximum(self._weight(fields[0]), self._weight(none))
        before, after = (self._state(f, self.nothing()).loss for f in fields)
        return before, after

    def state(self, change: Tensor) -> _State:
        """Loss of a change, (B, 2, h, w), and how it goes on from there."""
        return self._state(self._field, change)

    def _state(self, start: Tensor, change: Tensor) -> _State:
        field = start + self._knots.expand(change)
        with torch.enable_grad():
            leaf = field.detach().requires_grad_()
            warped = warp(self._src, leaf)
            squares, unlike = self._dissimilarity(field, warped)
            data = torch.log(unlike + _ALIKE)
            (slope,) = torch.autograd.grad(data.sum(), leaf)
        bent = self._knots.mean(start) + change
        bending, stiffness = self._cost_of_bending(bent)
        pull = 2 * stiffness * self._bending.half_gradient(bent)
        share, _ = self._share(field)
        weight = 2 * share * _OUTLIER / (squares.detach() + _OUTLIER).square()
        weight = weight / per_sample(unlike.detach() + _ALIKE)
        return _State(
            data.detach() + bending,
            self._knots.gather(slope) + pull,
            _curvature(warped.detach(), weight),
            stiffness,
        )

    def _cost_of_bending(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """What values at the knots cost, (B,), and its slope, see `_State`."""
        # Bending is of pixels, and a field's are 2**scale of them here.
        squares = 4**self.scale * self._bending.value(values) + _LEAST_BENDING
        cost = self._smoothness * squares.sqrt()
        return cost, per_sample(4**self.scale * cost / (2 * squares))

    def _dissimilarity(self, field: Tensor, warped: Tensor) -> tuple[Tensor, Tensor]:
        """How unlike tgt and src as a field has it are: each pixel, and all, (B,)."""
        share, lost = self._share(field)
        gain = (self._power(self._tgt, share) / self._power(warped, share)).sqrt()
        squares = (gain * warped - self._tgt).square().mean(1, keepdim=True)
        unlike = (share * squares / (squares + _OUTLIER)).sum((1, 2, 3))
        return squares, (1 - lost) * unlike + lost * self._lost_cost

    def _weight(self, field: Tensor) -> Tensor:
        """What each pixel is worth as a field has src, (B, 1, h, w)."""
        return warp(self._src_weight, field) * self._tgt_weight

    def _share(self, field: Tensor) -> tuple[Tensor, Tensor]:
        """What each pixel counts, (B, 1, h, w), and what the lost do, (B,)."""
        weight = self._weight(field)
        total = weight.sum((1, 2, 3), keepdim=True)
        due = self._due.sum((1, 2, 3)).clamp(min=1e-6)
        lost = (self._due - weight).clamp(min=0).sum((1, 2, 3)) / due
        lost = (lost - _MAY_BE_LOST).clamp(min=0) / (1 - _MAY_BE_LOST)
        return weight / torch.where(total > 0, total, 1.0), lost

    def _unlike_structure(self, levels: int) -> Tensor:
        """How unlike the sections are once noise is averaged away, (B, 1, 1, 1).

        Half the mean squared difference of the features, averaged down, in units
        of their power: 0 for equal tissue, 1 for tissue that has nothing in common.
        """
        smooth = _without_detail(self._field, _STRUCTURE_PX >> self.scale)
        detail = self._field - smooth
        moved_px = 2**self.scale * detail.norm(dim=1, keepdim=True)
        smooth = smooth + detail * (1 - torch.exp(-((moved_px / _MOVED_ON_PX) ** 2)))
        warped = warp(self._src, smooth)
        whole = _least((self._weight(smooth) > 0).float(), levels)
        src, tgt = _mean(warped, levels), _mean(self._tgt, levels)
        power = (whole * (src.square() + tgt.square())).sum((1, 2, 3), keepdim=True)
        unlike = (whole * (src - tgt).square()).sum((1, 2, 3), keepdim=True)
        return unlike / (power + _NO_POWER) + _LEAST_UNLIKE

    def _power(self, features: Tensor, share: Tensor) -> Tensor:
        """Mean square of each feature, (B, C, 1, 1).

        That of src is made that of tgt: sampling between pixels averages noise
        away, and fields of half pixels would look alike for that alone.
        """
        return (share * features.square()).sum((2, 3), keepdim=True) + _NO_POWER

    def solve(self, state: _State) -> Tensor:
        """The Gauss-Newton step from a state, (B, 2, h, w): conjugate gradients."""
        cc, rr, cr = state.curvature.split(1, 1)
        damping = _DAMPING * (cc + rr).mean((1, 2, 3), keepdim=True)
        cc, rr = cc + damping, rr + damping
        diagonal = self._knots.gather_squares(torch.cat((cc, rr), 1))
        diagonal += 2 * state.stiffness * self._bending.diagonal()

        def multiply(values: Tensor) -> Tensor:
            d_cols, d_rows = self._knots.expand(values).split(1, 1)
            pulled = torch.cat(
                (cc * d_cols + cr * d_rows, cr * d_cols + rr * d_rows), 1
            )
            bent = self._bending.half_gradient(values)
            return self._knots.gather(pulled) + 2 * state.stiffness * bent

        return _conjugate_gradients(multiply, -state.gradient, diagonal)


def _search(problem: _Problem, max_steps: int) -> tuple[Tensor, int]:
    """The change at the knots that lowers the loss, and the steps it took."""
    change = problem.nothing()
    state, made = problem.state(change), 0
    while made < max_steps:
        made += 1
        step, before = problem.solve(state), state.loss
        change, state = _line_search(problem, change, state, step)
        if bool((before - state.loss < problem.min_gain).all()):
            break
    return change, made


def _line_search(
    problem: _Problem, change: Tensor, state: _State, step: Tensor
) -> tuple[Tensor, _State]:
    """As much of a step, each sample for itself, as lowers the loss."""
    factor = torch.full_like(state.loss, _FIRST_STEP)
    waiting = torch.ones_like(state.loss, dtype=torch.bool)
    for _ in range(_TRIALS):
        trial = change + per_sample(factor) * step
        there = problem.state(trial)
        better = waiting & (there.loss < state.loss)
        change = torch.where(per_sample(better), trial, change)
        state = _State(
            *(
                torch.where(per_sample(better).view(-1, *(1,) * (a.ndim - 1)), b, a)
                for a, b in zip(state, there, strict=True)
            )
        )
        waiting = waiting & ~better
        factor = factor / 2
        if not bool(waiting.any()):
            break
    return change, state


def _conjugate_gradients(
    multiply: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor
) -> Tensor:
    """About the x with multiply(x) = right, each sample for itself."""
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


def _curvature(warped: Tensor, weight: Tensor) -> Tensor:
    """Second derivatives of the loss by displacements, to first order, (B, 3, h, w).

    Args:
        warped: src as it lies, (B, C, h, w).
        weight: of each pixel, (B, 1, h, w).
    """
    padded = F.pad(warped, (1, 1, 1, 1), mode="replicate")
    d_cols = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    d_rows = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    products = (d_cols * d_cols, d_rows * d_rows, d_cols * d_rows)
    return weight * torch.cat([p.mean(1, keepdim=True) for p in products], 1)


def _mean(values: Tensor, levels: int) -> Tensor:
    """(B, C, H, W) averaged down by 2**levels."""
    if levels == 0:
        return values
    return F.avg_pool2d(values, 2**levels, ceil_mode=True, count_include_pad=False)


def _least(values: Tensor, levels: int) -> Tensor:
    """(B, C, H, W) brought down by 2**levels, to the least in each block."""
    return -F.max_pool2d(-values, 2**levels, ceil_mode=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, 2, h, w) twice -> (B, 1, 1, 1)."""
    return (a * b).sum((1, 2, 3), keepdim=True)
