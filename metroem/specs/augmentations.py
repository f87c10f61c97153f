"""What may be done to training samples: the `augmentations` of a phase.

Each is {"type": ..., "prob": ..., more}; what it does to a sample is in
`metroem.data`. Sizes are px of the sample, i.e. of the module's mip.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from metroem.errors import UsageError
from metroem.specs.checks import check_keys, check_object


@dataclass(frozen=True)
class RandomTranspose:
    """Swap rows and cols of the pair, with probability `prob`."""

    prob: float = 0.5


@dataclass(frozen=True)
class RandomSrcTgtSwap:
    """Swap src and tgt, with probability `prob`."""

    prob: float = 0.5


@dataclass(frozen=True)
class RandomWarp:
    """Warp tgt by a random field, with probability `prob`.

    Attributes:
        prob: probability of a warp.
        difficulty: the field has 2**difficulty knots a side.
        min_disp: least displacement of a knot, px.
        max_disp: largest displacement of a knot, px.
        randomize_d: draw the difficulty from 0..difficulty.
        random_epicenters: shift the knots by a random part of their distance.
    """

    prob: float = 1.0
    difficulty: int = 2
    min_disp: float = 0.0
    max_disp: float = 10.0
    randomize_d: bool = False
    random_epicenters: bool = True


Augmentation = RandomTranspose | RandomSrcTgtSwap | RandomWarp
_TYPES: dict[str, type[Augmentation]] = {
    "random_transpose": RandomTranspose,
    "random_src_tgt_swap": RandomSrcTgtSwap,
    "warp": RandomWarp,
}


def parse_augmentation(spec: Any, where: str) -> Augmentation:
    """Read one of the `augmentations` of a phase.

    Args:
        spec: {"type": ..., more}, decoded JSON.
        where: its place, for messages.

    Raises:
        UsageError: an unknown type or key, or a value of the wrong kind or
            outside of its range.
    """
    spec = dict(check_object(spec, where))
    name = spec.pop("type", None)
    kind = _TYPES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UsageError(f"{where}: type must be one of {list(_TYPES)}, got {name!r}")
    check_keys(spec, tuple(f.name for f in dataclasses.fields(kind)), where)
    for key, value in spec.items():
        if (wanted := _objection(kind, key, value)) is not None:
            raise UsageError(f"{where}: {key} is {value!r}: expected {wanted}")
    found = kind(**spec)
    if isinstance(found, RandomWarp) and found.min_disp > found.max_disp:
        raise UsageError(
            f"{where}: min_disp {found.min_disp} is above max_disp {found.max_disp}"
        )
    return found


def _objection(kind: type[Augmentation], key: str, value: Any) -> str | None:
    """What was expected of a value that cannot be; None for one that can."""
    (type_,) = (f.type for f in dataclasses.fields(kind) if f.name == key)
    if type_ is bool:
        return None if isinstance(value, bool) else "true or false"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "a number"
    if type_ is int:
        fits = isinstance(value, int) and value >= 0
        return None if fits else "a whole number >= 0"
    low, high, words = _range(key)
    return None if low <= value <= high and math.isfinite(value) else words


def _range(key: str) -> tuple[float, float, str]:
    """Least and largest value of a key, and both in words."""
    if key == "prob":
        return 0.0, 1.0, "a probability, 0 to 1"
    if key.endswith("_disp"):
        return -math.inf, math.inf, "a finite number of pixels"
    return 0.0, math.inf, "a number >= 0"
