"""Paint defects on a section: folds, cracks, missing tissue, stains.

Each is drawn on one image, and its mask says where it hides the tissue. Sizes are px
of the image, grey levels are of a normalised image. "No data" stays "no data"; only
`remove_tissue` makes more of it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from metroem.data.random_maps import pixel_grid, texture_noise, uniform
from metroem.imaging.normalize import keep_no_data
from metroem.specs.augmentations import Crack, Fold, Missing, Stain

# Sizes are drawn between this fraction of the largest size and the largest size.
_SMALLEST = 1 / 3


class Damaged(NamedTuple):
    """An image with a defect."""

    image: Tensor  # (1, 1, H, W)
    hidden: Tensor  # (1, 1, H, W) bool: where the defect hides tissue


@dataclass(frozen=True)
class CurvedLine:
    """A gently curved line through an image: a straight line plus a sine.

    Attributes:
        normal: (along cols, along rows), unit vector across the straight line.
        middle: (row, col), a point of the straight line, px.
        amplitude_px: amplitude of the sine.
        period_px: period of the sine.
        phase: of the sine at the middle, radians.
    """

    normal: tuple[float, float]
    middle: tuple[float, float]
    amplitude_px: float
    period_px: float
    phase: float

    @classmethod
    def random(cls, shape: tuple[int, int], generator: Generator) -> "CurvedLine":
        """Draw a line in any direction, through the middle part of an (H, W) image."""
        angle = uniform(0, 2 * math.pi, generator)
        side = max(shape)
        return cls(
            normal=(math.cos(angle), math.sin(angle)),
            middle=(
                shape[0] * uniform(0.2, 0.8, generator),
                shape[1] * uniform(0.2, 0.8, generator),
            ),
            amplitude_px=side * uniform(0.005, 0.05, generator),
            period_px=side * uniform(0.6, 2.0, generator),
            phase=uniform(0, 2 * math.pi, generator),
        )

    def distance(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Distance of points from the line along `normal`, px; signed.

        Moving a point along `normal` changes its distance by the same amount.

        Args:
            rows: any shape, px.
            cols: of a shape that broadcasts with `rows`, px.
        """
        d_rows, d_cols = rows - self.middle[0], cols - self.middle[1]
        angle = 2 * math.pi / self.period_px * self.position(rows, cols) + self.phase
        straight = self.normal[0] * d_cols + self.normal[1] * d_rows
        return straight - self.amplitude_px * torch.sin(angle)

    def position(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Position of points along the straight line, px from the middle; signed."""
        d_rows, d_cols = rows - self.middle[0], cols - self.middle[1]
        return self.normal[0] * d_rows - self.normal[1] * d_cols


@dataclass(frozen=True)
class Wedge:
    """The opening of a crack along a line: wide, then closing to a tip.

    Attributes:
        width_px: largest opening.
        tip_px: position at which the crack is closed.
        length_px: length over which it closes.
    """

    width_px: float
    tip_px: float
    length_px: float

    @classmethod
    def random(
        cls, shape: tuple[int, int], width_px: float, generator: Generator
    ) -> "Wedge":
        """Draw a crack that enters an (H, W) image and may go through it."""
        side = max(shape)
        length = side * uniform(0.5, 1.6, generator)
        return cls(width_px, length - 0.45 * side, length)

    def opening(self, position: Tensor) -> Tensor:
        """Width of the crack at positions along its line, px."""
        fraction = (self.tip_px - position) / self.length_px
        return self.width_px * fraction.clamp(0, 1)


def paint_band(
    image: Tensor, hidden: Tensor, generator: Generator, *, dark: bool
) -> Tensor:
    """Fill the pixels that a fold or a crack hides with its own grey.

    Args:
        image: (1, 1, H, W), or (H, W), 0 = no data.
        hidden: bool of the same shape.
        generator: random number generator.
        dark: True for darker than tissue, as folds are; False for brighter.

    Returns:
        The image, unchanged outside of `hidden`.
    """
    shape = (image.shape[-2], image.shape[-1])
    grey = uniform(1.5, 3.0, generator) * (-1 if dark else 1)
    coarse, fine = (texture_noise(shape, knot, generator) for knot in (24, 4))
    texture = (0.25 * coarse + 0.15 * fine).reshape(image.shape)
    # Pixels at its border are half tissue.
    opacity = hidden.float().reshape(1, 1, *shape)
    opacity = F.avg_pool2d(opacity, 3, 1, 1, count_include_pad=False)
    band = torch.lerp(image, grey + texture, opacity.reshape(image.shape))
    return keep_no_data(torch.where(hidden, band, image), image)


def fold(image: Tensor, options: Fold, generator: Generator) -> Damaged:
    """Paint a dark band of one width along a curved line through the whole image.

    Args:
        image: (1, 1, H, W), 0 = no data.
        options: its largest width.
        generator: random number generator.
    """
    shape = (image.shape[-2], image.shape[-1])
    line = CurvedLine.random(shape, generator)
    width = options.width_px * uniform(_SMALLEST, 1, generator)
    distance = line.distance(*pixel_grid(shape)) + _roughness(shape, generator)
    hidden = (distance.abs() <= width / 2) & (image != 0)
    return Damaged(paint_band(image, hidden, generator, dark=True), hidden)


def crack(image: Tensor, options: Crack, generator: Generator) -> Damaged:
    """Paint a bright wedge along a curved line, which closes to a tip.

    Args:
        image: (1, 1, H, W), 0 = no data.
        options: its largest width.
        generator: random number generator.
    """
    shape = (image.shape[-2], image.shape[-1])
    line = CurvedLine.random(shape, generator)
    width = options.width_px * uniform(_SMALLEST, 1, generator)
    wedge = Wedge.random(shape, width, generator)
    rows, cols = pixel_grid(shape)
    opening = wedge.opening(line.position(rows, cols))
    distance = line.distance(rows, cols) + _roughness(shape, generator)
    hidden = (distance.abs() < opening / 2) & (image != 0)
    return Damaged(paint_band(image, hidden, generator, dark=False), hidden)


def remove_tissue(image: Tensor, options: Missing, generator: Generator) -> Damaged:
    """Set the part of an image beyond a ragged line to 0, "no data".

    Args:
        image: (1, 1, H, W), 0 = no data.
        options: its largest fraction of the image.
        generator: random number generator.
    """
    shape = (image.shape[-2], image.shape[-1])
    line, side = CurvedLine.random(shape, generator), max(shape)
    fraction = options.share * uniform(_SMALLEST, 1, generator)
    distance = line.distance(*pixel_grid(shape))[None, None]
    for knot in (side / 12, side / 50):
        distance = distance + knot / 5 * texture_noise(shape, max(knot, 1), generator)
    # Every 16th pixel is enough to find how far the line has to move.
    some = distance[..., ::4, ::4].flatten()
    last = some.kthvalue(max(1, round(fraction * some.numel()))).values
    missing = (distance <= last) & (image != 0)
    return Damaged(torch.where(missing, 0.0, image), missing)


def stain(image: Tensor, options: Stain, generator: Generator) -> Damaged:
    """Paint one to three dark blobs with a texture and soft borders.

    Args:
        image: (1, 1, H, W), 0 = no data.
        options: their largest radius.
        generator: random number generator.
    """
    shape = (image.shape[-2], image.shape[-1])
    rows, cols = pixel_grid(shape)
    texture = texture_noise(shape, max(options.radius_px / 8, 1), generator)
    cover = torch.zeros_like(image)
    for _ in range(int(uniform(1, 4, generator))):
        radius = options.radius_px * uniform(_SMALLEST, 1, generator)
        stretch = uniform(0.7, 1.4, generator)
        d_rows = (rows - shape[0] * uniform(0, 1, generator)) / stretch
        d_cols = (cols - shape[1] * uniform(0, 1, generator)) * stretch
        inside = 1 - torch.hypot(d_rows, d_cols) / radius
        blob = torch.sigmoid(8 * inside + 1.5 * texture)
        cover = torch.maximum(cover, blob)
    cover = cover * uniform(0.6, 1, generator)
    grey = uniform(-3, -1.5, generator) + 0.3 * texture
    stained = keep_no_data(torch.lerp(image, grey, cover), image)
    return Damaged(stained, (cover > 0.7) & (image != 0))


def _roughness(shape: tuple[int, int], generator: Generator) -> Tensor:
    """Draw noise that makes a border uneven, (1, 1, H, W) px."""
    return texture_noise(shape, 10, generator)
