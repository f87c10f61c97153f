"""Optimise the field of one pair by Adam, as the original does.

The field is start + sum of changes, one at each level (0, 2, 4: every pixel, every 4th,
every 16th), bilinear between its pixels. All changes are optimised at once. Each sample
of a batch has its own rate, which is halved when its loss no longer falls. The best
field of each sample is kept. A change of one level alone is found with `coarseness`.

Source: the original's `finetuner.py`, whose loss, clipping and halving are kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.errors import FieldError
from metroem.finetune.analytic_loss import (
    AdamOptions,
    AnalyticLoss,
    can_use_triton,
    per_sample,
)
from metroem.geometry.field import check_field
from metroem.imaging.loss_weights import PairWeight
from metroem.utils.cuda_graphs import RecordedStep

_MIN_GAIN = 1e-11
# The first new best after a halving is due 5 steps sooner than later ones, as in the
# original. So `stale` is reduced by 5, not set to 0.
_STEPS_BACK = 5
# Levels of the changes; (0, 1, 2, 3) and (0, ..., 5) do not end lower.
_LEVELS = (0, 2, 4)
# The rate falls over the second half of the steps to this fraction, so that the field
# settles.
_LAST_RATE = 0.1
# Fraction of the weight that a field may lose without a cost.
_FREE_LOSS = 0.1
# Steps between checks whether all samples are finished. A check makes the host wait
# for the GPU.
_CHECK_EVERY = 25


class FinetuneResult(NamedTuple):
    """A finetuned field, and its loss before and after."""

    field: Tensor  # (B, 2, H, W), pixels
    loss_before: Tensor  # (B,), of the start field
    loss_after: Tensor  # (B,), of the returned field; never above loss_before
    iterations: int  # number of steps


def summary(results: Sequence[FinetuneResult]) -> str:
    """Describe in one line how the loss fell: means over samples and over results."""
    before, after = (
        float(torch.cat([getattr(one, name).cpu() for one in results]).mean())
        for name in ("loss_before", "loss_after")
    )
    steps = sum(one.iterations for one in results) / len(results)
    return (
        f"finetuned {len(results)} pairs: loss {before:.4g} -> {after:.4g} in "
        f"{steps:.1f} steps (means)"
    )


class FieldAdam:
    """Adam (or gradient descent) on fields, each sample with its own rate.

    Attributes:
        field: the field to evaluate next, (B, 2, H, W), pixels.
        best_loss: the lowest loss so far, (B,).
        rate: of each sample, pixels of the finest level a step, (B,).
        stale: steps since the last new best, (B,).
        halvings: how often the rate was halved, (B,).
        age: steps of the optimizer since its last reset, (B,).
    """

    def __init__(self, start: Tensor, options: AdamOptions) -> None:
        """Start at a field, (B, 2, H, W), pixels; it is not written into."""
        self.options = options
        self._start = start
        several = options.at_several_scales
        self._levels = _LEVELS if several else (options.coarseness,)
        sizes = [[-(-n // 2**at) for n in start.shape[-2:]] for at in self._levels]
        # The change of each level, in pixels of the level, and the best one so far.
        self._changes = [start.new_zeros(len(start), 2, *size) for size in sizes]
        self._best = [torch.zeros_like(change) for change in self._changes]
        # First and second moments of Adam.
        self._mean = [torch.zeros_like(change) for change in self._changes]
        self._variance = [torch.zeros_like(change) for change in self._changes]
        self._spare = [torch.empty_like(change) for change in self._changes]
        batch = start.new_zeros(len(start))
        self.best_loss = batch + float("inf")
        self.rate = batch + options.rate_px
        self.stale, self.halvings, self.age = (batch.clone() for _ in range(3))
        self._steps = start.new_zeros((), dtype=torch.float64)
        self.field = start.clone()

    @property
    def finished(self) -> Tensor:
        """(B,) bool: samples whose rate was halved `max_halvings` times."""
        return self.halvings >= self.options.max_halvings

    @property
    def best_field(self) -> Tensor:
        """The field with the lowest loss, (B, 2, H, W), pixels."""
        return self._add_changes(self._best, out=torch.empty_like(self.field))

    def update_best(self, loss: Tensor) -> None:
        """Keep the fields of samples whose loss, (B,), is a new best."""
        better = loss + _MIN_GAIN <= self.best_loss
        torch.where(better, loss, self.best_loss, out=self.best_loss)
        for change, best in zip(self._changes, self._best, strict=True):
            torch.where(per_sample(better), change, best, out=best)
        self.stale.add_(1).masked_fill_(better, 0)

    def step(self, loss: Tensor, gradient: Tensor) -> None:
        """Keep new bests, then move the fields downhill.

        All state is updated in place, so that a GPU can replay a recorded step.

        Args:
            loss: loss of `field`, (B,).
            gradient: gradient of the loss by `field`, (B, 2, H, W); overwritten.
        """
        self.update_best(loss)
        stuck = (self.stale > self.options.patience) & ~self.finished
        self.halvings += stuck
        self.stale -= _STEPS_BACK * stuck
        self.rate /= 1 + stuck.to(self.rate.dtype)
        # The optimizer is reset when the rate changes.
        self.age.masked_fill_(stuck, 0).add_(1)
        not_reset = per_sample(torch.where(stuck, 0.0, 1.0))
        norm = gradient.flatten(1).norm(dim=1)
        scale = (self.options.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        gradient.mul_(per_sample(scale))
        if self.options.weight_decay:
            gradient.add_(self.field, alpha=self.options.weight_decay)
        rate = torch.where(self.finished, 0.0, self.rate * self._rate_decay())
        move = self._adam if self.options.momentum is None else self._gradient_descent
        coarse = 0
        for index, level in enumerate(self._levels):
            gradient = _upsample_transpose(gradient, level - coarse)
            coarse = level
            move(index, gradient, rate, not_reset)
        self._add_changes(self._changes, out=self.field)

    def _rate_decay(self) -> Tensor | float:
        """Count a step, and give the factor of its rate."""
        if not self.options.at_several_scales:
            return 1.0
        self._steps += 1
        late = (2 * self._steps / self.options.num_steps - 1).clamp(min=0)
        return 1 - (1 - _LAST_RATE) * late

    def _add_changes(self, changes: Sequence[Tensor], *, out: Tensor) -> Tensor:
        """Add changes of all levels to the start field: (B, 2, H, W), pixels."""
        total, at = changes[-1], self._levels[-1]
        for level, change in zip(self._levels[-2::-1], changes[-2::-1], strict=True):
            total = _upsample(total, at - level, like=change) + change
            at = level
        fine = _upsample(total, at, like=self._start)
        return torch.add(fine, self._start, out=out)

    def _gradient_descent(
        self, index: int, gradient: Tensor, rate: Tensor, not_reset: Tensor
    ) -> None:
        """Move one level by gradient descent with momentum."""
        mean = self._mean[index].mul_((self.options.momentum or 0.0) * not_reset)
        step = torch.mul(mean.add_(gradient), per_sample(rate), out=self._spare[index])
        self._changes[index].sub_(step)

    def _adam(
        self, index: int, gradient: Tensor, rate: Tensor, not_reset: Tensor
    ) -> None:
        """Move one level by Adam, with beta 0.9 and 0.999."""
        mean = self._mean[index].mul_(0.9 * not_reset).add_(gradient, alpha=0.1)
        variance = self._variance[index].mul_(0.999 * not_reset)
        variance.addcmul_(gradient, gradient, value=0.001)
        # The step is mean / (1 - 0.9^n) / (sqrt(variance / (1 - 0.999^n)) + 1e-8).
        root = (1 - 0.999**self.age).sqrt()
        deviation = torch.sqrt(variance, out=self._spare[index]).add_(
            per_sample(1e-8 * root)
        )
        step = torch.div(mean, deviation, out=self._spare[index])
        # All levels move equally far in pixels of the finest one.
        rate = rate / 2 ** (self._levels[index] - self._levels[0])
        step.mul_(per_sample(rate * root / (1 - 0.9**self.age)))
        self._changes[index].sub_(step)


def _upsample(change: Tensor, levels: int, *, like: Tensor) -> Tensor:
    """Resample a change to a finer level, and crop it to the size of `like`."""
    if levels == 0:
        return change
    rows, cols = like.shape[-2:]
    # Scaled while it is small, for speed.
    fine = F.interpolate(change * 2**levels, scale_factor=2**levels, mode="bilinear")
    return fine[..., :rows, :cols]


def _upsample_transpose(gradient: Tensor, levels: int) -> Tensor:
    """Turn a gradient by a change into the gradient by a coarser change.

    This is the transpose of `_upsample`.
    """
    if levels == 0:
        return gradient
    scale = 2**levels
    if can_use_triton(gradient):
        from metroem.finetune import triton_kernels as kernels

        return kernels.upsample_transpose(gradient, scale)
    rows, cols = gradient.shape[-2:]
    whole = F.pad(gradient, (0, -cols % scale, 0, -rows % scale))
    size = [*gradient.shape[:2], whole.shape[-2] // scale, whole.shape[-1] // scale]
    # The backward pass of F.interpolate, without a graph.
    found = torch.ops.aten.upsample_bilinear2d_backward(
        whole, list(whole.shape[-2:]), size, False, scale, scale
    )
    return found * scale


def finetune_adam(
    src: Tensor,
    tgt: Tensor,
    field: Tensor,
    similarity_weight: PairWeight,
    smoothness_weight: PairWeight,
    options: AdamOptions,
) -> FinetuneResult:
    """Improve a field on the features of its pair.

    Args:
        src: (B, C, H, W) features to compare: normalised, without the image channel,
            0 where there is no data.
        tgt: (B, C, H, W).
        field: start field, (B, 2, H, W), pixels. Not written into.
        similarity_weight: weights of the features' differences.
        smoothness_weight: weights of the rigidity.
        options: see `AdamOptions`.

    Returns:
        The best field found, detached.

    Raises:
        FieldError: `field` is not a field of the size of the features.
    """
    check_field(field)
    if field.shape[-2:] != src.shape[-2:] or src.shape != tgt.shape:
        raise FieldError(
            f"features of {tuple(src.shape)} and {tuple(tgt.shape)} and a field of "
            f"{tuple(field.shape)}: sizes must be equal"
        )
    features, weights = (
        (src.detach(), tgt.detach()),
        (similarity_weight, smoothness_weight),
    )
    loss = AnalyticLoss(features, weights, options)
    start = field.detach().float()
    loss_before, _ = loss.with_gradient(start)
    search = FieldAdam(start, options)
    step = RecordedStep(lambda: search.step(*loss.with_gradient(search.field)))
    steps = 0
    for steps in range(1, options.num_steps + 1):
        step(start.device)
        if steps % _CHECK_EVERY == 0 and bool(search.finished.all()):
            break
    # The field of the last step has not been evaluated yet.
    search.update_best(loss.with_gradient(search.field)[0])
    lost = [
        _lost_fraction(similarity_weight, start, one)
        for one in (start, search.best_field)
    ]
    # Lost weight costs twice the mean loss at the start. Otherwise the best field would
    # be one that leaves nothing to compare.
    cost = 2 * loss_before
    better = search.best_loss + cost * lost[1] < loss_before + cost * lost[0]
    better &= search.best_loss < loss_before
    found = torch.where(better.view(-1, 1, 1, 1), search.best_field, start)
    loss_after = torch.where(better, search.best_loss, loss_before)
    return FinetuneResult(found, loss_before, loss_after, steps)


def _lost_fraction(weight: PairWeight, start: Tensor, field: Tensor) -> Tensor:
    """Compute the fraction of the weight that a field loses, (B,).

    A pixel's due weight is its weight with the start field or with no field, whichever
    is larger. The first `_FREE_LOSS` of the sum is free: borders move out of the image.
    """
    due = torch.maximum(weight.along(start), weight.along(torch.zeros_like(start)))
    lost = (due - weight.along(field)).clamp(min=0).sum((1, 2, 3))
    return (lost / due.sum((1, 2, 3)).clamp(min=1e-6) - _FREE_LOSS).clamp(min=0)
