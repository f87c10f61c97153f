"""The search for a better field, for the finetuner.

Nothing waits for the host, so that a GPU is kept busy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metroem.field_loss import FinetuneOptions

_MIN_GAIN = 1e-11
# After a halving a new best is due 5 steps sooner than the period, as in the
# original.
_STEPS_BACK = 5


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


class Search:
    """Adam (or gradient descent) on fields, each sample with a rate of its own.

    Attributes:
        field: what is added to `start` next, (B, 2, H, W), pixels; written over by
            each step.
        best_field: what was added where the loss was lowest; written over likewise.
    """

    def __init__(self, start: Tensor, options: FinetuneOptions) -> None:
        batch = start.new_zeros(start.shape[0])
        self.options = options
        self.start = start
        self.field, self.best_field = torch.zeros_like(start), torch.zeros_like(start)
        self.best_loss = batch + float("inf")
        self.rate = batch + options.rate_px
        self.stale, self.halvings, self.age = batch, batch, batch
        self._mean, self._variance = torch.zeros_like(start), torch.zeros_like(start)
        self._spare = torch.empty_like(start)

    @property
    def finished(self) -> Tensor:
        """(B,) bool: samples whose rate has been halved often enough."""
        return self.halvings >= self.options.max_halvings

    def judge(self, loss: Tensor) -> None:
        """Keep the fields whose loss, (B,), is a new best."""
        better = loss + _MIN_GAIN <= self.best_loss
        self.best_loss = torch.where(better, loss, self.best_loss)
        torch.where(_over(better), self.field, self.best_field, out=self.best_field)
        self.stale = torch.where(better, 0.0, self.stale + 1)

    def step(self, loss: Tensor, gradient: Tensor) -> None:
        """Judge the fields by their loss, (B,), and move them downhill.

        Args:
            loss: of `field`, (B,).
            gradient: of it, (B, 2, H, W); written over.
        """
        self.judge(loss)
        stuck = (self.stale > self.options.patience) & ~self.finished
        self.halvings = self.halvings + stuck
        self.stale = torch.where(stuck, self.stale - _STEPS_BACK, self.stale)
        self.rate = torch.where(stuck, self.rate / 2, self.rate)
        # A new rate starts with a new optimizer.
        self.age = torch.where(stuck, 0.0, self.age)
        kept = _over(torch.where(stuck, 0.0, 1.0))
        norm = gradient.flatten(1).norm(dim=1)
        scale = (self.options.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        gradient.mul_(_over(scale))
        if self.options.weight_decay:
            gradient += self.options.weight_decay * (self.start + self.field)
        rate = torch.where(self.finished, 0.0, self.rate)
        if self.options.momentum is not None:
            self._mean.mul_(self.options.momentum * kept).add_(gradient)
            self.field.sub_(torch.mul(self._mean, _over(rate), out=self._spare))
        else:
            self._adam(gradient, rate, kept)

    def _adam(self, gradient: Tensor, rate: Tensor, kept: Tensor) -> None:
        self.age = self.age + 1
        self._mean.mul_(0.9 * kept).add_(gradient, alpha=0.1)
        self._variance.mul_(0.999 * kept).addcmul_(gradient, gradient, value=0.001)
        # As mean / (1 - 0.9^n) over the root of variance / (1 - 0.999^n).
        root = (1 - 0.999**self.age).sqrt()
        spread = torch.sqrt(self._variance, out=self._spare).add_(_over(1e-8 * root))
        step = torch.div(self._mean, spread, out=self._spare)
        self.field.sub_(step.mul_(_over(rate * root / (1 - 0.9**self.age))))


def _over(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)
