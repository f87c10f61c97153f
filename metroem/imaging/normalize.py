"""Grey levels as the networks want them: mean 0, std 1 over tissue, 0 no data."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The original's reader takes anything darker as "no data" (`dataset.py`).
DARKEST = -4.0
# Normalised by a reference area, tissue may be off mean 0 and std 1, but not as far
# as grey levels of 0..255 or 0..1 are.
_LARGEST_MEAN, _STD_RANGE = 1.5, (0.3, 3.0)
# What a tissue pixel at the mean becomes, so that it is not taken for "no data".
_MEAN_GREY = 1e-4


class GreyStatistics(NamedTuple):
    """Mean and standard deviation of the tissue of one image."""

    mean: float  # grey levels
    std: float  # grey levels, > 0


def looks_normalized(statistics: GreyStatistics) -> bool:
    """Whether tissue with these statistics may be that of a normalised image."""
    low, high = _STD_RANGE
    return abs(statistics.mean) <= _LARGEST_MEAN and low < statistics.std < high


def tissue_statistics(image: Tensor) -> GreyStatistics | None:
    """Mean and standard deviation over the finite pixels that are not 0.

    Args:
        image: any shape, raw grey levels, 0 = no data.

    Returns:
        The statistics, or None where there is no tissue or no contrast.
    """
    if image.dtype == torch.uint8:
        return _statistics_of_levels(image)
    is_tissue = (image != 0) & torch.isfinite(image)
    # Picking pixels takes longer than all the rest: mostly there is nothing to pick.
    tissue = image.flatten() if bool(is_tissue.all()) else image[is_tissue]
    tissue = tissue.double()
    if tissue.numel() < 2 or not (std := float(tissue.std(correction=0))) > 0:
        return None
    return GreyStatistics(float(tissue.mean()), std)


def normalize(image: Tensor, statistics: GreyStatistics | None = None) -> Tensor:
    """Shift and scale the tissue of an image; where it is 0 it stays 0.

    Tissue is kept at or above `DARKEST` and off exact 0, since both mean "no
    data" to a reader.

    Args:
        image: any shape, raw grey levels, 0 = no data.
        statistics: of the area to be normalised by; the image's own if None.

    Returns:
        float32 of the same shape; all 0 for an image without tissue.
    """
    statistics = statistics or tissue_statistics(image)
    if statistics is None:
        return torch.zeros_like(image, dtype=torch.float32)
    if image.dtype == torch.uint8:
        # Each grey level once, not each pixel.
        levels = torch.arange(256, dtype=torch.float32, device=image.device)
        greys = normalize(levels, statistics)
        return greys.index_select(0, image.flatten().int()).view(image.shape)
    grey = ((image.double() - statistics.mean) / statistics.std).float()
    return keep_no_data(grey.clamp(min=DARKEST), image)


def normalize_if_raw(images: Sequence[Tensor], wanted: bool | str) -> list[Tensor]:
    """Normalise images of one volume that somebody hands over, if it is wanted.

    "raw" normalises what is not normalised yet. Integers never are. Floats are taken
    for raw where none is below 0, or where they vary too much for tissue of std 1.
    They are judged together: a small image of a normalised volume may be brighter
    than the mean of its section all over, two sections seldom are.

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
    """An image of any shape and type, 0 ("no data") where it is NaN or infinite."""
    if not image.is_floating_point():
        return image
    return torch.where(torch.isfinite(image), image, 0.0)


def keep_no_data(changed: Tensor, image: Tensor) -> Tensor:
    """A changed image, exactly 0 where it was before and nowhere else.

    Args:
        changed: any shape, normalised.
        image: the same before the change, 0 = no data.
    """
    changed = torch.where(changed == 0, _MEAN_GREY, changed)
    return torch.where(image == 0, 0.0, changed)


def coarsen_image(image: Tensor, levels: int) -> Tensor:
    """Average an image to a coarser mip over its tissue pixels alone.

    A coarse pixel of which less than half is tissue becomes 0 ("no data").

    Args:
        image: (B, C, H, W) float, 0 = no data.
        levels: how many mips coarser, >= 0; odd borders are averaged over the
            pixels that are there.

    Returns:
        (B, C, ceil(H / 2**levels), ceil(W / 2**levels)).
    """
    for _ in range(levels):
        tissue = (image != 0).to(image.dtype)
        image, share = (
            F.avg_pool2d(t, 2, ceil_mode=True, count_include_pad=False)
            for t in (image, tissue)
        )
        image = torch.where(share >= 0.5, image / share.clamp(min=0.5), 0.0)
    return image


def _statistics_of_levels(image: Tensor) -> GreyStatistics | None:
    """`tissue_statistics` of uint8, by how often each grey level comes."""
    counts = torch.bincount(image.flatten(), minlength=256).double()
    counts[0] = 0  # no data
    if (num_pixels := float(counts.sum())) < 2:
        return None
    levels = torch.arange(256, dtype=torch.float64, device=image.device)
    mean = float((counts * levels).sum()) / num_pixels
    variance = float((counts * (levels - mean) ** 2).sum()) / num_pixels
    return GreyStatistics(mean, variance**0.5) if variance > 0 else None


def _looks_raw(images: Sequence[Tensor]) -> bool:
    """Whether floats of one volume are surely not normalised."""
    if not images:
        return False
    grey = torch.cat([image.flatten() for image in images])
    tissue = grey[(grey != 0) & torch.isfinite(grey)]
    if tissue.numel() < 2:
        return False
    return bool(tissue.min() > 0 or tissue.float().std() >= _STD_RANGE[1])
