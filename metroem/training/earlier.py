"""States of earlier programs, brought to what this one expects."""

import re
from typing import Any

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
    key = "the phases of the schedule"
    phases = tree["settings"].get(key)
    if isinstance(phases, list):
        tree["settings"] = tree["settings"] | {key: [_phase(p) for p in phases]}


def _phase(text: Any) -> Any:
    """A phase as `job` describes it now."""
    if not isinstance(text, str):
        return text
    text = _LOSS_ENDS.sub(r"\1, iterations=50", text)
    if ", loss=LossSpec(" in text:
        text = text.replace(", iterations=50)", ", iterations=50, weight=1.0)")
    return _ONE_LOSS.sub(_KEYS_BEFORE, text)
