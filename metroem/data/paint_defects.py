"""What happens to a section: folds, cracks, missing tissue, stains.

They are drawn on one image, and each says where it hides the tissue. Sizes are
px of the image, grey levels those of a normalised one. Where there is no data
it stays so, and tissue becomes that in `remove_tissue` alone.
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

# Draws lie between this share of the largest size and that size.
_SMALLEST = 1 / 3


class Damaged(NamedTuple):
    """An image with a defect."""

    image: Tensor  # (1, 1, H, W)
    hidden: Tensor  # (1, 1, H, W) bool: where the defect hides tissue


@dataclass(frozen=True)
class CurvedLine:
    """A gently curved line through an image: a sine about a straight one.

    Attributes:
        normal: (along cols, along rows), unit vector across the straight line.
        middle: (row, col) that the straight line runs through, px.
        amplitude_px: how far the sine leaves it.
        period_px: length of the sine.
        phase: of the sine at the middle, radians.
    """

    normal: tuple[float, float]
    middle: tuple[float, float]
    amplitude_px: float
    period_px: float
    phase: float

    @classmethod
    def random(cls, shape: tuple[int, int], generator: Generator) -> "CurvedLine":
        """A line in any direction, through the middle part of an (H, W) image."""
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
        """How far points lie from the line along `normal`, px; signed.

        Moving a point along `normal` changes its distance by just as much.

        Args:
            rows: any shape, px.
            cols: of a shape that goes with it, px.
        """
        d_rows, d_cols = rows - self.middle[0], cols - self.middle[1]
        angle = 2 * math.pi / self.period_px * self.position(rows, cols) + self.phase
        straight = self.normal[0] * d_cols + self.normal[1] * d_rows
        return straight - self.amplitude_px * torch.sin(angle)

    def position(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Where points lie along the straight line, px from the middle; signed."""
        d_rows, d_cols = rows - self.middle[0], cols - self.middle[1]
        return self.normal[0] * d_rows - self.normal[1] * d_cols


@dataclass(frozen=True)
class Wedge:
    """How far a crack is open along a line: wide, then closing to a tip.

    Attributes:
        width_px: where it is open most.
        tip_px: position at which it closes.
        length_px: over which it does.
    """

    width_px: float
    tip_px: float
    length_px: float

    @classmethod
    def random(
        cls, shape: tuple[int, int], width_px: float, generator: Generator
    ) -> "Wedge":
        """A crack that enters an (H, W) image and may go through it."""
        side = max(shape)
        length = side * uniform(0.5, 1.6, generator)
        return cls(width_px, length - 0.45 * side, length)

    def opening(self, position: Tensor) -> Tensor:
        """Width of the crack at positions along its line, px."""
        share = (self.tip_px - position) / self.length_px
        return self.width_px * share.clamp(0, 1)


def paint_band(
    image: Tensor, hidden: Tensor, generator: Generator, *, dark: bool
) -> Tensor:
    """Fill what a fold or a crack hides with its own grey.

    Args:
        image: (1, 1, H, W), or (H, W), 0 = no data.
        hidden: bool of the same shape.
        generator: what chance is drawn from.
        dark: whether it is darker than tissue, as folds are, or brighter.

    Returns:
        The image, as it was outside of `hidden`.
    """
    shape = (image.shape[-2], image.shape[-1])
    grey = uniform(1.5, 3.0, generator) * (-1 if dark else 1)
    coarse, fine = (texture_noise(shape, knot, generator) for knot in (24, 4))
    texture = (0.25 * coarse + 0.15 * fine).reshape(image.shape)
    # Its border pixels are half tissue.
    share = hidden.float().reshape(1, 1, *shape)
    full = F.avg_pool2d(share, 3, 1, 1, count_include_pad=False)
    band = torch.lerp(image, grey + texture, full.reshape(image.shape))
    return keep_no_data(torch.where(hidden, band, image), image)


def fold(image: Tensor, options: Fold, generator: Generator) -> Damaged:
    """A dark band of one width along a curved line, all through the image.

    Args:
        image: (1, 1, H, W), 0 = no data.
        options: its largest width.
        generator: what chance is drawn from.
    """
    shape = (image.shape[-2], image.shape[-1])
    line = CurvedLine.random(shape, generator)
    width = options.width_px * uniform(_SMALLEST, 1, generator)
    from_line = line.distance(*pixel_grid(shape)) + _ragged(shape, generator)
    hidden = (from_line.abs() <= width / 2) & (image != 0)
    return Damaged(paint_band(image, hidden, generator, dark=True), hidden)


def crack(image: Tensor, options: Crack, generator: Generator) -> Damaged:
    """A bright wedge along a curved line, which closes to a tip.

    Args:
        image: (1, 1, H, W), 0 = no data.
        options: its largest width.
        generator: what chance is drawn from.
    """
    shape = (image.shape[-2], image.shape[-1])
    line = CurvedLine.random(shape, generator)
    width = options.width_px * uniform(_SMALLEST, 1, generator)
    wedge = Wedge.random(shape, width, generator)
    rows, cols = pixel_grid(shape)
    opening = wedge.opening(line.position(rows, cols))
    from_line = line.distance(rows, cols) + _ragged(shape, generator)
    hidden = (from_line.abs() < opening / 2) & (image != 0)
    return Damaged(paint_band(image, hidden, generator, dark=False), hidden)


def remove_tissue(image: Tensor, options: Missing, generator: Generator) -> Damaged:
    """A part beyond a ragged line is missing: it becomes 0, "no data".

    Args:
        image: (1, 1, H, W), 0 = no data.
        options: its largest share of the image.
        generator: what chance is drawn from.
    """
    shape = (image.shape[-2], image.shape[-1])
    line, side = CurvedLine.random(shape, generator), max(shape)
    share = options.share * uniform(_SMALLEST, 1, generator)
    from_line = line.distance(*pixel_grid(shape))[None, None]
    for knot in (side / 12, side / 50):
        from_line = from_line + knot / 5 * texture_noise(shape, max(knot, 1), generator)
    # Every 16th pixel tells well enough how far the line has to move.
    some = from_line[..., ::4, ::4].flatten()
    last = some.kthvalue(max(1, round(share * some.numel()))).values
    missing = (from_line <= last) & (image != 0)
    return Damaged(torch.where(missing, 0.0, image), missing)


def stain(image: Tensor, options: Stain, generator: Generator) -> Damaged:
    """One to three dark blobs with a texture and soft borders.

    Args:
        image: (1, 1, H, W), 0 = no data.
        options: their largest radius.
        generator: what chance is drawn from.
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


def _ragged(shape: tuple[int, int], generator: Generator) -> Tensor:
    """What makes a border uneven, (1, 1, H, W) px."""
    return texture_noise(shape, 10, generator)
