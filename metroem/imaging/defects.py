"""Find folds, cracks and stains in images."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from metroem.imaging.masks import tissue_mask

# Limits of `find_bands`. Measured 2026-11 on 45 FIB-SEM and 20 TEM sections, and 40
# with planted defects: it marks 0.01 % of clean pixels, at most 0.5 % of a section. It
# finds 98 % of the pixels of dark folds, 75 % of cracks, 60 % of stains.
_SMOOTHING_PX = 1.5
_LIKELY, _SURE = 1.4, 2.1  # deviation, in standard deviations of tissue
_SURE_FRACTION = 0.45  # of a blob's pixels
_MIN_BLOB_PX = 300
_MIN_LENGTH = 0.4  # fraction of the shorter side of the image
_MIN_LENGTH_PX = 150
_MAX_WIDTH_PX = 45
_MARGIN_PX = 4  # around sure pixels of a blob


def find_defects(
    image: Tensor, *, min_thickness: int = 70, min_px: int = 400
) -> Tensor:
    """Find folds, cracks, stains and holes, by `find_gaps` and `find_bands`.

    Args:
        image: (B, 1, H, W), 0 = no data.
        min_thickness: gaps of the tissue up to this many pixels wide are marked.
        min_px: gaps of at most this many pixels are left out.

    Returns:
        (B, 1, H, W) bool.
    """
    gaps = find_gaps(image, min_thickness=min_thickness, min_px=min_px)
    return gaps | find_bands(image)


def find_gaps(image: Tensor, *, min_thickness: int, min_px: int) -> Tensor:
    """Find folds, cracks and holes that show as "no data" inside the tissue.

    A morphological closing of the tissue fills them. Connected components of the
    filled pixels are marked if they are large enough.

    Args:
        image: (B, 1, H, W), 0 = no data.
        min_thickness: gaps up to this many pixels wide are closed.
        min_px: components of at most this many pixels are left out.

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
    """Find folds, cracks and stains that are darker or brighter than tissue.

    Membranes are smoothed away. Then dark and bright areas are marked if they are long
    and thin like a fold, or if most of their pixels are too dark or bright for tissue.
    A mitochondrion is neither. Bands less than 6 px wide are not found.

    Args:
        image: (B, 1, H, W), any scale of grey levels, 0 = no data.

    Returns:
        (B, 1, H, W) bool, in blocks of 2 x 2 px; False at "no data".
    """
    rows, cols = image.shape[-2:]
    tissue = tissue_mask(image)
    fraction = F.avg_pool2d(tissue.float(), 2, ceil_mode=True)
    grey = F.avg_pool2d(image.float(), 2, ceil_mode=True) / fraction.clamp(min=0.25)
    bands = np.stack(
        [
            _bands(one_grey, one_fraction > 0.5)
            for one_grey, one_fraction in zip(
                grey[:, 0].cpu().numpy(), fraction[:, 0].cpu().numpy(), strict=True
            )
        ]
    )
    found = torch.from_numpy(bands)[:, None].to(image.device)
    found = found.repeat_interleave(2, -2).repeat_interleave(2, -1)
    return found[..., :rows, :cols] & tissue


def _bands(grey: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Find bands in one image, (H, W), at half its size."""
    if not tissue.any():
        return np.zeros_like(tissue)
    # "No data" is filled with mean tissue, so that smoothing makes no edge there.
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
    """Mark areas of an image, (H, W) at half its size, that are not tissue.

    Args:
        deviation: deviation from the median, in standard deviations of tissue.
        tissue: (H, W) bool.
    """
    likely = _open(tissue & (deviation > _LIKELY))
    sure = likely & (deviation > _SURE)
    labels = _labels(likely)
    area = np.bincount(labels.ravel())
    count = len(area) - 1
    num_sure = np.bincount(labels[sure], minlength=count + 1)
    extreme = num_sure > np.maximum(_SURE_FRACTION * area, _MIN_BLOB_PX / 4)
    extreme[0] = False
    long = np.zeros(count + 1, bool)
    for label, (rows, cols) in enumerate(ndimage.find_objects(labels), 1):
        length = np.hypot(rows.stop - rows.start, cols.stop - cols.start)
        needed = max(_MIN_LENGTH * min(tissue.shape), _MIN_LENGTH_PX / 2)
        long[label] = length >= needed and area[label] < length * _MAX_WIDTH_PX / 2
    if not extreme.any():
        return long[labels]
    # Only the surroundings of sure pixels are marked: further away, an extreme area may
    # touch tissue.
    size = 2 * (_MARGIN_PX // 2) + 1
    near_sure = np.asarray(ndimage.maximum_filter(sure, size), bool)
    return (long & ~extreme)[labels] | (extreme[labels] & near_sure)


def _open(mask: np.ndarray) -> np.ndarray:
    """Open a mask, (H, W), with a square of 3 x 3 px.

    Erosion and dilation go along rows, then along cols: scipy takes ten times as long.
    """
    for combine in (np.logical_and, np.logical_or):
        padded = np.pad(mask, 1)
        rows = combine(combine(padded[:-2], padded[1:-1]), padded[2:])
        mask = combine(combine(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])
    return mask


def _gaps(tissue: np.ndarray, radius: int, min_px: int) -> np.ndarray:
    """Find gaps in one tissue mask, (H, W)."""
    # Padded by repeating the border, so that closing does not erode it.
    padded = np.pad(tissue, radius, mode="edge")
    closed = ndimage.binary_closing(padded, iterations=max(radius, 1))
    inside = closed[radius:, radius:][: tissue.shape[0], : tissue.shape[1]]
    labels = _labels(inside & ~tissue)
    large = np.bincount(labels.ravel()) > min_px
    large[0] = False
    return large[labels]


def _labels(mask: np.ndarray) -> np.ndarray:
    """Number connected components: (H, W) int64, 0 for no component."""
    return np.asarray(ndimage.label(mask)[0], dtype=np.int64)  # type: ignore[index]
