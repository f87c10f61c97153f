"""Define the losses that a phase minimises: the `loss_spec` of a schedule.

    {"type": "metric", "params": {"levels": [0], "pre_align_sample": 32}}

or a list of such objects. Their losses are multiplied by their `weight` and added.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from metroem.errors import UsageError
from metroem.specs.parse_json import Count, NotNegative, Positive, Spec, parse

LossType = Literal["plain", "metric", "known_warp", "distil"]
# The params that each type of loss takes.
PARAMS: dict[LossType, tuple[str, ...]] = {
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
Levels = Annotated[
    tuple[Annotated[int, Meta(ge=0)], ...],
    Meta(min_length=1, title="a list of levels, whole numbers >= 0"),
]


class LossSpec(Spec, frozen=True):
    """One loss."""

    type: Annotated[
        LossType,
        '"plain": similarity of the aligned images and rigidity. "metric": '
        "embeddings that differ before alignment and agree after it. "
        '"known_warp": distance from the truth of the augmentation `known_warp`. '
        '"distil": distance from the finetuned field',
    ] = "plain"
    levels: Annotated[
        Levels,
        'of "metric", like the next six: levels of the network whose embeddings '
        "are compared",
    ] = (0,)
    pre_align_sample: Annotated[
        Count | None,
        "side of the tiles that are compared before alignment, px of the level; null "
        "compares whole images",
    ] = None
    pre_align_weight: Annotated[NotNegative, "weight of their difference"] = 0.7
    norm_embeddings: Annotated[bool, "first bring each feature to mean 0, std 1"] = True
    sm_div: Annotated[bool, "divide smoothness by 2**level"] = False
    train_thru: Annotated[
        bool, "let the loss train the embeddings, not only the field"
    ] = True
    pure_emb: Annotated[
        bool,
        "measure the difference before alignment against a tgt that a random "
        "field of up to 50 px has moved, not against the tgt of the pair",
    ] = False
    iterations: Annotated[Count, 'of "distil": most steps of the finetuner'] = 50
    weight: Annotated[Positive, "factor of this loss in the sum"] = 1.0

    @property
    def embedding_levels(self) -> tuple[int, ...]:
        """Levels whose embeddings the loss compares."""
        return self.levels if self.type == "metric" else ()

    def to_json(self) -> dict[str, Any]:
        """The loss as an entry of a schedule, with all keys."""
        tree = msgspec.json.decode(msgspec.json.encode(self))
        params = {key: tree[key] for key in PARAMS[self.type]}
        return {"type": self.type, "weight": self.weight, "params": params}


class _LossJson(Spec, frozen=True):
    type: LossType
    weight: Positive = 1.0
    params: dict[str, Any] = {}


def parse_losses(spec: Any, where: str) -> tuple[LossSpec, ...]:
    """Read a `loss_spec`, decoded JSON.

    Args:
        spec: one object, or a list of them.
        where: its position, for messages.

    Raises:
        UsageError: an unknown type or key, a value of the wrong kind or outside its
            range, or an empty list.
    """
    if not isinstance(spec, list):
        return (_parse_loss(spec, where),)
    if not spec:
        raise UsageError(f"{where}: expected at least one loss")
    return tuple(_parse_loss(one, f"{where} {index}") for index, one in enumerate(spec))


def _parse_loss(spec: Any, where: str) -> LossSpec:
    loss = parse(spec, _LossJson, where)
    if unknown := sorted(loss.params.keys() - set(PARAMS[loss.type])):
        raise UsageError(
            f"{where}: params of {loss.type}: unknown key {unknown}; known are "
            f"{PARAMS[loss.type]}"
        )
    return parse(
        {**loss.params, "type": loss.type, "weight": loss.weight}, LossSpec, where
    )
