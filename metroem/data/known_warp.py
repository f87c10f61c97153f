"""Make pairs whose truth is known: warp src by a random field, torn at defects.

Equations, for a random field g and pixels p, q:

    src(q) = section(q + g(q))      src is the section, warped by g
    h(p) = -g(p + h(p))             h is the inverse of g
    section(p) = src(p + h(p))      so h is the truth: it leads back
    truth = compose(n, h)           with a natural field n between the two sections

Across a fold or a crack g jumps: each side of the tear has a g of its own. The truth
at a pixel is the inverse on the side that shows the pixel's tissue.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from metroem.data.paint_defects import CurvedLine, Wedge, paint_band
from metroem.data.random_maps import bernoulli, pixel_grid, smooth_noise, uniform
from metroem.data.sample import Sample
from metroem.geometry.field import (
    compose,
    downsample_field,
    invert,
    jacobian_determinant,
    upsample_field,
    warp,
)
from metroem.imaging.masks import tissue_mask
from metroem.specs.augmentations import KnownWarp

# Fields are drawn and inverted at this level, since they are smooth; two steps at
# full size then bring the inverse from 0.1 px to 0.01 px where they bend most.
_LEVEL, _STEPS_AT_LEVEL, _STEPS_AT_FULL_SIZE = 2, 16, 2
# The smooth part shrinks no area to less than this fraction. The spacing of its knots
# is at least this multiple of its largest displacement.
_LEAST_DETERMINANT, _KNOTS_PER_PEAK = 0.3, 4.0
# Peaks and tears are drawn between these fractions of the largest one and the largest.
_SMALLEST_PEAK, _SMALLEST_TEAR = 1 / 50, 1 / 4
# Probability of a second wave, and its largest peak as a fraction of the first one's.
_HAS_SECOND_WAVE, _SECOND_WAVE = 0.3, 0.3
_IS_FOLD, _IS_DARK_FOLD, _IS_DARK_CRACK = 0.5, 0.8, 0.2  # probabilities
_NEAR_PX = 48.0  # width of the surroundings of a tear
# Levels of detail that a prior field lacks, and its least error, px.
_PRIOR_LEVEL, _SMALLEST_PRIOR_ERROR = 3, 0.25


class Warped(NamedTuple):
    """A section that was warped, and the field that leads back to the original."""

    image: Tensor  # (1, 1, H, W), 0 = no data
    hidden: Tensor  # (1, 1, H, W) bool: pixels that a tear hides
    warp_field: Tensor  # (1, 2, H, W), px: g, which warped the section
    field: Tensor  # (1, 2, H, W), px: h, the way back; smooth beyond `valid` too
    valid: Tensor  # (1, 1, H, W) bool: where `field` leads to the same tissue
    near: Tensor  # (1, 1, H, W) bool: where it leads to the surroundings of a tear


class _Tear(NamedTuple):
    """A fold or a crack; its rows and cols are pixels of src."""

    line: CurvedLine
    # Width that is hidden on each side of the line, px, by the position along it.
    half_width: Callable[[Tensor], Tensor]
    # What each side adds to the field along the normal, px, by the position along it.
    moves: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    is_dark: bool

    def distance_beyond(self, rows: Tensor, cols: Tensor, side: int) -> Tensor:
        """Distance of pixels from the edge of the tear on one side, px, signed."""
        hidden = self.half_width(self.line.position(rows, cols))
        return (1 - 2 * side) * self.line.distance(rows, cols) - hidden

    def move(self, shape: tuple[int, int], side: int) -> Tensor:
        """What one side adds to the field, (1, 2, h, w) at `_LEVEL`, px."""
        rows, cols = ((p + 0.5) * 2**_LEVEL - 0.5 for p in pixel_grid(shape))
        along = self.moves[side](self.line.position(rows, cols))
        return torch.stack([n * along for n in self.line.normal])[None]


def known_warp(sample: Sample, options: KnownWarp, generator: Generator) -> Sample:
    """Warp src by a field that becomes the sample's truth.

    Args:
        sample: of batch size 1.
        options: how far, and whether the pair was aligned before.
        generator: random number generator.

    Returns:
        The sample with `truth` and `truth_valid`. If the natural field of the pair is
        unknown, `truth` is the truth of the warp alone. `unwarped_src`, `unwarped_tgt`
        and `unwarped_prior` are then the pair and its prior field before the warp. The
        prior field of the sample is made again, from the truth.
    """
    src, defects, prior = sample.src, sample.src_defects, sample.prior_field
    is_same = bernoulli(options.same, generator)
    if is_same:
        src, defects = sample.tgt, sample.tgt_defects
        prior = None if prior is None else torch.zeros_like(prior)
    warped = _not_warped(src)
    if bernoulli(options.prob, generator):
        warped = warp_section(src, options, generator)
    hidden = warped.hidden
    if defects is not None:
        hidden = hidden | (warp(defects.float(), warped.warp_field) > 0.5)
    known = sample._replace(
        src=warped.image,
        src_defects=hidden,
        truth=warped.field,
        truth_valid=warped.valid,
    )
    if not options.aligned and options.same < 1:
        # Blank if the natural field is known to be 0.
        before = torch.zeros_like(src) if is_same else src
        known = known._replace(
            unwarped_src=before, unwarped_tgt=sample.tgt, unwarped_prior=prior
        )
    if prior is None:
        return known
    truth = warped.field if options.aligned else compose(prior, warped.field)
    return known._replace(prior_field=_imitate_prior(truth, options, generator))


def warp_section(image: Tensor, options: KnownWarp, generator: Generator) -> Warped:
    """Warp a section by a random field, perhaps torn by a fold or a crack.

    Args:
        image: (1, 1, H, W), normalised, 0 = no data.
        options: how far.
        generator: random number generator.
    """
    shape = (image.shape[-2], image.shape[-1])
    smooth = _draw_smooth_field(shape, options, generator)
    if not bernoulli(options.tear, generator):
        warp_field = _at_full_size(smooth, shape)
        field = _inverse(smooth, warp_field)
        tissue = _tissue(image, warp_field)
        hidden = torch.zeros_like(image, dtype=torch.bool)
        valid = _reads_only_tissue(tissue, field)
        warped = _warp_image(image, warp_field, tissue)
        return Warped(warped, hidden, warp_field, field, valid, hidden)
    tear = _draw_tear(shape, options, generator)
    return _warp_torn(image, smooth, tear, generator)


def _warp_torn(
    image: Tensor, smooth: Tensor, tear: _Tear, generator: Generator
) -> Warped:
    """Warp a section whose two sides of a tear have moved independently."""
    shape = (image.shape[-2], image.shape[-1])
    rows, cols = pixel_grid(shape)
    sides = []
    for side in (0, 1):
        coarse = smooth + tear.move((smooth.shape[-2], smooth.shape[-1]), side)
        warp_field = _at_full_size(coarse, shape)
        field = _inverse(coarse, warp_field)
        # How far beyond the tear, on this side, a pixel's tissue lies in src.
        beyond = tear.distance_beyond(rows + field[:, 1:], cols + field[:, :1], side)
        sides.append((warp_field, field, beyond))
    (pulled_0, field_0, beyond_0), (pulled_1, field_1, beyond_1) = sides
    # Tissue that neither side shows belongs to the side whose edge is nearer.
    nearer = beyond_0 >= beyond_1
    warp_field = torch.where(tear.line.distance(rows, cols) >= 0, pulled_0, pulled_1)
    field = torch.where(nearer, field_0, field_1)
    beyond = torch.maximum(beyond_0, beyond_1)
    tissue = _tissue(image, warp_field)
    hidden = torch.maximum(
        tear.distance_beyond(rows, cols, 0), tear.distance_beyond(rows, cols, 1)
    )
    hidden = (hidden < 0) & tissue
    torn = _warp_image(image, warp_field, tissue)
    torn = paint_band(torn, hidden, generator, dark=tear.is_dark)
    valid = _reads_only_tissue(tissue, field) & (beyond >= 0)
    return Warped(torn, hidden, warp_field, field, valid, valid & (beyond < _NEAR_PX))


def _draw_tear(
    shape: tuple[int, int], options: KnownWarp, generator: Generator
) -> _Tear:
    line = CurvedLine.random(shape, generator)
    width, jump = (
        options.tear_px * uniform(_SMALLEST_TEAR, 1, generator) for _ in range(2)
    )
    if bernoulli(_IS_FOLD, generator):
        # The tissue inside a fold is missing between its two sides.
        return _Tear(
            line,
            lambda position: torch.full_like(position, width / 2),
            (lambda position: torch.full_like(position, jump), torch.zeros_like),
            bernoulli(_IS_DARK_FOLD, generator),
        )
    wedge = Wedge.random(shape, width, generator)

    def half(position: Tensor) -> Tensor:
        return wedge.opening(position) / 2

    # The sides of a crack have moved apart: each is warp_field from closer to it.
    moves = (lambda position: -half(position), half)
    return _Tear(line, half, moves, bernoulli(_IS_DARK_CRACK, generator))


def _draw_smooth_field(
    shape: tuple[int, int], options: KnownWarp, generator: Generator
) -> Tensor:
    """Draw waves + rotation + scale + shift: (1, 2, h, w) at `_LEVEL`, full px."""
    rows, cols = (-(-size // 2**_LEVEL) for size in shape)
    peak = options.peak_px * math.exp(uniform(math.log(_SMALLEST_PEAK), 0.0, generator))
    field = _draw_wave((rows, cols), peak, options, generator)
    if bernoulli(_HAS_SECOND_WAVE, generator):
        second = peak * uniform(0, _SECOND_WAVE, generator)
        field = field + _draw_wave((rows, cols), second, options, generator)
    # Scaled down until it is far from folding over.
    while jacobian_determinant(field / 2**_LEVEL).min() < _LEAST_DETERMINANT:
        field = 0.85 * field
    angle = math.radians(options.degrees * uniform(-1, 1, generator))
    scale = 1 + options.stretch * uniform(-1, 1, generator)
    along, across = scale * math.cos(angle) - 1, scale * math.sin(angle)
    row, col = pixel_grid((rows, cols))
    row, col = row - rows / 2, col - cols / 2
    rotated = torch.stack((along * col - across * row, across * col + along * row))
    shift = [options.shift_px * uniform(-1, 1, generator) for _ in range(2)]
    return field + 2**_LEVEL * rotated + torch.tensor(shift).view(1, 2, 1, 1)


def _draw_wave(
    shape: tuple[int, int], peak: float, options: KnownWarp, generator: Generator
) -> Tensor:
    """Draw a smooth field whose largest displacement is `peak`.

    (1, 2, h, w) at `_LEVEL`, in full-size px.
    """
    shortest = max(options.knot_px, _KNOTS_PER_PEAK * peak) / 2**_LEVEL
    longest = max(1.2 * shortest, 0.8 * max(shape))
    knot = math.exp(uniform(math.log(shortest), math.log(longest), generator))
    noise = [smooth_noise(shape, max(knot, 1.0), generator) for _ in range(2)]
    field = torch.cat(noise, 1)
    field = field - field.mean((2, 3), keepdim=True)
    return field * (peak / _lengths(field).max().clamp(min=1e-6))


def _at_full_size(field: Tensor, shape: tuple[int, int]) -> Tensor:
    """Upsample (1, 2, h, w) at `_LEVEL`, in full-size px, to (1, 2, H, W)."""
    full = upsample_field(field / 2**_LEVEL, _LEVEL)
    return full[..., : shape[0], : shape[1]].contiguous()


def _inverse(coarse: Tensor, full: Tensor) -> Tensor:
    """Invert a field that is given at `_LEVEL` and at full size, (1, 2, H, W)."""
    shape = (full.shape[-2], full.shape[-1])
    inverse = invert(coarse / 2**_LEVEL, iterations=_STEPS_AT_LEVEL) * 2**_LEVEL
    inverse = _at_full_size(inverse, shape)
    for _ in range(_STEPS_AT_FULL_SIZE):
        inverse = -warp(full, inverse, padding="border")
    return inverse


def _tissue(image: Tensor, warp_field: Tensor) -> Tensor:
    """Find where a field reads mostly tissue, (1, 1, H, W) bool."""
    return warp(tissue_mask(image).float(), warp_field) > 0.5


def _warp_image(image: Tensor, warp_field: Tensor, tissue: Tensor) -> Tensor:
    """Warp an image; it is 0 where there is no tissue, and only there."""
    # Bicubic, since bilinear sampling would blur src but not tgt.
    moved = warp(image, warp_field, padding="border", mode="bicubic")
    tiny = torch.finfo(moved.dtype).tiny
    return torch.where(tissue, torch.where(moved == 0, tiny, moved), 0.0)


def _reads_only_tissue(tissue: Tensor, field: Tensor) -> Tensor:
    """Find where a field reads nothing but tissue, (1, 1, H, W) bool."""
    return warp(tissue.float(), field) > 0.999


def _not_warped(image: Tensor) -> Warped:
    """A section as it is, with fields of 0."""
    zero = torch.zeros_like(image).repeat(1, 2, 1, 1)
    hidden = torch.zeros_like(image, dtype=torch.bool)
    return Warped(image, hidden, zero, zero, tissue_mask(image), hidden)


def _imitate_prior(truth: Tensor, options: KnownWarp, generator: Generator) -> Tensor:
    """Imitate the field of an earlier stage: the truth, smoothed, plus an error."""
    shape = (truth.shape[-2], truth.shape[-1])
    low, high = math.log(_SMALLEST_PRIOR_ERROR), math.log(options.prior_px)
    largest = math.exp(uniform(min(low, high), high, generator))
    prior = downsample_field(truth, _PRIOR_LEVEL)
    prior = upsample_field(prior, _PRIOR_LEVEL)[..., : shape[0], : shape[1]]
    knot = math.exp(uniform(math.log(16), math.log(max(shape)), generator))
    error = torch.cat([smooth_noise(shape, knot, generator) for _ in range(2)], 1)
    return prior + error * (largest / _lengths(error).max().clamp(min=1e-6))


def _lengths(field: Tensor) -> Tensor:
    """Lengths of displacements, (B, H, W) px.

    hypot, since a norm over 2 channels takes 80 times as long.
    """
    return torch.hypot(field[:, 0], field[:, 1])
