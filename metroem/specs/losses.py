"""What a phase minimises: the `loss_spec` of a schedule.

    {"type": "metric", "params": {"levels": [0], "pre_align_sample": 32}}

or a list of such objects, whose losses are added, each times its `weight`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from metroem.errors import UsageError
from metroem.specs.checks import check_keys, check_list, check_object

# Each type of loss and the params that it takes.
_PARAMS: dict[str, tuple[str, ...]] = {
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
        UsageError: an unknown type or key, a weight that is no number above 0,
            or no loss at all.
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
    if kind not in _PARAMS:
        raise UsageError(f"{where}: type {kind!r}: expected one of {list(_PARAMS)}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
        raise UsageError(f"{where}: weight {weight!r}: expected a number above 0")
    params = dict(check_object(spec.get("params", {}), where))
    check_keys(params, _PARAMS[kind], f"{where}: params of {kind}")
    if "levels" in params:
        params["levels"] = tuple(check_list(params["levels"], f"{where}: levels"))
    iterations = params.get("iterations", 1)
    if not isinstance(iterations, int) or iterations < 1:
        raise UsageError(
            f"{where}: iterations {iterations!r}: expected a whole number >= 1"
        )
    return dataclasses.replace(LossSpec(kind, weight=float(weight)), **params)
