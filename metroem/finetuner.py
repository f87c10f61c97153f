"""A field optimised directly on the features of its pair.

Minimises similarity + smoothness * rigidity + l2 * mean(field^2) by Adam on the
field itself, each sample of a batch for itself. The best field seen is kept, so
the result is never worse by this loss than the field it started from.

Source: the original's `finetuner.py`, whose loss, clipping and schedule of
rates are kept.
"""

import json
import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metroem.errors import FieldError, UsageError
from metroem.field import check_field, downsample_field, upsample_field, warp
from metroem.loss import normalize_features, rigidity_map
from metroem.masks import MaskRules, PairMaps, PairWeight, weigh
from metroem.specs.schedule import _rules as parse_mask_rules

logger = logging.getLogger(__name__)

_MIN_GAIN = 1e-11
# After a halving a new best is due 5 steps sooner than the period, as in the
# original.
_STEPS_BACK = 5
# How many steps pass between looks at whether all samples are done: a look
# makes the host wait for a GPU.
_LOOK_EVERY = 25


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
        coarseness: optimise a field so many levels coarser.
        weight_decay: as torch.optim.Adam has it.
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


def finetune_field(
    src: Tensor,
    tgt: Tensor,
    field: Tensor,
    similarity_weight: PairWeight,
    smoothness_weight: PairWeight,
    options: FinetuneOptions,
) -> Finetuned:
    """Improve a field on the features of its pair.

    Args:
        src: (B, C, H, W) features as they are compared (normalised, without
            the image channel, 0 where there is no data).
        tgt: (B, C, H, W).
        field: (B, 2, H, W), pixels; where to start. Not written into.
        similarity_weight: weights of the features.
        smoothness_weight: weights of the rigidity.
        options: see `FinetuneOptions`.

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
    loss = _FieldLoss(features, weights, options)
    start = field.detach().float()
    parameter = downsample_field(start, options.coarseness)
    with torch.no_grad():
        loss_before = loss(start)
    search = _Search(parameter, options)
    steps = 0
    for steps in range(1, options.num_iter + 1):
        search.step(*_loss_and_gradient(loss, search.field, start))
        if steps % _LOOK_EVERY == 0 and bool(search.finished.all()):
            break
    with torch.no_grad():
        # The last step has not been judged yet.
        search.judge(loss(_at_size_of(start, search.field, options)))
        found = _at_size_of(start, search.best_field, options)
        better = search.best_loss < loss_before
        found = torch.where(better.view(-1, 1, 1, 1), found, start)
    return Finetuned(
        found, loss_before, torch.where(better, search.best_loss, loss_before), steps
    )


def optimize_pre_post_ups(
    src: Tensor,
    tgt: Tensor,
    initial_res: Tensor,
    sm: float,
    lr: float,
    num_iter: int,
    src_defects: Tensor | None,
    tgt_defects: Tensor | None,
    src_zeros: Tensor,
    tgt_zeros: Tensor,
    opt_params: dict[str, Any] | None = None,
    opt_mode: str = "adam",
    crop: int = 16,
    noimpr_period: int = 50,
    opt_res_coarsness: int = 0,
    wd: float = 0,
    l2: float = 1e-4,
    normalize: bool = True,
    sm_keys_to_apply: dict[str, Any] | None = None,
    mse_keys_to_apply: dict[str, Any] | None = None,
    verbose: bool = False,
    max_bad: int = 15,
) -> Tensor:
    """`finetune_field` in the form the original gives it, for code that calls it.

    Args:
        src: (B, C, H, W) features.
        tgt: (B, C, H, W).
        initial_res: field to start from, (B, 2, H, W), pixels.
        sm: factor of rigidity.
        lr: rate of the first steps, pixels a step.
        num_iter: at most so many steps.
        src_defects: mask of defects, (H, W) to (B, 1, H, W), or None.
        tgt_defects: likewise.
        src_zeros: mask of "no data", (H, W) to (B, 1, H, W).
        tgt_zeros: likewise.
        opt_params: {"momentum": ...} for `opt_mode` "sgd".
        opt_mode: "adam" or "sgd".
        crop: border left out of the loss, px.
        noimpr_period: steps without a new best after which lr is halved.
        opt_res_coarsness: optimise a field so many levels coarser.
        wd: weight decay.
        l2: factor of the mean squared displacement.
        normalize: bring each feature to mean 0 and std 1 first.
        sm_keys_to_apply: mask rules of rigidity, as in a schedule.
        mse_keys_to_apply: mask rules of similarity.
        verbose: log the losses.
        max_bad: how often lr is halved before the search ends.

    Returns:
        The field as a torchfields `Field`, (B, 2, H, W), pixels.

    Raises:
        UsageError: an unknown `opt_mode`, option of it, or mask rule.
    """
    options = FinetuneOptions(
        smoothness=sm,
        rate_px=lr,
        num_iter=num_iter,
        border=crop,
        l2=l2,
        patience=noimpr_period,
        max_halvings=max_bad,
        coarseness=opt_res_coarsness,
        weight_decay=wd,
        momentum=_momentum(opt_mode, opt_params or {}),
    )
    src, tgt, field = (plain_batch(t).float() for t in (src, tgt, initial_res))
    no_data = [plain_batch(mask) != 0 for mask in (src_zeros, tgt_zeros)]
    maps = PairMaps(
        _marked(src, no_data[0]),
        _marked(tgt, no_data[1]),
        *(
            None if d is None else plain_batch(d) != 0
            for d in (src_defects, tgt_defects)
        ),
    )
    similarity_weight = weigh(_rules(mse_keys_to_apply, "mse_keys_to_apply"), maps)
    smoothness_weight = weigh(_rules(sm_keys_to_apply, "sm_keys_to_apply"), maps)
    if normalize:
        src = normalize_features(src, ~no_data[0])
        tgt = normalize_features(tgt, ~no_data[1])
    tuned = finetune_field(
        src, tgt, field, similarity_weight, smoothness_weight, options
    )
    log = logger.info if verbose else logger.debug
    before, after = tuned.loss_before.tolist(), tuned.loss_after.tolist()
    log("finetuned: loss %s -> %s in %d steps", before, after, tuned.iterations)
    return as_torchfields(tuned.field)


def plain_batch(values: Tensor) -> Tensor:
    """(H, W) to (B, C, H, W), any layout or subclass -> contiguous (B, C, H, W)."""
    values = values.as_subclass(Tensor)
    return values.reshape((1,) * (4 - values.ndim) + tuple(values.shape)).contiguous()


def as_torchfields(field: Tensor) -> Any:
    """A field as the torchfields `Field` that corgie and its like expect."""
    import torchfields  # costs a second, and only this boundary needs it

    return torchfields.Field(field)


def _momentum(mode: str, params: dict[str, Any]) -> float | None:
    known = {"adam": (), "sgd": ("momentum",)}
    if mode not in known or set(params) - set(known[mode]):
        raise UsageError(
            f"opt_mode {mode!r} with opt_params {params}: expected 'adam' without "
            "any, or 'sgd' with 'momentum' at most"
        )
    return None if mode == "adam" else float(params.get("momentum", 0.0))


def _marked(features: Tensor, no_data: Tensor) -> Tensor:
    """The features, with exactly 0 in channel 0 where there is no data only."""
    tiny = torch.finfo(features.dtype).tiny
    first = torch.where(features[:, :1] == 0, tiny, features[:, :1])
    return torch.cat((torch.where(no_data, 0.0, first), features[:, 1:]), 1)


def _rules(spec: dict[str, Any] | None, where: str) -> MaskRules:
    # Through JSON, since callers write tuples where a schedule has lists.
    return parse_mask_rules(json.loads(json.dumps(spec or {})), where)


class _FieldLoss:
    """The loss of a field, (B, 2, H, W) -> (B,); what is constant made once."""

    def __init__(
        self,
        features: tuple[Tensor, Tensor],
        weights: tuple[PairWeight, PairWeight],
        options: FinetuneOptions,
    ) -> None:
        self.src, self.tgt = features
        self.options = options
        similarity, smoothness = weights
        self.tgt_weights = torch.cat((similarity.tgt, smoothness.tgt), 1)
        self.src_weights = torch.cat((similarity.src, smoothness.src), 1)
        # Whole tissue is the rule, and warping ones gives ones.
        self.moving = not bool((self.src_weights == 1).all())
        border = self.options.border
        rows, cols = self.src.shape[-2:]
        self.inner = (..., slice(border, rows - border), slice(border, cols - border))

    def __call__(self, field: Tensor) -> Tensor:
        """Similarity + smoothness * rigidity + l2 * mean(field^2), per sample."""
        weights = self._weights(field)
        differences = (warp(self.src, field) - self.tgt) ** 2
        similarity = self._mean(differences.mean(1, keepdim=True), weights[:, :1])
        rigidity = self._mean(rigidity_map(field), weights[:, 1:])
        squares = (field**2).mean((1, 2, 3))
        options = self.options
        return similarity + options.smoothness * rigidity + options.l2 * squares

    def _weights(self, field: Tensor) -> Tensor:
        if not self.moving:
            return self.tgt_weights
        # No gradient: a field must not gain by moving what is masked.
        moved = warp(self.src_weights, field.detach(), padding="border")
        return moved * self.tgt_weights

    def _mean(self, values: Tensor, weight: Tensor) -> Tensor:
        weight = weight[self.inner]
        total = weight.sum((1, 2, 3))
        weighted = (values[self.inner] * weight).sum((1, 2, 3))
        return weighted / torch.where(total > 0, total, 1.0)


class _Search:
    """Adam (or gradient descent) on fields, each sample with a rate of its own.

    Everything stays on the device: no step waits for the host.
    """

    def __init__(self, field: Tensor, options: FinetuneOptions) -> None:
        batch = field.new_zeros(field.shape[0])
        self.options = options
        self.field = self.best_field = field
        self.best_loss = batch + float("inf")
        self.rate = batch + options.rate_px
        self.stale, self.halvings, self.age = batch, batch, batch
        self.mean = self.variance = torch.zeros_like(field)

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
        gradient = gradient * _over(scale) + self.options.weight_decay * self.field
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


def _loss_and_gradient(
    loss: _FieldLoss, field: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = field.detach().requires_grad_()
        value = loss(_at_size_of(like, leaf, loss.options))
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def _at_size_of(like: Tensor, field: Tensor, options: FinetuneOptions) -> Tensor:
    rows, cols = like.shape[-2:]
    return upsample_field(field, options.coarseness)[..., :rows, :cols]
