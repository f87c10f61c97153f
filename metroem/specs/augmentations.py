"""Define the options of augmentations: the `augmentations` of a phase.

Each is {"type": ..., "prob": ..., further keys}; `metroem.data` applies them. Sizes are
px of the sample, i.e. of the module's mip.
"""

from typing import Annotated, get_args

from msgspec import Meta

from metroem.errors import UsageError
from metroem.specs.parse_json import Finite, NotNegative, Positive, Spec, Whole

# Known warps are drawn at level 2, where their slope needs 3 pixels.
KNOWN_WARP_LEAST_PX = 9

Probability = Annotated[float, Meta(ge=0, le=1, title="a probability, 0 to 1")]
Pixels = Annotated[Positive, Meta(title="a number of pixels above 0")]
Displacement = Annotated[Finite, Meta(title="a finite number of pixels")]
# At most half of a sample may become "no data".
Fraction = Annotated[
    float, Meta(gt=0, le=0.5, title="a fraction above 0 and up to 0.5")
]
# 4 is a change of scale by two mips.
Zoom = Annotated[float, Meta(ge=1, le=4, title="a factor from 1 to 4")]

Prob = Annotated[Probability, "probability"]
SideProb = Annotated[Probability, "probability, of each side"]


class RandomTranspose(Spec, frozen=True, tag="random_transpose"):
    """Swap rows and cols of the pair, with probability `prob`."""

    prob: Prob = 0.5


class RandomTurn(Spec, frozen=True, tag="random_turn"):
    """Take a crop rotated by any angle in its patch, with probability `prob`."""

    prob: Annotated[Probability, "probability; otherwise the crop is not rotated"] = 1.0
    zoom: Annotated[
        Zoom, "the scale changes by up to this factor, or by its inverse"
    ] = 1.25


class RandomFlip(Spec, frozen=True, tag="random_flip"):
    """Mirror the pair along rows, and along cols, each with probability `prob`."""

    prob: Prob = 0.5


class RandomSrcTgtSwap(Spec, frozen=True, tag="random_src_tgt_swap"):
    """Swap src and tgt, with probability `prob`."""

    prob: Prob = 0.5


class RandomWarp(Spec, frozen=True, tag="warp"):
    """Warp tgt by a random field, with probability `prob`."""

    prob: Annotated[Probability, "probability of a warp"] = 1.0
    difficulty: Annotated[Whole, "the field has 2**difficulty knots per side"] = 2
    min_disp: Annotated[Displacement, "least displacement of a knot, px"] = 0.0
    max_disp: Annotated[Displacement, "largest displacement of a knot, px"] = 10.0
    randomize_d: Annotated[bool, "draw the difficulty from 0..difficulty"] = False
    random_epicenters: Annotated[
        bool,
        "shift the knots by a random fraction of their spacing. Otherwise they are not "
        "shifted, and one knot (difficulty 0) is a shift of the whole tgt",
    ] = True

    def __post_init__(self) -> None:
        if self.min_disp > self.max_disp:
            raise UsageError(
                f"min_disp {self.min_disp:g} is above max_disp {self.max_disp:g}"
            )


class SkipSection(Spec, frozen=True, tag="skip_section"):
    """Take src from one section further, with probability `prob`."""

    prob: Prob = 0.1


class KnownWarp(Spec, frozen=True, tag="known_warp"):
    """Warp src by a known field, for the loss `known_warp`.

    The smooth part has waves of one or two lengths. Its largest displacement is drawn
    log-uniformly between `peak_px` / 50 and `peak_px`. Larger displacements have longer
    waves, so the smooth part never folds.
    """

    prob: Annotated[Probability, "probability; otherwise src is not warped"] = 0.95
    peak_px: Annotated[Pixels, "largest displacement of the smooth part"] = 30.0
    knot_px: Annotated[
        Pixels,
        "smallest spacing of its knots; where the network's own field is used as "
        "ground truth, also the deviation of the Gaussian that smooths it",
    ] = 16.0
    shift_px: Annotated[Pixels, "largest shift along rows and along cols"] = 12.0
    degrees: Annotated[NotNegative, "largest rotation"] = 3.0
    stretch: Annotated[NotNegative, "largest change of scale, as a fraction"] = 0.03
    tear: Annotated[
        Probability, "probability of a fold or a crack along which src is torn"
    ] = 0.25
    tear_px: Annotated[
        Pixels, "largest width of a tear, and largest displacement of tissue beside it"
    ] = 40.0
    same: Annotated[
        Probability,
        "probability that both sides show the same section, tgt. Then the ground truth "
        "is exact for any stack",
    ] = 0.3
    aligned: Annotated[
        bool,
        "whether the pairs of the data set are already aligned, as in FIB-SEM. If "
        "not, the smooth part of the network's own field of the pair before the "
        "warp is used as ground truth",
    ] = False
    prior_px: Annotated[
        Pixels,
        "largest error of the prior field that is made from the ground truth, for "
        "stages with a prior field",
    ] = 6.0


class Photometric(Spec, frozen=True, tag="photometric"):
    """Change how a section was imaged; src and tgt draw their own.

    Each strength is drawn between 0 and its value here; 0 leaves the change out. Grey
    levels are of a normalised image.
    """

    prob: SideProb = 0.8
    contrast: Annotated[
        NotNegative, "the contrast changes by a factor of up to exp(contrast)"
    ] = 0.35
    brightness: Annotated[NotNegative, "largest shift of the grey levels"] = 0.5
    gamma: Annotated[
        NotNegative, "the exponent of the grey curve is up to exp(gamma) or its inverse"
    ] = 0.35
    shading: Annotated[
        NotNegative, "deviation of a slow change of brightness, grey levels"
    ] = 0.35
    noise: Annotated[NotNegative, "deviation of noise in each pixel, grey levels"] = 0.3
    blur: Annotated[NotNegative, "deviation of a Gaussian blur, px"] = 1.0


class Defocus(Spec, frozen=True, tag="defocus"):
    """Blur a band across a section; src and tgt draw their own."""

    prob: SideProb = 0.1
    sigma_px: Annotated[Pixels, "deviation of the strongest blur"] = 5.0
    width_px: Annotated[Pixels, "width of the widest band"] = 200.0


class Fold(Spec, frozen=True, tag="fold"):
    """Paint a dark band across a section; src and tgt draw their own."""

    prob: SideProb = 0.1
    width_px: Annotated[Pixels, "width of the widest band"] = 35.0


class Crack(Spec, frozen=True, tag="crack"):
    """Paint a bright wedge into a section; src and tgt draw their own."""

    prob: SideProb = 0.1
    width_px: Annotated[Pixels, "largest opening of the widest crack"] = 30.0


class Missing(Spec, frozen=True, tag="missing"):
    """Remove a corner or an edge of a section; src and tgt draw their own."""

    prob: SideProb = 0.1
    share: Annotated[Fraction, "largest fraction of the sample that is removed"] = 0.2


class Stain(Spec, frozen=True, tag="stain"):
    """Put dark blobs on a section; src and tgt draw their own."""

    prob: SideProb = 0.1
    radius_px: Annotated[Pixels, "radius of the largest blob"] = 60.0


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
    str(kind.__struct_config__.tag): kind for kind in get_args(Augmentation)
}
