"""A field optimised directly on the features of its pair.

Minimises similarity + smoothness * rigidity + l2 * mean(field^2) by Adam on what is
added to the field, at several scales at once (`metroem.field_search`), each sample of
a batch for itself. The best field seen is kept, so the result is never worse by this
loss than the field it started from.

Source: the original's `finetuner.py`, whose loss and clipping are kept. Its search, at
one scale, needs three to six times the steps.
"""

import json
import logging
from typing import Any

import torch
from torch import Tensor

from metroem.errors import FieldError, UsageError
from metroem.field import check_field
from metroem.field_loss import FieldLoss, FinetuneOptions
from metroem.field_search import Finetuned, Search
from metroem.mask_rules import MaskRules
from metroem.masks import PairMaps, PairWeight, weigh
from metroem.recording import RecordedStep
from metroem.specs.schedule import parse_mask_rules

logger = logging.getLogger(__name__)

# Share of the weight that a field may lose for nothing.
_MAY_BE_LOST = 0.1
# How many steps pass between looks at whether all samples are done: a look
# makes the host wait for a GPU.
_LOOK_EVERY = 25


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
    loss = FieldLoss(features, weights, options)
    start = field.detach().float()
    loss_before, _ = loss.with_gradient(start)
    search = Search(start, options)
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
    return Finetuned(found, loss_before, loss_after, steps)


def _lost(weight: PairWeight, start: Tensor, field: Tensor) -> Tensor:
    """Share of what a start, or no field, leaves to compare and a field loses, (B,).

    Borders that move out of the image are no loss.
    """
    due = torch.maximum(weight.along(start), weight.along(torch.zeros_like(start)))
    lost = (due - weight.along(field)).clamp(min=0).sum((1, 2, 3))
    return (lost / due.sum((1, 2, 3)).clamp(min=1e-6) - _MAY_BE_LOST).clamp(min=0)


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
        num_iter: at most so many steps of the original's; fewer are made where they
            end lower, see `FinetuneOptions.num_steps`.
        src_defects: mask of defects, (H, W) to (B, 1, H, W), or None.
        tgt_defects: likewise.
        src_zeros: mask of "no data", (H, W) to (B, 1, H, W).
        tgt_zeros: likewise.
        opt_params: {"momentum": ...} for `opt_mode` "sgd".
        opt_mode: "adam" or "sgd".
        crop: border left out of the loss, px.
        noimpr_period: steps without a new best after which lr is halved.
        opt_res_coarsness: change the field so many levels coarser.
        wd: weight decay.
        l2: factor of the mean squared displacement.
        normalize: bring the features to mean 0 and, all together, std 1 first.
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
    similarity_weight = weigh(mask_rules(mse_keys_to_apply, "mse_keys_to_apply"), maps)
    smoothness_weight = weigh(mask_rules(sm_keys_to_apply, "sm_keys_to_apply"), maps)
    if normalize:
        src = normalize_jointly(src, ~no_data[0])
        tgt = normalize_jointly(tgt, ~no_data[1])
    tuned = finetune_field(
        src, tgt, field, similarity_weight, smoothness_weight, options
    )
    log = logger.info if verbose else logger.debug
    before, after = tuned.loss_before.tolist(), tuned.loss_after.tolist()
    log("finetuned: loss %s -> %s in %d steps", before, after, tuned.iterations)
    return as_torchfields(tuned.field)


def normalize_jointly(features: Tensor, mask: Tensor) -> Tensor:
    """Shift each feature to mean 0 and scale all of them together to std 1.

    A feature that varies little stays of little account, unlike with
    `metroem.loss.normalize_features`.

    Args:
        features: (B, C, H, W).
        mask: (B, 1, H, W) bool, valid pixels.

    Returns:
        (B, C, H, W), 0 where not valid.

    Source: the original's `helpers.normalize` as its finetuner calls it.
    """
    weight = mask.to(features.dtype)
    count = weight.sum((-2, -1), keepdim=True).clamp(min=1)
    mean = (features * weight).sum((-2, -1), keepdim=True) / count
    centred = (features - mean) * weight
    degrees = (features.shape[1] * count - 1).clamp(min=1)
    variance = (centred**2).sum((1, 2, 3), keepdim=True) / degrees
    return centred / (variance + 1e-8).sqrt()


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


def mask_rules(spec: dict[str, Any] | None, where: str) -> MaskRules:
    """Mask rules as callers of the original write them; see `parse_mask_rules`."""
    # Through JSON, since callers write tuples where a schedule has lists.
    return parse_mask_rules(json.loads(json.dumps(spec or {})), where)
