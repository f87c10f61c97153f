"""Optimise the field of one pair by Adam, as the original does."""

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
# After a halving a new best is due 5 steps sooner than the period, as in the
# original.
_STEPS_BACK = 5
# Of the changes of a search at several scales; (0, 1, 2, 3) and (0, ..., 5) end no
# lower. Its rate falls over the second half: the last steps are to settle.
_LEVELS = (0, 2, 4)
_LAST_RATE = 0.1
# Share of the weight that a field may lose for nothing.
_MAY_BE_LOST = 0.1
# How many steps pass between looks at whether all samples are done: a look
# makes the host wait for a GPU.
_LOOK_EVERY = 25


class FinetuneResult(NamedTuple):
    """A finetuned field and what it gained."""

    field: Tensor  # (B, 2, H, W), pixels
    loss_before: Tensor  # (B,), of the field it started from
    loss_after: Tensor  # (B,), of the field returned; never above loss_before
    iterations: int  # steps made


def summary(results: Sequence[FinetuneResult]) -> str:
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


class FieldAdam:
    """Adam (or gradient descent) on fields, each sample with a rate of its own.

    Attributes:
        field: whose loss is asked for next, (B, 2, H, W), pixels.
        best_loss: the lowest so far, (B,).
    """

    def __init__(self, start: Tensor, options: AdamOptions) -> None:
        """Begin at a field, (B, 2, H, W), pixels; it is not written into."""
        self.options = options
        self._start = start
        several = options.at_several_scales
        self._levels = _LEVELS if several else (options.coarseness,)
        sizes = [[-(-n // 2**at) for n in start.shape[-2:]] for at in self._levels]
        # What is added at each level, in its own pixels, and where it was best.
        self._changes = [start.new_zeros(len(start), 2, *size) for size in sizes]
        self._best = [torch.zeros_like(change) for change in self._changes]
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
        """(B,) bool: samples whose rate has been halved often enough."""
        return self.halvings >= self.options.max_halvings

    @property
    def best_field(self) -> Tensor:
        """The field whose loss was lowest, (B, 2, H, W), pixels."""
        return self._with(self._best, out=torch.empty_like(self.field))

    def judge(self, loss: Tensor) -> None:
        """Keep the fields whose loss, (B,), is a new best."""
        better = loss + _MIN_GAIN <= self.best_loss
        torch.where(better, loss, self.best_loss, out=self.best_loss)
        for change, best in zip(self._changes, self._best, strict=True):
            torch.where(per_sample(better), change, best, out=best)
        self.stale.add_(1).masked_fill_(better, 0)

    def step(self, loss: Tensor, gradient: Tensor) -> None:
        """Judge the fields by their loss, (B,), and move them downhill.

        All that changes is written where it was, so that a GPU can repeat a step that
        was recorded.

        Args:
            loss: of `field`, (B,).
            gradient: of it, (B, 2, H, W); written over.
        """
        self.judge(loss)
        stuck = (self.stale > self.options.patience) & ~self.finished
        self.halvings += stuck
        self.stale -= _STEPS_BACK * stuck
        self.rate /= 1 + stuck.to(self.rate.dtype)
        # A new rate starts with a new optimizer.
        self.age.masked_fill_(stuck, 0).add_(1)
        kept = per_sample(torch.where(stuck, 0.0, 1.0))
        norm = gradient.flatten(1).norm(dim=1)
        scale = (self.options.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        gradient.mul_(per_sample(scale))
        if self.options.weight_decay:
            gradient.add_(self.field, alpha=self.options.weight_decay)
        rate = torch.where(self.finished, 0.0, self.rate * self._share_of_rate())
        move = self._adam if self.options.momentum is None else self._descend
        coarse = 0
        for index, level in enumerate(self._levels):
            gradient = _coarser(gradient, level - coarse)
            coarse = level
            move(index, gradient, rate, kept)
        self._with(self._changes, out=self.field)

    def _share_of_rate(self) -> Tensor | float:
        """What is left of the rate, for one step more."""
        if not self.options.at_several_scales:
            return 1.0
        self._steps += 1
        late = (2 * self._steps / self.options.num_steps - 1).clamp(min=0)
        return 1 - (1 - _LAST_RATE) * late

    def _with(self, changes: Sequence[Tensor], *, out: Tensor) -> Tensor:
        """The field that the search began at with changes, (B, 2, H, W), pixels."""
        total, at = changes[-1], self._levels[-1]
        for level, change in zip(self._levels[-2::-1], changes[-2::-1], strict=True):
            total = _finer(total, at - level, like=change) + change
            at = level
        fine = _finer(total, at, like=self._start)
        return torch.add(fine, self._start, out=out)

    def _descend(
        self, index: int, gradient: Tensor, rate: Tensor, kept: Tensor
    ) -> None:
        mean = self._mean[index].mul_((self.options.momentum or 0.0) * kept)
        step = torch.mul(mean.add_(gradient), per_sample(rate), out=self._spare[index])
        self._changes[index].sub_(step)

    def _adam(self, index: int, gradient: Tensor, rate: Tensor, kept: Tensor) -> None:
        mean = self._mean[index].mul_(0.9 * kept).add_(gradient, alpha=0.1)
        variance = self._variance[index].mul_(0.999 * kept)
        variance.addcmul_(gradient, gradient, value=0.001)
        # As mean / (1 - 0.9^n) over the root of variance / (1 - 0.999^n).
        root = (1 - 0.999**self.age).sqrt()
        spread = torch.sqrt(variance, out=self._spare[index]).add_(
            per_sample(1e-8 * root)
        )
        step = torch.div(mean, spread, out=self._spare[index])
        # All move as far, in pixels of the finest.
        rate = rate / 2 ** (self._levels[index] - self._levels[0])
        step.mul_(per_sample(rate * root / (1 - 0.9**self.age)))
        self._changes[index].sub_(step)


def _finer(change: Tensor, levels: int, *, like: Tensor) -> Tensor:
    """A change brought so many levels finer, cut to the size of another."""
    if levels == 0:
        return change
    rows, cols = like.shape[-2:]
    # The small one is scaled, for speed.
    fine = F.interpolate(change * 2**levels, scale_factor=2**levels, mode="bilinear")
    return fine[..., :rows, :cols]


def _coarser(gradient: Tensor, levels: int) -> Tensor:
    """The gradient by a change that is so many levels coarser, as `_finer` has it."""
    if levels == 0:
        return gradient
    scale = 2**levels
    if can_use_triton(gradient):
        from metroem.finetune import triton_kernels as kernels

        return kernels.coarser(gradient, scale)
    rows, cols = gradient.shape[-2:]
    whole = F.pad(gradient, (0, -cols % scale, 0, -rows % scale))
    size = [*gradient.shape[:2], whole.shape[-2] // scale, whole.shape[-1] // scale]
    # As autograd has it, without the graph.
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
        src: (B, C, H, W) features as they are compared (normalised, without
            the image channel, 0 where there is no data).
        tgt: (B, C, H, W).
        field: (B, 2, H, W), pixels; where to start. Not written into.
        similarity_weight: weights of the features.
        smoothness_weight: weights of the rigidity.
        options: see `AdamOptions`.

    Returns:
        The best field seen, detached.

    Raises:
        FieldError: `field` is no field of the size of the features.
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
        if steps % _LOOK_EVERY == 0 and bool(search.finished.all()):
            break
    # The last step has not been judged yet.
    search.judge(loss.with_gradient(search.field)[0])
    lost = [_lost(similarity_weight, start, one) for one in (start, search.best_field)]
    # What is lost counts twice as much as the mean of what was there: else the best
    # field would be one that leaves nothing to compare.
    cost = 2 * loss_before
    better = search.best_loss + cost * lost[1] < loss_before + cost * lost[0]
    better &= search.best_loss < loss_before
    found = torch.where(better.view(-1, 1, 1, 1), search.best_field, start)
    loss_after = torch.where(better, search.best_loss, loss_before)
    return FinetuneResult(found, loss_before, loss_after, steps)


def _lost(weight: PairWeight, start: Tensor, field: Tensor) -> Tensor:
    """Share of what a start, or no field, leaves to compare and a field loses, (B,).

    Borders that move out of the image are no loss.
    """
    due = torch.maximum(weight.along(start), weight.along(torch.zeros_like(start)))
    lost = (due - weight.along(field)).clamp(min=0).sum((1, 2, 3))
    return (lost / due.sum((1, 2, 3)).clamp(min=1e-6) - _MAY_BE_LOST).clamp(min=0)
