"""A field optimised directly on the features of its pair.

Minimises similarity + smoothness * rigidity + l2 * mean(field^2) by Adam on what is
added to the field, at several scales at once (`metroem.finetune.adam`), each sample of
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
    """`finetune_adam` in the form the original gives it, for code that calls it.

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
    maps = PairMasks(
        _marked(src, no_data[0]),
        _marked(tgt, no_data[1]),
        *(None if d is None else as_bchw(d) != 0 for d in (src_defects, tgt_defects)),
    )
    similarity_weight = pair_weights(
        mask_rules(mse_keys_to_apply, "mse_keys_to_apply"), maps
    )
    smoothness_weight = pair_weights(
        mask_rules(sm_keys_to_apply, "sm_keys_to_apply"), maps
    )
    if normalize:
        src = normalize_jointly(src, ~no_data[0])
        tgt = normalize_jointly(tgt, ~no_data[1])
    tuned = finetune_adam(
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
