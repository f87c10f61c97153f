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

# More of a sample may not be made "no data".
_LARGEST_SHARE = 0.5
# Known warps are drawn at level 2, where their slope needs 3 pixels.
KNOWN_WARP_LEAST_PX = 9
# A sample as a network would see it two mips away, or less.
_LARGEST_ZOOM = 4.0


@dataclass(frozen=True)
class RandomTranspose:
    """Swap rows and cols of the pair, with probability `prob`."""

    prob: float = 0.5


@dataclass(frozen=True)
class RandomFlip:
    """Mirror the pair along rows, and along cols, each with probability `prob`."""

    prob: float = 0.5


@dataclass(frozen=True)
class RandomTurn:
    """Take a crop that lies at any angle in its patch, with probability `prob`.

    Attributes:
        prob: probability; else rows stay rows.
        zoom: the scale changes by up to this factor, or by its inverse.
    """

    prob: float = 1.0
    zoom: float = 1.25


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
        random_epicenters: shift the knots by a random part of their distance. Without
            it they lie evenly, and one knot (difficulty 0) is a shift of the whole tgt.
    """

    prob: float = 1.0
    difficulty: int = 2
    min_disp: float = 0.0
    max_disp: float = 10.0
    randomize_d: bool = False
    random_epicenters: bool = True


@dataclass(frozen=True)
class SkipSection:
    """Take src from one section further, with probability `prob`."""

    prob: float = 0.1


@dataclass(frozen=True)
class Photometric:
    """Change how a section was imaged; src and tgt draw their own.

    Each strength is drawn between nothing and the value here; 0 leaves that
    change out. Grey levels are those of a normalised image.

    Attributes:
        prob: probability, of each side.
        contrast: the contrast changes by a factor of up to exp(contrast).
        brightness: the grey levels move by up to so much.
        gamma: the exponent of the grey curve is up to exp(gamma) or its inverse.
        shading: deviation of a slow change of brightness, grey levels.
        noise: deviation of noise in each pixel, grey levels.
        blur: deviation of a Gaussian blur, px.
    """

    prob: float = 0.8
    contrast: float = 0.35
    brightness: float = 0.5
    gamma: float = 0.35
    shading: float = 0.35
    noise: float = 0.3
    blur: float = 1.0


@dataclass(frozen=True)
class Defocus:
    """Blur a band across a section; src and tgt draw their own.

    Attributes:
        prob: probability, of each side.
        sigma_px: deviation of the strongest blur.
        width_px: width of the widest band.
    """

    prob: float = 0.1
    sigma_px: float = 5.0
    width_px: float = 200.0


@dataclass(frozen=True)
class Fold:
    """Paint a dark band across a section; src and tgt draw their own.

    Attributes:
        prob: probability, of each side.
        width_px: width of the widest band.
    """

    prob: float = 0.1
    width_px: float = 35.0


@dataclass(frozen=True)
class Crack:
    """Paint a bright wedge into a section; src and tgt draw their own.

    Attributes:
        prob: probability, of each side.
        width_px: width of the widest crack where it is open most.
    """

    prob: float = 0.1
    width_px: float = 30.0


@dataclass(frozen=True)
class Missing:
    """Take a corner or an edge of a section away; src and tgt draw their own.

    Attributes:
        prob: probability, of each side.
        share: largest share of the sample that goes.
    """

    prob: float = 0.1
    share: float = 0.2


@dataclass(frozen=True)
class Stain:
    """Put dark blobs on a section; src and tgt draw their own.

    Attributes:
        prob: probability, of each side.
        radius_px: radius of the largest blob.
    """

    prob: float = 0.1
    radius_px: float = 60.0


@dataclass(frozen=True)
class KnownWarp:
    """Warp src by a field that is known, for the loss `known_warp`.

    The smooth part has waves of two lengths; the largest displacement is drawn
    log-uniformly between `peak_px` / 50 and `peak_px`, and the waves are longer the
    further they move, so that nothing folds over.

    Attributes:
        prob: probability; else the pair stays as it came.
        peak_px: largest displacement of the smooth part.
        knot_px: shortest distance of its knots; of what is taken for natural
            fields, the deviation of the Gaussian that they are smoothed by.
        shift_px: largest shift along rows and along cols.
        degrees: largest rotation.
        stretch: largest change of scale, as a share.
        tear: probability of a fold or a crack along which src is torn.
        tear_px: width of the widest one, and how far tissue is moved along it.
        same: probability that both sides show one section, that of tgt. Its truth
            is exact whatever the stack.
        aligned: whether the pairs of the data set are aligned as they are, as
            in FIB-SEM. If not, the smooth part of what the network itself makes of
            the pair before the warp is taken for its natural field.
        prior_px: largest error of the prior field that is made from the truth
            for stages that have one.
    """

    prob: float = 0.95
    peak_px: float = 30.0
    knot_px: float = 16.0
    shift_px: float = 12.0
    degrees: float = 3.0
    stretch: float = 0.03
    tear: float = 0.25
    tear_px: float = 40.0
    same: float = 0.3
    aligned: bool = False
    prior_px: float = 6.0


Augmentation = (
    RandomTranspose
    | RandomTurn
    | RandomFlip
    | RandomSrcTgtSwap
    | RandomWarp
    | SkipSection
    | KnownWarp
    | Photometric
    | Defocus
    | Fold
    | Crack
    | Missing
    | Stain
)
AUGMENTATIONS: dict[str, type[Augmentation]] = {
    "random_transpose": RandomTranspose,
    "random_turn": RandomTurn,
    "random_flip": RandomFlip,
    "random_src_tgt_swap": RandomSrcTgtSwap,
    "warp": RandomWarp,
    "skip_section": SkipSection,
    "known_warp": KnownWarp,
    "photometric": Photometric,
    "defocus": Defocus,
    "fold": Fold,
    "crack": Crack,
    "missing": Missing,
    "stain": Stain,
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
    kind = AUGMENTATIONS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UsageError(
            f"{where}: type must be one of {list(AUGMENTATIONS)}, got {name!r}"
        )
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
    least = math.nextafter(0, 1)
    if key in ("prob", "tear", "same"):
        return 0.0, 1.0, "a probability, 0 to 1"
    if key == "share":
        return least, _LARGEST_SHARE, f"a share above 0 and up to {_LARGEST_SHARE}"
    if key == "zoom":
        return 1.0, _LARGEST_ZOOM, f"a factor from 1 to {_LARGEST_ZOOM:g}"
    if key.endswith("_px"):
        return least, math.inf, "a number of pixels above 0"
    if key.endswith("_disp"):
        return -math.inf, math.inf, "a finite number of pixels"
    return 0.0, math.inf, "a number >= 0"
