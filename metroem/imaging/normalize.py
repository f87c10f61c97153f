"""Normalise grey levels for networks: mean 0, std 1 over tissue, 0 = no data."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The original's reader treats darker pixels as "no data" (`dataset.py`).
DARKEST = -4.0
# Tissue that is normalised by a reference area may differ from mean 0 and std 1, but
# less than grey levels of 0..255 or 0..1 do.
_MAX_MEAN, _STD_RANGE = 1.5, (0.3, 3.0)
# Value of tissue pixels that would become 0, so that they are not "no data".
_MEAN_GREY = 1e-4


class GreyStatistics(NamedTuple):
    """Mean and standard deviation of the tissue of one image."""

    mean: float  # grey levels
    std: float  # grey levels, > 0


def looks_normalized(statistics: GreyStatistics) -> bool:
    """Whether an image with these statistics of its tissue may be normalised."""
    low, high = _STD_RANGE
    return abs(statistics.mean) <= _MAX_MEAN and low < statistics.std < high


def tissue_statistics(image: Tensor) -> GreyStatistics | None:
    """Compute mean and standard deviation over finite pixels that are not 0.

    Args:
        image: any shape, raw grey levels, 0 = no data.

    Returns:
        The statistics, or None if there is no tissue or no contrast.
    """
    if image.dtype == torch.uint8:
        return _histogram_statistics(image)
    is_tissue = (image != 0) & torch.isfinite(image)
    # Selecting pixels takes most of the time, and most images need no selection.
    tissue = image.flatten() if bool(is_tissue.all()) else image[is_tissue]
    tissue = tissue.double()
    if tissue.numel() < 2 or not (std := float(tissue.std(correction=0))) > 0:
        return None
    return GreyStatistics(float(tissue.mean()), std)


def normalize(image: Tensor, statistics: GreyStatistics | None = None) -> Tensor:
    """Shift and scale the tissue of an image; 0 stays 0.

    Tissue does not go below `DARKEST` and does not become 0, since readers treat both
    as "no data".

    Args:
        image: any shape, raw grey levels, 0 = no data.
        statistics: mean and std to normalise by; the image's own if None.

    Returns:
        float32 of the same shape; all 0 for an image without tissue.
    """
    statistics = statistics or tissue_statistics(image)
    if statistics is None:
        return torch.zeros_like(image, dtype=torch.float32)
    if image.dtype == torch.uint8:
        # Normalise each grey level once, then look up the pixels.
        levels = torch.arange(256, dtype=torch.float32, device=image.device)
        greys = normalize(levels, statistics)
        return greys.index_select(0, image.flatten().int()).view(image.shape)
    grey = ((image.double() - statistics.mean) / statistics.std).float()
    return keep_no_data(grey.clamp(min=DARKEST), image)


def normalize_if_raw(images: Sequence[Tensor], wanted: bool | str) -> list[Tensor]:
    """Normalise images of one volume, if the caller asks for it.

    "raw" normalises images that are not normalised yet. Integers are raw. Floats are
    raw if no tissue is below 0, or if they vary too much for tissue of std 1. All
    floats are judged together: one small image of a normalised volume may be brighter
    than the mean of its section everywhere, but two sections seldom are.

    Args:
        images: (B, C, H, W) each, of any dtype, 0 = no data.
        wanted: True (all of them), False (none), or "raw".

    Returns:
        float32 of the same shapes; each sample is normalised by itself.
    """
    floats = [image for image in images if image.is_floating_point()]
    raw_floats = wanted == "raw" and _looks_raw(floats)
    return [
        torch.stack([normalize(sample) for sample in image])
        if wanted is True
        or raw_floats
        or (wanted == "raw" and not image.is_floating_point())
        else image.float()
        for image in images
    ]


def finite_or_no_data(image: Tensor) -> Tensor:
    """Set NaN and infinite pixels to 0 ("no data"); any shape and type."""
    if not image.is_floating_point():
        return image
    return torch.where(torch.isfinite(image), image, 0.0)


def keep_no_data(changed: Tensor, image: Tensor) -> Tensor:
    """Make a changed image exactly 0 where it was 0 before, and nowhere else.

    Args:
        changed: the image after a change, any shape, normalised.
        image: the image before the change, 0 = no data.
    """
    changed = torch.where(changed == 0, _MEAN_GREY, changed)
    return torch.where(image == 0, 0.0, changed)


def coarsen_image(image: Tensor, levels: int) -> Tensor:
    """Average an image to a coarser mip, over tissue pixels only.

    In each halving, a pixel with less than half tissue becomes 0 ("no data").

    Args:
        image: (B, C, H, W) float, 0 = no data.
        levels: how many mips coarser, >= 0; at odd borders, existing pixels are
            averaged.

    Returns:
        (B, C, ceil(H / 2**levels), ceil(W / 2**levels)).
    """
    for _ in range(levels):
        tissue = (image != 0).to(image.dtype)
        image, fraction = (
            F.avg_pool2d(t, 2, ceil_mode=True, count_include_pad=False)
            for t in (image, tissue)
        )
        image = torch.where(fraction >= 0.5, image / fraction.clamp(min=0.5), 0.0)
    return image


def round_greys(image: Tensor, dtype: np.dtype) -> np.ndarray:
    """Round grey levels to a type; tissue stays tissue: it does not become 0.

    Args:
        image: any shape, float, 0 = no data.
        dtype: of the result; floats are not rounded.
    """
    values = image.numpy()
    if dtype.kind == "f":
        return values.astype(dtype)
    most = np.iinfo(dtype).max
    return np.where(values > 0, np.clip(np.round(values), 1, most), 0).astype(dtype)


def _histogram_statistics(image: Tensor) -> GreyStatistics | None:
    """Compute `tissue_statistics` of uint8 from its histogram."""
    counts = torch.bincount(image.flatten(), minlength=256).double()
    counts[0] = 0  # no data
    if (num_pixels := float(counts.sum())) < 2:
        return None
    levels = torch.arange(256, dtype=torch.float64, device=image.device)
    mean = float((counts * levels).sum()) / num_pixels
    variance = float((counts * (levels - mean) ** 2).sum()) / num_pixels
    return GreyStatistics(mean, variance**0.5) if variance > 0 else None


def _looks_raw(images: Sequence[Tensor]) -> bool:
    """Whether floats of one volume are certainly not normalised."""
    if not images:
        return False
    grey = torch.cat([image.flatten() for image in images])
    tissue = grey[(grey != 0) & torch.isfinite(grey)]
    if tissue.numel() < 2:
        return False
    return bool(tissue.min() > 0 or tissue.float().std() >= _STD_RANGE[1])
