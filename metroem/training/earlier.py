"""States of earlier programs, brought to what this one expects."""

import dataclasses
import re
from typing import Any

from metroem.masks import SIMILARITY_RULES, SMOOTHNESS_RULES, MaskRules

_PHASES = "the phases of the schedule"
_RENAMED = {"phases": _PHASES, "training pairs": "the pairs to train on"}

# Before 2026-11-22 22:39 a phase had one loss, and fewer keys.
_ONE_LOSS = re.compile(r"crop_size=(\d+), loss=(LossSpec\(.*?\)), similarity_rules=")
_KEYS_BEFORE = (
    r"crop_size=\1, batch_size=None, lr_schedule='constant', warmup_steps=0, "
    r"max_grad_norm=None, losses=(\2,), similarity_rules="
)
_LOSS_ENDS = re.compile(r"(pure_emb=(?:True|False))(?=, weight=|\))")
# Scores of a step when a state was first written, and where one was added.
_NUM_SUMS, _EPE_AT = 7, 4


def upgrade(tree: dict[str, Any]) -> None:
    """Change a decoded state, whose kinds of values were checked, in place.

    The error of the field, unknown to states without it, becomes NaN.
    """
    if len(tree["sums"]) == _NUM_SUMS:
        tree["sums"] = [*tree["sums"][:_EPE_AT], float("nan"), *tree["sums"][_EPE_AT:]]
    settings = dict(tree["settings"])
    if _RENAMED.keys() <= settings.keys():
        settings = {_RENAMED.get(key, key): value for key, value in settings.items()}
    phases = settings.get(_PHASES)
    if isinstance(phases, list):
        if any(", loss=LossSpec(" in str(phase) for phase in phases) and (
            settings.get("--batch_size") == 1
        ):
            settings["--batch_size"] = None  # one rank took one pair if not told
        settings[_PHASES] = [_phase(phase) for phase in phases]
    tree["settings"] = settings


def _phase(text: Any) -> Any:
    """A phase as `job` describes it now."""
    if not isinstance(text, str):
        return text
    text = _LOSS_ENDS.sub(r"\1, iterations=50", text)
    if ", loss=LossSpec(" in text:
        text = text.replace(", iterations=50)", ", iterations=50, weight=1.0)")
        # Masks of defects on tgt were not known, so that nothing counts them.
        for rules in (SIMILARITY_RULES, SMOOTHNESS_RULES):
            text = text.replace(_without_tgt_defects(rules), repr(rules))
    return _ONE_LOSS.sub(_KEYS_BEFORE, text)


def _without_tgt_defects(rules: MaskRules) -> str:
    kept = tuple(rule for rule in rules.tgt if rule.name != "tgt_defects")
    return repr(dataclasses.replace(rules, tgt=kept))
