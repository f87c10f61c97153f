"""Find folds, cracks and stains in images."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from metroem.imaging.masks import tissue_mask

# What `find_bands` takes for a defect, in standard deviations of tissue and pixels.
# Measured 2026-11 on 45 FIB-SEM and 20 TEM sections, and 40 with planted defects:
# 0.01 % of clean pixels taken, at most 0.5 % of a section; of dark folds 98 %, of
# cracks 75 %, of stains 60 % of the pixels found.
_SMOOTHING_PX = 1.5


_LIKELY, _SURE = 1.4, 2.1


_SURE_SHARE = 0.45


_MIN_BLOB_PX = 300


_MIN_LENGTH = 0.4  # of the shorter side of the image


_MIN_LENGTH_PX = 150


_MAX_WIDTH_PX = 45


_REACH_PX = 4


def find_defects(
    image: Tensor, *, min_thickness: int = 70, min_px: int = 400
) -> Tensor:
    """Folds, cracks, stains and holes of sections; see `find_gaps`, `find_bands`.

    Args:
        image: (B, 1, H, W), 0 = no data.
        min_thickness: gaps of the tissue up to this many pixels are taken.
        min_px: gaps of at most so many pixels are left out.

    Returns:
        (B, 1, H, W) bool.
    """
    gaps = find_gaps(image, min_thickness=min_thickness, min_px=min_px)
    return gaps | find_bands(image)


def find_gaps(image: Tensor, *, min_thickness: int, min_px: int) -> Tensor:
    """Folds, cracks and holes that show as "no data" inside the tissue.

    They are the zeros that a morphological closing of the tissue fills, in
    connected components above a size.

    Args:
        image: (B, 1, H, W), 0 = no data.
        min_thickness: gaps up to this many pixels are closed.
        min_px: components of at most so many pixels are left out.

    Returns:
        (B, 1, H, W) bool.

    Source: the original's `aligner.py`; scipy labels the components, which
    torch cannot.
    """
    tissue = tissue_mask(image)[:, 0].cpu().numpy()
    if tissue.all():
        return torch.zeros_like(image, dtype=torch.bool)
    defects = np.stack([_gaps(t, min_thickness // 2, min_px) for t in tissue])
    return torch.from_numpy(defects)[:, None].to(image.device)


def find_bands(image: Tensor) -> Tensor:
    """Folds, cracks and stains that show as darker or brighter than tissue.

    Dark and bright areas, once membranes are smoothed away, are taken if they
    are as long and thin as a fold, or mostly beyond what tissue reaches: a
    mitochondrion is neither. Bands less than 6 px wide are not found.

    Args:
        image: (B, 1, H, W), any scale of grey levels, 0 = no data.

    Returns:
        (B, 1, H, W) bool, in blocks of 2 x 2 px; never "no data".
    """
    rows, cols = image.shape[-2:]
    tissue = tissue_mask(image)
    share = F.avg_pool2d(tissue.float(), 2, ceil_mode=True)
    grey = F.avg_pool2d(image.float(), 2, ceil_mode=True) / share.clamp(min=0.25)
    bands = np.stack(
        [
            _bands(one_grey, one_share > 0.5)
            for one_grey, one_share in zip(
                grey[:, 0].cpu().numpy(), share[:, 0].cpu().numpy(), strict=True
            )
        ]
    )
    found = torch.from_numpy(bands)[:, None].to(image.device)
    found = found.repeat_interleave(2, -2).repeat_interleave(2, -1)
    return found[..., :rows, :cols] & tissue


def _bands(grey: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """`find_bands` of one image, (H, W), at half its size."""
    if not tissue.any():
        return np.zeros_like(tissue)
    # "No data" becomes ordinary tissue, so that smoothing makes no edge of it.
    filled = np.where(tissue, grey, grey[tissue].mean())
    smooth = ndimage.gaussian_filter(filled, _SMOOTHING_PX / 2, truncate=3)
    low, middle, high = np.percentile(smooth[tissue][::3], (16, 50, 84))
    found = np.zeros_like(tissue)
    for signed, spread in (
        (middle - smooth, middle - low),
        (smooth - middle, high - middle),
    ):
        if spread > 0:
            found |= _large_areas(signed / spread, tissue)
    return found


def _large_areas(deviation: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """What of an image, (H, W) at half its size, is too far off to be tissue.

    Args:
        deviation: from the median, in spreads (standard deviations of tissue).
        tissue: bool.
    """
    likely = _opened(tissue & (deviation > _LIKELY))
    sure = likely & (deviation > _SURE)
    labels = _labels(likely)
    area = np.bincount(labels.ravel())
    count = len(area) - 1
    num_sure = np.bincount(labels[sure], minlength=count + 1)
    extreme = num_sure > np.maximum(_SURE_SHARE * area, _MIN_BLOB_PX / 4)
    extreme[0] = False
    long = np.zeros(count + 1, bool)
    for label, (rows, cols) in enumerate(ndimage.find_objects(labels), 1):
        length = np.hypot(rows.stop - rows.start, cols.stop - cols.start)
        needed = max(_MIN_LENGTH * min(tissue.shape), _MIN_LENGTH_PX / 2)
        long[label] = length >= needed and area[label] < length * _MAX_WIDTH_PX / 2
    if not extreme.any():
        return long[labels]
    # What touches an extreme area is tissue again, some pixels away from it.
    reach = 2 * (_REACH_PX // 2) + 1
    beside = np.asarray(ndimage.maximum_filter(sure, reach), bool)
    return (long & ~extreme)[labels] | (extreme[labels] & beside)


def _opened(mask: np.ndarray) -> np.ndarray:
    """What of a mask, (H, W), squares of 3 x 3 px fit into.

    Row by row and column by column: scipy takes ten times as long.
    """
    for combine in (np.logical_and, np.logical_or):
        padded = np.pad(mask, 1)
        rows = combine(combine(padded[:-2], padded[1:-1]), padded[2:])
        mask = combine(combine(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])
    return mask


def _gaps(tissue: np.ndarray, radius: int, min_px: int) -> np.ndarray:
    # Padded by what is tissue at the border, so that closing does not eat it.
    padded = np.pad(tissue, radius, mode="edge")
    closed = ndimage.binary_closing(padded, iterations=max(radius, 1))
    inside = closed[radius:, radius:][: tissue.shape[0], : tissue.shape[1]]
    labels = _labels(inside & ~tissue)
    large = np.bincount(labels.ravel()) > min_px
    large[0] = False
    return large[labels]


def _labels(mask: np.ndarray) -> np.ndarray:
    """(H, W) int64: number of the connected component of each pixel, 0 for none."""
    return np.asarray(ndimage.label(mask)[0], dtype=np.int64)  # type: ignore[index]
