"""States of earlier programs, brought to what this one expects."""

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

from metroem.mask_rules import SIMILARITY_RULES, SMOOTHNESS_RULES, MaskRules
from metroem.training import distributed

logger = logging.getLogger(__name__)

_PHASES, PAIRS = "the phases of the schedule", "the pairs to train on"
# What tells data apart, which states of version 1.0.0 do not know.
DATA_KEYS = ("the images of the pairs", "the prior fields of the pairs")
_RENAMED = {"phases": _PHASES, "training pairs": PAIRS}

# Before 2026-11-22 22:39 a phase had one loss, and fewer keys.
_ONE_LOSS = re.compile(r"crop_size=(\d+), loss=(LossSpec\(.*?\)), similarity_rules=")
_KEYS_BEFORE = (
    r"crop_size=\1, batch_size=None, lr_schedule='constant', warmup_steps=0, "
    r"max_grad_norm=None, losses=(\2,), similarity_rules="
)
_LOSS_ENDS = re.compile(r"(pure_emb=(?:True|False))(?=, weight=|\))")
# Scores of a step and how many steps they are of when a state was first written, and
# where one was added.
_NUM_SUMS, _EPE_AT = 7, 4


def upgrade(tree: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    """Change a decoded state, whose kinds of values were checked, in place.

    The error of the field, unknown to states without it, becomes NaN.

    Args:
        tree: the state.
        wanted: settings of the run that wants to go on; those of the state become
            equal where only how they are written has changed since.
    """
    if len(tree["sums"]) == _NUM_SUMS:
        tree["sums"] = [*tree["sums"][:_EPE_AT], float("nan"), *tree["sums"][_EPE_AT:]]
    if len(tree["sums"]) == _NUM_SUMS + 1:
        # Each score has had a number of steps since what is not known is left out.
        sums, count = [*tree["sums"][:-1], float("nan")], tree["sums"][-1]
        known = [value == value for value in sums]
        tree["sums"] = [v if k else 0.0 for v, k in zip(sums, known, strict=True)]
        tree["sums"] += [count * k for k in known]
    if tree["best"] == 0:
        tree["best"] = None  # a mean over no pixel, which was taken for the best
    settings = dict(tree["settings"])
    if _RENAMED.keys() <= settings.keys():
        settings = {_RENAMED.get(key, key): value for key, value in settings.items()}
    phases, now = settings.get(_PHASES), wanted.get(_PHASES)
    if isinstance(phases, list) and isinstance(now, list) and len(phases) == len(now):
        settings[_PHASES] = [
            new if new in _forms(old) else old
            for old, new in zip(phases, now, strict=True)
        ]
    if "averages" not in tree:
        before, size = settings.get("--batch_size"), wanted.get("--batch_size")
        if _is_same_size(before, size):
            settings["--batch_size"] = size
    unknown = {key: wanted[key] for key in DATA_KEYS if key in wanted}
    if unknown and not settings.keys() & unknown.keys():
        logger.warning(
            "the state of the training does not say which data it is of; taken as "
            "those that are there now"
        )
        settings |= unknown
    tree["settings"] = settings


def _is_same_size(before: Any, now: Any) -> bool:
    """Whether a batch size of a state without averages may mean that of a run."""
    if (before, now) == (1, None):
        return True  # until 2026-11-22 22:39 one rank took one pair if not told
    if before is None and now == distributed.world_size() > 1:
        logger.warning(
            "goes on with %d ranks; the state does not say how many began it", now
        )
        return True  # until 2026-11-25 21:07 the number of ranks was not kept
    return False


def _forms(phase: Any) -> list[Any]:
    """What a phase may read as now, beside what it was written as."""
    if not isinstance(phase, str):
        return [phase]
    text = _LOSS_ENDS.sub(r"\1, iterations=50", phase)
    if ", loss=LossSpec(" in text:
        text = text.replace(", iterations=50)", ", iterations=50, weight=1.0)")
        text = _ONE_LOSS.sub(_KEYS_BEFORE, text)
    forms = [phase, text]
    # Before 2026-11-22 23:33 masks of defects on tgt were not known. A schedule may
    # have asked for just the rules that were the default then.
    for rules in (SIMILARITY_RULES, SMOOTHNESS_RULES):
        before = _without_tgt_defects(rules)
        forms += [form.replace(before, repr(rules)) for form in forms]
    return forms


def _without_tgt_defects(rules: MaskRules) -> str:
    kept = tuple(rule for rule in rules.tgt if rule.name != "tgt_defects")
    return repr(dataclasses.replace(rules, tgt=kept))
