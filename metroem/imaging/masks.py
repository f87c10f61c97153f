"""Where a loss counts: masks from grey levels, and weights from masks.

A weight map is (B, 1, H, W) float32, 1 where a pixel counts in full. Weights of
src are given in src's own pixels and are warped along with it.
"""

from torch import Tensor

from metroem.geometry.field import warp

# Of a warped pixel, so that a line of one pixel is not lost between two.
_MASKED_SHARE = 0.4


def tissue_mask(image: Tensor) -> Tensor:
    """True where an image has data, i.e. is not exactly 0; any shape."""
    return image != 0


def has_tissue(image: Tensor) -> Tensor:
    """Which images of a batch have any data, (B, C, H, W) -> (B, 1, 1, 1) bool."""
    return tissue_mask(image).flatten(1).any(1).view(-1, 1, 1, 1)


def dilate(mask: Tensor, pixels: int) -> Tensor:
    """Grow a mask by some pixels in all 8 directions.

    Args:
        mask: (B, 1, H, W) bool.
        pixels: >= 0.

    Returns:
        (B, 1, H, W) bool.
    """
    # Along rows, then along cols: a pooling of floats takes ten times as long.
    for dim in (-2, -1):
        size = mask.shape[dim]
        grown = mask.clone()
        for step in range(1, min(pixels, size - 1) + 1):
            rest = size - step
            grown.narrow(dim, 0, rest).logical_or_(mask.narrow(dim, step, rest))
            grown.narrow(dim, step, rest).logical_or_(mask.narrow(dim, 0, rest))
        mask = grown
    return mask


def warp_mask(mask: Tensor, field: Tensor) -> Tensor:
    """Move a mask along a field.

    Args:
        mask: (B, 1, H, W) bool; beyond its border it goes on as at it.
        field: (B, 2, H, W), pixels.

    Returns:
        (B, 1, H, W) bool: where more than 0.4 of what the field reads is masked.
    """
    return warp(mask.float(), field, padding="border") > _MASKED_SHARE
