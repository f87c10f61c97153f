"""What a phase minimises: the `loss_spec` of a schedule.

    {"type": "metric", "params": {"levels": [0], "pre_align_sample": 32}}

or a list of such objects, whose losses are added, each times its `weight`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from metroem.errors import UsageError
from metroem.specs.checks import check_keys, check_object

# Each type of loss and the params that it takes.
PARAMS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "metric": (
        "levels",
        "pre_align_sample",
        "pre_align_weight",
        "norm_embeddings",
        "sm_div",
        "train_thru",
        "pure_emb",
    ),
    "known_warp": (),
    "distil": ("iterations",),
}


@dataclass(frozen=True)
class LossSpec:
    """One loss.

    Attributes:
        type: "plain": similarity of the aligned images and rigidity. "metric":
            embeddings that differ before alignment and agree after it.
            "known_warp": distance from the truth of the augmentation
            `known_warp`. "distil": distance from what the finetuner makes of the
            field.
        levels: of "metric", like the next six: levels of the network whose
            embeddings are compared.
        pre_align_sample: side of the tiles compared before alignment, px of
            the level; None compares the whole images.
        pre_align_weight: what their difference is worth.
        norm_embeddings: bring each feature to mean 0, std 1 first.
        sm_div: divide smoothness by 2**level.
        train_thru: let the loss train the embeddings, not only the field.
        pure_emb: measure the difference before alignment against a tgt that
            a random field of up to 50 px has moved, not as the pair came.
        iterations: of "distil": steps of the finetuner, at most.
        weight: factor, where losses are added.
    """

    type: str = "plain"
    levels: tuple[int, ...] = (0,)
    pre_align_sample: int | None = None
    pre_align_weight: float = 0.7
    norm_embeddings: bool = True
    sm_div: bool = False
    train_thru: bool = True
    pure_emb: bool = False
    iterations: int = 50
    weight: float = 1.0

    @property
    def embedding_levels(self) -> tuple[int, ...]:
        """Levels whose embeddings the loss looks at."""
        return self.levels if self.type == "metric" else ()


def parse_losses(spec: Any, where: str) -> tuple[LossSpec, ...]:
    """Read a `loss_spec`, decoded JSON.

    Args:
        spec: one object, or a list of them.
        where: its place, for messages.

    Raises:
        UsageError: an unknown type or key, a value of the wrong kind or outside
            of its range, or no loss at all.
    """
    if not isinstance(spec, list):
        return (_parse_loss(spec, where),)
    if not spec:
        raise UsageError(f"{where}: expected at least one loss")
    return tuple(_parse_loss(one, f"{where} {index}") for index, one in enumerate(spec))


def _parse_loss(spec: Any, where: str) -> LossSpec:
    spec = check_object(spec, where)
    check_keys(spec, ("type", "weight", "params"), where)
    kind, weight = spec.get("type"), spec.get("weight", 1.0)
    if not isinstance(kind, str) or kind not in PARAMS:
        raise UsageError(f"{where}: type {kind!r}: expected one of {list(PARAMS)}")
    if not _is_number(weight) or weight == 0:
        raise UsageError(f"{where}: weight {weight!r}: expected a number above 0")
    params = dict(check_object(spec.get("params", {}), where))
    check_keys(params, PARAMS[kind], f"{where}: params of {kind}")
    for key, value in params.items():
        if (wanted := _objection(key, value)) is not None:
            raise UsageError(f"{where}: {key} is {value!r}: expected {wanted}")
    if "levels" in params:
        params["levels"] = tuple(params["levels"])
    return dataclasses.replace(LossSpec(kind, weight=float(weight)), **params)


def _objection(key: str, value: Any) -> str | None:
    """What was expected of a param that cannot be; None for one that can."""
    match key:
        case "levels":
            levels = value if isinstance(value, list) else []
            fits = bool(levels) and all(type(v) is int and v >= 0 for v in levels)
            return None if fits else "a list of levels, whole numbers >= 0"
        case "pre_align_weight":
            return None if _is_number(value) else "a number >= 0"
        case "pre_align_sample" if value is None:
            return None
        case "pre_align_sample" | "iterations":
            fits = type(value) is int and value >= 1
            return None if fits else "a whole number >= 1"
    return None if isinstance(value, bool) else "true or false"


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and 0 <= value < math.inf
