"""Finetune a field through the original's interface, for code that calls it.

The work is done by `metroem.finetune.adam`. It minimises similarity + smoothness *
rigidity + l2 * mean(field^2) by Adam, at several scales at once, each sample of a batch
independently. The best field found is kept, so its loss is never above the start's.

Source: the original's `finetuner.py`, whose loss and clipping are kept. Its search, at
one scale, needs three to six times as many steps.
"""

import json
import logging
from typing import Any

import torch
from torch import Tensor

from metroem.errors import UsageError
from metroem.finetune.adam import finetune_adam
from metroem.finetune.analytic_loss import AdamOptions
from metroem.geometry.torchfields import as_bchw, as_torchfields
from metroem.imaging.loss_weights import PairMasks, pair_weights
from metroem.imaging.mask_rules import MaskRules
from metroem.specs.schedule import parse_mask_rules

logger = logging.getLogger(__name__)


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
    """Run `finetune_adam` with the arguments of the original.

    Args:
        src: (B, C, H, W) features.
        tgt: (B, C, H, W).
        initial_res: start field, (B, 2, H, W), pixels.
        sm: factor of rigidity.
        lr: rate of the first steps, pixels a step.
        num_iter: limit of steps, as the original counts them; fewer are made where they
            end lower, see `AdamOptions.num_steps`.
        src_defects: mask of defects, (H, W) to (B, 1, H, W), or None.
        tgt_defects: mask of defects of tgt, in the same form.
        src_zeros: mask of "no data", (H, W) to (B, 1, H, W).
        tgt_zeros: mask of "no data" of tgt, in the same form.
        opt_params: {"momentum": ...} for `opt_mode` "sgd".
        opt_mode: "adam" or "sgd".
        crop: border left out of the loss, px.
        noimpr_period: steps without a new best after which lr is halved.
        opt_res_coarsness: level of the change to the field, see `AdamOptions`.
        wd: weight decay.
        l2: factor of the mean squared displacement.
        normalize: normalise the features first, see `normalize_jointly`.
        sm_keys_to_apply: mask rules of rigidity, as in a schedule.
        mse_keys_to_apply: mask rules of similarity.
        verbose: log the losses.
        max_bad: how often lr is halved before the search ends.

    Returns:
        The field as a torchfields `Field`, (B, 2, H, W), pixels.

    Raises:
        UsageError: an unknown `opt_mode`, option of it, or mask rule.
    """
    options = AdamOptions(
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
    src, tgt, field = (as_bchw(t).float() for t in (src, tgt, initial_res))
    no_data = [as_bchw(mask) != 0 for mask in (src_zeros, tgt_zeros)]
    masks = PairMasks(
        _mark_no_data(src, no_data[0]),
        _mark_no_data(tgt, no_data[1]),
        *(None if d is None else as_bchw(d) != 0 for d in (src_defects, tgt_defects)),
    )
    similarity_weight = pair_weights(
        mask_rules(mse_keys_to_apply, "mse_keys_to_apply"), masks
    )
    smoothness_weight = pair_weights(
        mask_rules(sm_keys_to_apply, "sm_keys_to_apply"), masks
    )
    if normalize:
        src = normalize_jointly(src, ~no_data[0])
        tgt = normalize_jointly(tgt, ~no_data[1])
    result = finetune_adam(
        src, tgt, field, similarity_weight, smoothness_weight, options
    )
    log = logger.info if verbose else logger.debug
    before, after = result.loss_before.tolist(), result.loss_after.tolist()
    log("finetuned: loss %s -> %s in %d steps", before, after, result.iterations)
    return as_torchfields(result.field)


def normalize_jointly(features: Tensor, mask: Tensor) -> Tensor:
    """Shift each feature to mean 0 and scale all of them together to std 1.

    A feature that varies little keeps its small weight, unlike with
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


def _momentum(mode: str, params: dict[str, Any]) -> float | None:
    """Read the momentum of gradient descent; None for Adam."""
    known = {"adam": (), "sgd": ("momentum",)}
    if mode not in known or set(params) - set(known[mode]):
        raise UsageError(
            f"opt_mode {mode!r} with opt_params {params}: expected 'adam' without "
            "any, or 'sgd' with 'momentum' at most"
        )
    return None if mode == "adam" else float(params.get("momentum", 0.0))


def _mark_no_data(features: Tensor, no_data: Tensor) -> Tensor:
    """Make channel 0 exactly 0 where there is no data, and nowhere else."""
    tiny = torch.finfo(features.dtype).tiny
    first = torch.where(features[:, :1] == 0, tiny, features[:, :1])
    return torch.cat((torch.where(no_data, 0.0, first), features[:, 1:]), 1)


def mask_rules(spec: dict[str, Any] | None, where: str) -> MaskRules:
    """Read mask rules as callers of the original write them, see `parse_mask_rules`."""
    # Through JSON, since callers write tuples where a schedule has lists.
    return parse_mask_rules(json.loads(json.dumps(spec or {})), where)
