"""Define mask rules, which say where a loss counts; no torch is needed.

Schedules have them in JSON. `metroem.imaging.loss_weights` turns them into weights.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from metroem.errors import UsageError

STRATEGIES = ("eq", "neq", "lt", "gt", "between", "not_between")
MAP_NAMES = ("src", "tgt", "src_zeros", "tgt_zeros", "src_defects", "tgt_defects")
# Attribute of a rule -> its key in JSON, flattened.
_KEYS = {
    "channel": "fm",
    "strategy": "binarization: strat",
    "value": "binarization: value",
    "bounds": "binarization: range",
    "rings": "coarsen_ranges",
}


class MaskRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename=_KEYS):
    """A rule that masks a loss by one map.

    A pixel has full weight where the binarised map is 1.

    Raises:
        UsageError: unknown name or strategy.
    """

    name: Annotated[
        str,
        Meta(title=f"one of {MAP_NAMES}"),
        f"which map, one of {', '.join(MAP_NAMES)}",
    ]
    channel: Annotated[
        int | None, "channel of the map; null for all of one channel"
    ] = None
    strategy: Annotated[
        str | None,
        f"how the map is binarised, one of {', '.join(STRATEGIES)}; "
        "null if it is 0 or 1 already",
    ] = None
    value: Annotated[float, "threshold of eq, neq, lt, gt; grey levels"] = 0.0
    bounds: Annotated[
        tuple[float, float],
        Meta(title="two numbers, low and high"),
        "[low, high] of between and not_between, both exclusive",
    ] = (0.0, 0.0)
    mask_value: Annotated[float, "weight where the binarised map is not 1"] = 0.0
    rings: Annotated[
        tuple[tuple[int, float], ...],
        Meta(title="a list of [pixels, weight]"),
        "[pixels, weight] in turn: the masked area grows by so many "
        "pixels, and the ring gets that weight",
    ] = ()

    def __post_init__(self) -> None:
        if self.name not in MAP_NAMES:
            raise UsageError(f"mask of {self.name!r}: expected one of {MAP_NAMES}")
        if self.strategy not in (None, *STRATEGIES):
            raise UsageError(
                f"binarization {self.strategy!r} of {self.name}: expected one of "
                f"{STRATEGIES}"
            )

    @staticmethod
    def flatten_json(rule: Any, where: str) -> Any:
        """Flatten "binarization" of a rule's JSON; other keys stay."""
        if not isinstance(rule, dict):
            return rule
        flat = {k: v for k, v in rule.items() if (k, v) != ("coarsen_ranges", None)}
        inner = flat.pop("binarization", {})
        if not isinstance(inner, dict):
            raise UsageError(
                f"{where}: binarization: expected an object, got {inner!r}"
            )
        return flat | {f"binarization: {key}": value for key, value in inner.items()}

    def to_json(self) -> dict[str, Any]:
        """Write the rule as in a schedule, with all keys."""
        tree = msgspec.json.decode(msgspec.json.encode(self))
        nested = [key for key in tree if key.startswith("binarization: ")]
        inner = {key.partition(": ")[2]: tree.pop(key) for key in nested}
        return tree | {"binarization": inner}


class MaskRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The rules of one loss term, for src and for tgt."""

    src: tuple[MaskRule, ...] = ()
    tgt: tuple[MaskRule, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Write the rules as in a schedule, with all keys."""
        return {
            "src": [rule.to_json() for rule in self.src],
            "tgt": [rule.to_json() for rule in self.tgt],
        }


def _no_data(side: str, mask_value: float = 0.0) -> MaskRule:
    return MaskRule(
        f"{side}_zeros", strategy="eq", mask_value=mask_value, rings=((1, 0.0),)
    )


def _defects(side: str) -> MaskRule:
    return MaskRule(f"{side}_defects", strategy="eq", rings=((1, 0.0),))


# The finetuner's rules, also used by schedules without rules: no similarity at "no
# data" and defects, and no smoothness there. The original (`aligner.py`) has the same
# rules without the defects of tgt, although a fold of tgt has no counterpart in src.
SIMILARITY_RULES = MaskRules(
    src=(_no_data("src"), _defects("src")), tgt=(_no_data("tgt"), _defects("tgt"))
)
SMOOTHNESS_RULES = MaskRules(
    src=(_no_data("src", 1e-5), _defects("src")), tgt=(_defects("tgt"),)
)
