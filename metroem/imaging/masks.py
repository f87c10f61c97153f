"""Make tissue masks, dilate or warp masks, and pull images with pixels without data."""

import torch
from torch import Tensor

from metroem.geometry.field import sample, warp

# Fraction of a warped pixel from which it is masked. Below 0.5, so that a line one
# pixel wide is not lost when it falls between two pixels.
_MASKED_FRACTION = 0.4


def tissue_mask(image: Tensor) -> Tensor:
    """Mark where an image, of any shape, has data, i.e. is not exactly 0; bool."""
    return image != 0


def has_tissue(image: Tensor) -> Tensor:
    """Whether each image of a batch has data, (B, C, H, W) -> (B, 1, 1, 1) bool."""
    return tissue_mask(image).flatten(1).any(1).view(-1, 1, 1, 1)


def dilate(mask: Tensor, pixels: int) -> Tensor:
    """Dilate a mask by some pixels in all 8 directions.

    Args:
        mask: (B, 1, H, W) bool.
        pixels: >= 0.

    Returns:
        (B, 1, H, W) bool.
    """
    # One axis after the other: max pooling of floats takes ten times as long.
    for dim in (-2, -1):
        size = mask.shape[dim]
        dilated = mask.clone()
        for step in range(1, min(pixels, size - 1) + 1):
            rest = size - step
            dilated.narrow(dim, 0, rest).logical_or_(mask.narrow(dim, step, rest))
            dilated.narrow(dim, step, rest).logical_or_(mask.narrow(dim, 0, rest))
        mask = dilated
    return mask


def warp_mask(mask: Tensor, field: Tensor) -> Tensor:
    """Warp a mask by a field.

    Args:
        mask: (B, 1, H, W) bool; beyond its border it repeats the border.
        field: (B, 2, H, W), pixels.

    Returns:
        (B, 1, H, W) bool: True where the interpolated mask is above 0.4.
    """
    return warp(mask.float(), field, padding="border") > _MASKED_FRACTION


def pull_tissue(image: Tensor, positions: Tensor) -> Tensor:
    """Read an image at positions, interpolating between pixels with data only.

    Args:
        image: (1, 1, H, W) float, grey levels above 0, 0 = no data.
        positions: (1, 2, h, w), channel 0 col, channel 1 row.

    Returns:
        (1, 1, h, w): 0 where the nearest pixel has no data, else above 0.
    """
    tissue = tissue_mask(image).float()
    sums = sample(torch.cat((image, tissue), 1), image, positions)
    nearest = sample(tissue, image, positions, mode="nearest")
    return torch.where(nearest > 0, sums[:, :1] / sums[:, 1:].clamp(min=0.1), 0.0)
