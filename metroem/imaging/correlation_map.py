"""Compute how alike two images are around each pixel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.imaging.masks import tissue_mask
from metroem.imaging.normalize import coarsen_image

# Detail that is compared, and the window that is compared, standard deviations in px of
# one mip coarser than the images. Wider windows miss folds: the two pairs of a folded
# section had errors of 0.98 and 0.81 px, with 8 px 1.06 and 0.90 px (2026-11).
_NOISE_PX, _BACKGROUND_PX, _COMPARED_PX = 0.75, 6.0, 4.0
# Least tissue of a window, and least variance of normalised grey levels.
_MIN_TISSUE, _MIN_VARIANCE = 0.05, 1e-4


def correlation_map(one: Tensor, other: Tensor) -> Tensor:
    """Compute how alike two images are around each pixel.

    It is Pearson's correlation of band-passed images over tissue of both, weighted by
    a Gaussian; 0 where it is negative or where a window has no tissue.

    Args:
        one: (1, 1, H, W), normalised, 0 = no data.
        other: the same form as `one`.

    Returns:
        (1, 1, H, W), 0 to 1.
    """
    rows, cols = one.shape[-2:]
    one, other = coarsen_image(one, 1), coarsen_image(other, 1)
    both = (tissue_mask(one) & tissue_mask(other)).float()
    # Tissue has mean 0, so pixels without data do not stand out.
    a, b = (_band_pass(image) for image in (one, other))
    maps = torch.cat((both, a, b, a * a, b * b, a * b), 0) * both
    weight, a, b, aa, bb, ab = _blur(maps, _COMPARED_PX).split(1)
    safe = weight.clamp(min=1e-6)
    a, b, aa, bb, ab = a / safe, b / safe, aa / safe, bb / safe, ab / safe
    variances = ((aa - a * a) * (bb - b * b)).clamp(min=_MIN_VARIANCE**2)
    correlation = ((ab - a * b) / variances.sqrt()).clamp(min=0, max=1)
    correlation = torch.where(weight > _MIN_TISSUE, correlation * weight, 0.0)
    return F.interpolate(correlation, scale_factor=2, mode="nearest")[..., :rows, :cols]


def _band_pass(image: Tensor) -> Tensor:
    return _blur(image, _NOISE_PX) - _blur(image, _BACKGROUND_PX)


def _blur(maps: Tensor, deviation_px: float) -> Tensor:
    """Blur maps, (B, 1, H, W), by a Gaussian."""
    radius = int(3 * deviation_px + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (offsets / deviation_px).square())
    kernel = kernel / kernel.sum()
    padded = F.pad(maps, (radius, radius, radius, radius), mode="replicate")
    blurred = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(blurred, kernel.view(1, 1, -1, 1))
