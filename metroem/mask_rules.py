"""Say where a loss counts: rules that `metroem.masks` turns into weights.

Schedules and options are made of them, so this file does without torch.
"""

from dataclasses import dataclass

from metroem.errors import UsageError

STRATEGIES = ("eq", "neq", "lt", "gt", "between", "not_between")
MAP_NAMES = ("src", "tgt", "src_zeros", "tgt_zeros", "src_defects", "tgt_defects")


@dataclass(frozen=True)
class MaskRule:
    """Where one map keeps a loss from counting.

    A pixel counts in full where the binarised map is 1.

    Attributes:
        name: which map, one of `MAP_NAMES`.
        channel: channel of the map; None for all of one channel.
        strategy: how the map is binarised, one of `STRATEGIES`; None if it
            is 0 or 1 already.
        value: threshold of eq, neq, lt, gt; grey levels.
        bounds: (low, high) of between and not_between, both exclusive.
        mask_value: weight where the binarised map is not 1.
        rings: (pixels, weight) in turn: the masked area grows by so many
            pixels, and the ring gets that weight.

    Raises:
        UsageError: unknown name or strategy.
    """

    name: str
    channel: int | None = None
    strategy: str | None = None
    value: float = 0.0
    bounds: tuple[float, float] = (0.0, 0.0)
    mask_value: float = 0.0
    rings: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in MAP_NAMES:
            raise UsageError(f"mask of {self.name!r}: expected one of {MAP_NAMES}")
        if self.strategy not in (None, *STRATEGIES):
            raise UsageError(
                f"binarization {self.strategy!r} of {self.name}: expected one of "
                f"{STRATEGIES}"
            )


@dataclass(frozen=True)
class MaskRules:
    """The rules of one loss term, for each side of a pair."""

    src: tuple[MaskRule, ...] = ()
    tgt: tuple[MaskRule, ...] = ()


def _no_data(side: str, mask_value: float = 0.0) -> MaskRule:
    return MaskRule(
        f"{side}_zeros", strategy="eq", mask_value=mask_value, rings=((1, 0.0),)
    )


def _defects(side: str) -> MaskRule:
    return MaskRule(f"{side}_defects", strategy="eq", rings=((1, 0.0),))


# The finetuner's rules in the original (`aligner.py`), also of schedules that name
# none: no similarity at "no data" and defects, free tearing at both. It leaves the
# defects of tgt out, as if a fold of tgt had something to be aligned to.
SIMILARITY_RULES = MaskRules(
    src=(_no_data("src"), _defects("src")), tgt=(_no_data("tgt"), _defects("tgt"))
)
SMOOTHNESS_RULES = MaskRules(
    src=(_no_data("src", 1e-5), _defects("src")), tgt=(_defects("tgt"),)
)
