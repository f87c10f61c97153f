"""Apply random augmentations to a sample."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from metroem.data.known_warp import known_warp
from metroem.data.paint_defects import Damaged, crack, fold, remove_tissue, stain
from metroem.data.photometric import augment_photometric, defocus
from metroem.data.random_maps import bernoulli
from metroem.data.sample import Sample
from metroem.geometry.field import invert, warp
from metroem.imaging.masks import warp_mask
from metroem.specs.augmentations import (
    Augmentation,
    Crack,
    Defocus,
    Fold,
    KnownWarp,
    Missing,
    Photometric,
    RandomFlip,
    RandomSrcTgtSwap,
    RandomTranspose,
    RandomWarp,
    Stain,
)

# Maps of a sample that are fields: channels along cols and along rows.
_FIELDS = ("prior_field", "truth", "fallback_truth", "unwarped_prior")
# Changes of one section: each side of a pair draws its own.
_IMAGINGS: dict[type, Callable[[Tensor, Any, Generator], Tensor]] = {
    Photometric: augment_photometric,
    Defocus: defocus,
}
_DAMAGES: dict[type, Callable[[Tensor, Any, Generator], Damaged]] = {
    Fold: fold,
    Crack: crack,
    Missing: remove_tissue,
    Stain: stain,
}


def augment(
    sample: Sample, augmentations: tuple[Augmentation, ...], generator: Generator
) -> Sample:
    """Apply augmentations in turn, each with its probability.

    Sections are skipped and crops are rotated when a sample is read, so `SkipSection`
    and `RandomTurn` are already applied.

    Args:
        sample: of any batch size.
        augmentations: of a phase.
        generator: random number generator. It draws whether an augmentation is
            applied even where the probability is 0 or 1.
    """
    for augmentation in augmentations:
        prob = augmentation.prob
        match augmentation:
            case RandomTranspose() if bernoulli(prob, generator):
                sample = transpose(sample)
            case RandomFlip():
                for dim in (-2, -1):
                    if bernoulli(prob, generator):
                        sample = flip(sample, dim)
            case RandomSrcTgtSwap() if bernoulli(prob, generator):
                sample = swap_src_tgt(sample)
            case RandomWarp() if bernoulli(prob, generator):
                sample = warp_tgt(sample, augmentation, generator)
            case KnownWarp():
                sample = known_warp(sample, augmentation, generator)
            case Photometric() | Defocus() | Fold() | Crack() | Missing() | Stain():
                for side in ("src", "tgt"):
                    if bernoulli(prob, generator):
                        sample = change_section(sample, side, augmentation, generator)
    return sample


def transpose(sample: Sample) -> Sample:
    """Swap rows and cols; the channels of a field swap with them."""

    def transposed(name: str, value: Tensor) -> Tensor:
        value = value.transpose(-1, -2)
        return value.flip(1) if name in _FIELDS else value

    return _each_map(sample, transposed)


def flip(sample: Sample, dim: Literal[-2, -1]) -> Sample:
    """Mirror rows (-2) or cols (-1); a field's channel along them changes sign."""

    def flipped(name: str, value: Tensor) -> Tensor:
        value = value.flip(dim)
        if name not in _FIELDS:
            return value
        signs = [1.0, -1.0] if dim == -2 else [-1.0, 1.0]
        return value * value.new_tensor(signs).view(1, 2, 1, 1)

    return _each_map(sample, flipped)


def _each_map(sample: Sample, change: Callable[[str, Tensor], Tensor]) -> Sample:
    """Apply a function of (name, map) to all maps of a sample."""
    changed = {
        name: change(name, value)
        for name, value in sample._asdict().items()
        if isinstance(value, Tensor)
    }
    return sample._replace(**changed)


def swap_src_tgt(sample: Sample) -> Sample:
    """Exchange src and tgt; the prior field becomes its inverse."""
    prior = sample.prior_field
    return sample._replace(
        src=sample.tgt,
        tgt=sample.src,
        prior_field=None if prior is None else invert(prior),
        src_defects=sample.tgt_defects,
        tgt_defects=sample.src_defects,
    )


def change_section(
    sample: Sample,
    side: Literal["src", "tgt"],
    options: Augmentation,
    generator: Generator,
) -> Sample:
    """Change the imaging of one side of each pair, or paint a defect on it.

    Pixels that a painted defect hides are added to the side's defect mask.

    Args:
        sample: of any batch size.
        side: which of its images.
        options: a key of `_IMAGINGS` or of `_DAMAGES`.
        generator: random number generator.
    """
    images: Tensor = getattr(sample, side)
    if type(options) in _IMAGINGS:
        change = _IMAGINGS[type(options)]
        changed = [change(image, options, generator) for image in images.split(1)]
        return sample._replace(**{side: torch.cat(changed)})
    damage = _DAMAGES[type(options)]
    damaged = [damage(image, options, generator) for image in images.split(1)]
    defects = torch.cat([one.hidden for one in damaged])
    before: Tensor | None = getattr(sample, f"{side}_defects")
    if before is not None:
        defects = defects | before
    image = torch.cat([one.image for one in damaged])
    return sample._replace(**{side: image, f"{side}_defects": defects})


def warp_tgt(sample: Sample, options: RandomWarp, generator: Generator) -> Sample:
    """Warp tgt by a random field, which the aligner then has to find.

    The prior field is not changed, so it does not contain the warp. The defects of tgt
    are warped too. A pixel becomes "no data" if more than 0.4 of it comes from "no
    data".
    """
    field = random_field(sample.tgt.shape[-2:], options, generator)
    tgt = warp(sample.tgt, field)
    blank = warp_mask(sample.tgt == 0, field)
    defects = sample.tgt_defects
    return sample._replace(
        tgt=torch.where(blank, 0.0, tgt),
        tgt_defects=None if defects is None else warp_mask(defects, field),
    )


def random_field(
    shape: torch.Size | tuple[int, int], options: RandomWarp, generator: Generator
) -> Tensor:
    """Draw a smooth random field between knots of independent displacements.

    Args:
        shape: (H, W).
        options: number of knots and range of their displacements.
        generator: random number generator.

    Returns:
        (1, 2, H, W), pixels, within the range of the knots.

    Source: the original's `augmentations.py`, for areas whose sides are powers of 2.
    """
    rows, cols = shape
    difficulty = options.difficulty
    if options.randomize_d:
        difficulty = int(torch.randint(difficulty + 1, (), generator=generator))
    knots = 2**difficulty
    # One more knot on each side than the area has, so that the knots may be shifted.
    drawn = knots + 2 if options.random_epicenters else knots
    displacements = torch.rand(1, 2, drawn, drawn, generator=generator)
    spread = options.max_disp - options.min_disp
    displacements = options.min_disp + spread * displacements
    if not options.random_epicenters:
        # The field is mirrored beyond its outermost knots; one knot is a pure shift.
        mode = "reflect" if knots > 1 else "replicate"
        displacements = F.pad(displacements, (1, 1, 1, 1), mode)
    step_rows, step_cols = math.ceil(rows / knots), math.ceil(cols / knots)
    field = F.interpolate(
        displacements,
        size=((knots + 2) * step_rows, (knots + 2) * step_cols),
        mode="bilinear",
        align_corners=False,
    )
    row, col = step_rows, step_cols
    if options.random_epicenters:
        row = int(torch.randint(2 * step_rows + 1, (), generator=generator))
        col = int(torch.randint(2 * step_cols + 1, (), generator=generator))
    return field[..., row : row + rows, col : col + cols]
