"""The loss of one field and the search for a better one, for the finetuner.

The gradient is written out, but for the sampling of the features: a step then
takes half the time of autograd's (520 px, 7 features, 1 core: 86 ms before).
Nothing waits for the host, so that a GPU is kept busy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metroem.field import warp
from metroem.masks import PairWeight

_MIN_GAIN = 1e-11
# After a halving a new best is due 5 steps sooner than the period, as in the
# original.
_STEPS_BACK = 5
# (cols, rows) from a pixel to the neighbours that it has springs to; those to
# the other four are the neighbours' own.
_SPRINGS = ((0, 1), (1, 0), (1, 1), (1, -1))
_NUM_NEIGHBOURS = 8
# Border where the rigidity of the original is not defined, px.
_RIGIDITY_BORDER = 2


@dataclass(frozen=True)
class FinetuneOptions:
    """How a field is finetuned.

    Attributes:
        smoothness: factor of rigidity.
        rate_px: rate of the first steps, pixels a step.
        num_iter: at most so many steps.
        border: px left out of the loss on each side.
        l2: factor of the mean squared displacement.
        patience: steps without a new best after which the rate is halved.
        max_halvings: a sample ends after so many.
        max_grad_norm: gradients are clipped to this norm, per sample.
        coarseness: what is added to the field is found so many levels coarser,
            so that it bends over 2**coarseness pixels; `rate_px` is then in
            those coarser pixels. Detail of the field itself stays.
        weight_decay: of the field, as torch.optim.Adam has it.
        momentum: None for Adam; a number for gradient descent with it.
    """

    smoothness: float = 30.0
    rate_px: float = 0.1
    num_iter: int = 100
    border: int = 1
    l2: float = 1e-4
    patience: int = 50
    max_halvings: int = 15
    max_grad_norm: float = 0.49
    coarseness: int = 0
    weight_decay: float = 0.0
    momentum: float | None = None


class Finetuned(NamedTuple):
    """A finetuned field and what it gained."""

    field: Tensor  # (B, 2, H, W), pixels
    loss_before: Tensor  # (B,), of the field it started from
    loss_after: Tensor  # (B,), of the field returned; never above loss_before
    iterations: int  # steps made


def summary(results: Sequence[Finetuned]) -> str:
    """What finetuning gained, in one line: means over samples and over results."""
    before, after = (
        float(torch.cat([getattr(one, name).cpu() for one in results]).mean())
        for name in ("loss_before", "loss_after")
    )
    steps = sum(one.iterations for one in results) / len(results)
    return (
        f"finetuned {len(results)} pairs: loss {before:.4g} -> {after:.4g} in "
        f"{steps:.1f} steps (means)"
    )


class FieldLoss:
    """Similarity + smoothness * rigidity + l2 * mean(field^2), per sample.

    The same numbers as `metroem.loss` gives for a batch of one, with weights
    that follow the field but have no gradient: a field must not gain by moving
    what is masked.
    """

    def __init__(
        self,
        features: tuple[Tensor, Tensor],
        weights: tuple[PairWeight, PairWeight],
        options: FinetuneOptions,
    ) -> None:
        """Keep what is constant over the search.

        Args:
            features: of src and tgt, (B, C, H, W).
            weights: of similarity and of rigidity.
            options: see `FinetuneOptions`.
        """
        self.src, self.tgt = features
        self.options = options
        similarity, smoothness = weights
        rows, cols = self.src.shape[-2:]
        counts = [inside_border(similarity.tgt, options.border)]
        counts += [inside_border(smoothness.tgt, options.border)]
        self.tgt_weights = torch.cat(counts, 1)
        self.src_weights = torch.cat((similarity.src, smoothness.src), 1)
        # Where the rigidity of the original is 0 by definition.
        self.defined = inside_border(torch.ones_like(smoothness.tgt), _RIGIDITY_BORDER)
        # Whole tissue is the rule, and warping ones gives ones.
        self.moving = not bool((self.src_weights == 1).all())

    def with_gradient(self, field: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, (B,), of a field, (B, 2, H, W) px, and its gradient."""
        with torch.no_grad():
            shares = self._shares(field)
            options = self.options
            alike, gradient = self._similarity(field, shares[:, :1])
            share = options.smoothness * shares[:, 1:] * self.defined
            strain, pull = _rigidity(field, share)
            size = field[0].numel()
            squares = (field**2).sum((1, 2, 3)) / size
            gradient += pull
            gradient.add_(field, alpha=2 * options.l2 / size)
            return alike + strain + options.l2 * squares, gradient

    def _shares(self, field: Tensor) -> Tensor:
        """What each pixel is worth in each mean, (B, 2, H, W)."""
        weights = self.tgt_weights
        if self.moving:
            weights = warp(self.src_weights, field, padding="border") * weights
        total = weights.sum((2, 3), keepdim=True)
        return weights / torch.where(total > 0, total, 1.0)

    def _similarity(self, field: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = field.detach().requires_grad_()
            warped = warp(self.src, leaf)
        difference = warped.detach() - self.tgt
        share = share / difference.shape[1]
        weighted = difference * share
        value = (weighted * difference).sum((1, 2, 3))
        (gradient,) = torch.autograd.grad(warped, leaf, weighted.mul_(2))
        return value, gradient


class Search:
    """Adam (or gradient descent) on fields, each sample with a rate of its own.

    Attributes:
        field: what is added to `start` next, (B, 2, H, W), pixels.
        best_field: what was added where the loss was lowest.
    """

    def __init__(self, start: Tensor, options: FinetuneOptions) -> None:
        batch = start.new_zeros(start.shape[0])
        self.options = options
        self.start = start
        self.field = self.best_field = torch.zeros_like(start)
        self.best_loss = batch + float("inf")
        self.rate = batch + options.rate_px
        self.stale, self.halvings, self.age = batch, batch, batch
        self.mean = self.variance = self.field

    @property
    def finished(self) -> Tensor:
        """(B,) bool: samples whose rate has been halved often enough."""
        return self.halvings >= self.options.max_halvings

    def judge(self, loss: Tensor) -> None:
        """Keep the fields whose loss, (B,), is a new best."""
        better = loss + _MIN_GAIN <= self.best_loss
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_field = torch.where(_over(better), self.field, self.best_field)
        self.stale = torch.where(better, 0.0, self.stale + 1)

    def step(self, loss: Tensor, gradient: Tensor) -> None:
        """Judge the fields by their loss, (B,), and move them downhill."""
        self.judge(loss)
        stuck = (self.stale > self.options.patience) & ~self.finished
        self.halvings = self.halvings + stuck
        self.stale = torch.where(stuck, self.stale - _STEPS_BACK, self.stale)
        self.rate = torch.where(stuck, self.rate / 2, self.rate)
        # A new rate starts with a new optimizer.
        self.age = torch.where(stuck, 0.0, self.age)
        self.mean = torch.where(_over(stuck), 0.0, self.mean)
        self.variance = torch.where(_over(stuck), 0.0, self.variance)
        norm = gradient.flatten(1).norm(dim=1)
        scale = (self.options.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        gradient = gradient * _over(scale)
        if self.options.weight_decay:
            gradient += self.options.weight_decay * (self.start + self.field)
        rate = torch.where(self.finished, 0.0, self.rate)
        self.field = self.field - _over(rate) * self._direction(gradient)

    def _direction(self, gradient: Tensor) -> Tensor:
        if self.options.momentum is not None:
            self.mean = self.options.momentum * self.mean + gradient
            return self.mean
        self.age = self.age + 1
        self.mean = torch.lerp(self.mean, gradient, 0.1)
        self.variance = torch.lerp(self.variance, gradient**2, 0.001)
        mean = self.mean / _over(1 - 0.9**self.age)
        variance = self.variance / _over(1 - 0.999**self.age)
        return mean / (variance.sqrt() + 1e-8)


def _over(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def inside_border(weight: Tensor, border: int) -> Tensor:
    """The weight, (B, 1, H, W), with 0 in a border."""
    rows, cols = weight.shape[-2:]
    inside = torch.zeros_like(weight)
    area = (..., slice(border, rows - border), slice(border, cols - border))
    inside[area] = weight[area]
    return inside


def _rigidity(field: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of `share` times the rigidity of each pixel, (B,), and its gradient.

    A spring counts at both of its ends, an eighth of the rigidity at each.

    Args:
        field: (B, 2, H, W), pixels.
        share: (B, 1, H, W), 0 at the very border.
    """
    value = field.new_zeros(field.shape[0])
    gradient = torch.zeros_like(field)
    for d_cols, d_rows in _SPRINGS:
        near, far = _ends(field.shape[-2:], d_cols, d_rows)
        spring = field[far] - field[near]
        spring[:, 0] += d_cols
        spring[:, 1] += d_rows
        # hypot, since vector_norm over 2 channels took 80 times as long.
        length = torch.hypot(spring[:, :1], spring[:, 1:]).clamp_(min=1e-6)
        stretch = length - (d_cols**2 + d_rows**2) ** 0.5
        weighted = (share[near] + share[far]).mul_(stretch).div_(_NUM_NEIGHBOURS)
        value += (weighted * stretch).sum((1, 2, 3))
        spring *= weighted.mul_(2).div_(length)
        gradient[far] += spring
        gradient[near] -= spring
    return value, gradient


def _ends(shape: torch.Size, d_cols: int, d_rows: int) -> tuple[tuple, tuple]:
    """Indices of the pixels p and p + d, for all p that have such a neighbour."""
    rows, cols = shape
    low, high = max(0, -d_rows), rows - max(0, d_rows)
    near = (..., slice(low, high), slice(0, cols - d_cols))
    far = (..., slice(low + d_rows, high + d_rows), slice(d_cols, cols))
    return near, far
