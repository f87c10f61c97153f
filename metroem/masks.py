"""Where a loss counts: masks from grey levels, and weights from masks.

A weight map is (B, 1, H, W) float32, 1 where a pixel counts in full. Weights of
src are given in src's own pixels and are warped along with it.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from metroem.field import warp
from metroem.mask_rules import MaskRule, MaskRules

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
# Of a warped pixel, so that a line of one pixel is not lost between two.
_MASKED_SHARE = 0.4


class PairMaps(NamedTuple):
    """What mask rules of one batch may look at."""

    src: Tensor  # (B, C, H, W) image, 0 = no data
    tgt: Tensor  # (B, C, H, W)
    src_defects: Tensor | None = None  # (B, 1, H, W) bool, True on defects
    tgt_defects: Tensor | None = None  # (B, 1, H, W) bool

    def named(self, name: str) -> Tensor | None:
        """The map of one of `MAP_NAMES`, (B, C, H, W) float; None if not given."""
        if name.endswith("_zeros"):
            image = self.src if name.startswith("src") else self.tgt
            return (~tissue_mask(image[:, :1])).float()
        value = getattr(self, name)
        return None if value is None else value.float()


class PairWeight(NamedTuple):
    """Weights of one loss term, made once for a pair."""

    src: Tensor  # (B, 1, H, W), pixels of src
    tgt: Tensor  # (B, 1, H, W), pixels of tgt

    def along(self, field: Tensor) -> Tensor:
        """The weight of each tgt pixel once src is warped by `field`."""
        return warp(self.src, field, padding="border") * self.tgt


def _counts(rule: MaskRule, values: Tensor) -> Tensor:
    """Bool map: where `values` (B, C, H, W) lets a pixel count in full."""
    low, high = rule.bounds
    match rule.strategy:
        case "eq":
            return values == rule.value
        case "neq":
            return values != rule.value
        case "lt":
            return values < rule.value
        case "gt":
            return values > rule.value
        case "between":
            return (values > low) & (values < high)
        case "not_between":
            return (values < low) | (values > high)
    return values == 1


def rule_weight(rule: MaskRule, values: Tensor) -> Tensor:
    """Weight map (B, 1, H, W) that the map `values` (B, C, H, W) gives."""
    if rule.channel is not None and values.shape[1] > 1:
        values = values[:, rule.channel : rule.channel + 1]
    masked = ~_counts(rule, values).all(dim=1, keepdim=True)
    weight = torch.where(masked, rule.mask_value, 1.0).float()
    for pixels, ring_weight in rule.rings:
        grown = grow(masked, pixels)
        weight = torch.where(grown & ~masked & (weight == 1), ring_weight, weight)
        masked = grown
    return weight


def weigh(rules: MaskRules, maps: PairMaps) -> PairWeight:
    """The weights that `rules` give a pair; a map that is absent masks nothing.

    Args:
        rules: of one loss term.
        maps: of the pair, (B, C, H, W) each.

    Returns:
        Weights of src and tgt, each (B, 1, H, W) float32.
    """

    def side(side_rules: tuple[MaskRule, ...], like: Tensor) -> Tensor:
        weight = torch.ones_like(like[:, :1], dtype=torch.float32)
        for rule in side_rules:
            values = maps.named(rule.name)
            if values is not None:
                weight = torch.minimum(weight, rule_weight(rule, values))
        return weight

    return PairWeight(side(rules.src, maps.src), side(rules.tgt, maps.tgt))


def tissue_mask(image: Tensor) -> Tensor:
    """True where an image has data, i.e. is not exactly 0; any shape."""
    return image != 0


def has_tissue(image: Tensor) -> Tensor:
    """Which images of a batch have any data, (B, C, H, W) -> (B, 1, 1, 1) bool."""
    return tissue_mask(image).flatten(1).any(1).view(-1, 1, 1, 1)


def grow(mask: Tensor, pixels: int) -> Tensor:
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
