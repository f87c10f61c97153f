"""A pair for the benchmarks of the finetuner: features, masks, and a field to find."""

from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from metroem.distort import Distortion, distort
from metroem.tissue import TissueRecipe, make_tissue

NUM_FEATURES = 7
_MARGIN_PX = 32
_WARP = Distortion(peak_px=(2.0, 6.0), shift_px=1.0, degrees=0.1, fold=0.0, corner=0.0)

_NO_DATA = {"binarization": {"strat": "eq", "value": 0}, "coarsen_ranges": [[1, 0]]}
# As the original's aligner has them.
RULES: dict[str, Any] = {
    "mse_keys_to_apply": {
        "src": [{"name": "src_zeros", **_NO_DATA}, {"name": "src_defects", **_NO_DATA}],
        "tgt": [{"name": "tgt_zeros", **_NO_DATA}, {"name": "tgt_defects", **_NO_DATA}],
    },
    "sm_keys_to_apply": {
        "src": [
            {"name": "src_zeros", **_NO_DATA, "mask_value": 1e-5},
            {"name": "src_defects", **_NO_DATA},
        ],
        "tgt": [{"name": "tgt_defects", **_NO_DATA}],
    },
}
# As production pipelines call it.
CALL: dict[str, Any] = {
    "sm": 30.0,
    "lr": 0.1,
    "normalize": False,
    "l2": 0,
    "crop": 2,
    "max_bad": 5,
    **RULES,
}


def make_pair(seed: int, size: int = 512) -> dict[str, Tensor]:
    """The tensors of a call of `optimize_pre_post_ups`.

    Two neighbouring sections of made tissue, each warped by up to 2 to 6 px and with
    noise of its own; a corner of src and a strip of tgt have no data, and a band goes
    through each, so that the masks move with the field. The field starts at zero.

    Args:
        seed: of everything.
        size: of a side, px; the original takes square pairs alone.

    Returns:
        By the names of the arguments: features (1, 7, size, size), field (1, 2, size,
        size) px, masks of defects (1, size, size) and of no data (1, 1, size, size).
    """
    rng = np.random.default_rng(seed)
    side = size + 2 * _MARGIN_PX
    tissue = make_tissue(TissueRecipe(2, side, side, seed=seed))
    masks = _masks(size)
    made: dict[str, Tensor] = {"initial_res": torch.zeros(1, 2, size, size)}
    for name, section in zip(("src", "tgt"), tissue, strict=True):
        image = distort(section, _WARP, margin_px=_MARGIN_PX, rng=rng).image
        zeros, defects = masks[name]
        grey = image.astype(np.float32)
        grey[defects] = rng.normal(40, 10, int(defects.sum()))
        features = _features(grey, ~zeros)
        made[name] = torch.from_numpy(features)[None]
        made[f"{name}_zeros"] = torch.from_numpy(zeros)[None, None]
        made[f"{name}_defects"] = torch.from_numpy(defects.astype(np.float32))[None]
    return made


def _masks(size: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For src and tgt where there is no data, and the defects, (size, size) bool."""
    row, col = np.mgrid[:size, :size] / size
    wave = 0.02 * np.sin(9 * row)
    return {
        "src": (row + col < 0.25, abs(col - 0.6 - 0.2 * row - wave) < 0.012),
        "tgt": (col > 0.95, abs(row - 0.7 + 0.1 * col - wave) < 0.008),
    }


def _features(grey: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """(7, H, W) float32: an image at some scales and its slopes, each of std 1."""
    fine, middle, coarse = (ndimage.gaussian_filter(grey, s) for s in (1, 2, 5))
    found = [fine, middle, fine - middle, middle - coarse]
    found += [ndimage.gaussian_filter(grey, 2, order=o) for o in ((0, 1), (1, 0))]
    found += [ndimage.gaussian_filter(np.hypot(*found[-2:]), 1)]
    stack = np.stack(found)
    inside = stack[:, tissue]
    stack -= inside.mean(1)[:, None, None]
    stack /= inside.std(1)[:, None, None]
    return (stack * tissue).astype(np.float32)
