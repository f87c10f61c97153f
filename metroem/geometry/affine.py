"""Fit, compose and invert affine maps, and turn them into displacement fields.

A map is a (2, 3) float64 matrix, pull: (col, row, 1) of a target pixel -> (col, row) of
the source. Coordinates are indices of pixel centres, at mip 0 unless said otherwise.
"""

import numpy as np
import torch
from torch import Tensor

from metroem.errors import FieldError
from metroem.geometry.grid import Grid

MODELS = ("rigid", "similarity", "affine")
# Points that are needed to fit a model.
MIN_POINTS = {"rigid": 2, "similarity": 2, "affine": 3}


def identity() -> np.ndarray:
    """Make the map that leaves all points where they are, (2, 3)."""
    return np.eye(2, 3)


def compose(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compose maps: second(first(p)), as `field.compose` orders them."""
    return np.column_stack(
        [second[:, :2] @ first[:, :2], second[:, :2] @ first[:, 2] + second[:, 2]]
    )


def invert(matrix: np.ndarray) -> np.ndarray:
    """Invert a map.

    Raises:
        FieldError: it maps all points to a line or a point.
    """
    if not abs(determinant(matrix)) > 1e-12:
        raise FieldError(f"the map {matrix.tolist()} has no inverse")
    linear = np.linalg.inv(matrix[:, :2])
    return np.column_stack([linear, -linear @ matrix[:, 2]])


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map points, (N, 2) col and row."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def determinant(matrix: np.ndarray) -> float:
    """Return by how much areas grow; negative if the map mirrors."""
    return float(np.linalg.det(matrix[:, :2]))


def scale(matrix: np.ndarray) -> float:
    """Return by how much lengths grow, as a geometric mean over directions."""
    return abs(determinant(matrix)) ** 0.5


def fit(
    points: np.ndarray,
    images: np.ndarray,
    model: str,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Fit the map that takes points to their images, by weighted least squares.

    Args:
        points: (N, 2) col and row.
        images: (N, 2), where the points should be mapped to.
        model: "rigid", "similarity" or "affine". The first two do not mirror.
        weights: (N,), not negative; equal if None.

    Returns:
        (2, 3) matrix.

    Raises:
        FieldError: too few points with a weight, or an unknown model.

    Source: Umeyama 1991, doi:10.1109/34.88573, for rigid and similarity.
    """
    if model not in MODELS:
        raise FieldError(f"model {model!r}: expected one of {', '.join(MODELS)}")
    share = np.ones(len(points)) if weights is None else weights
    if np.count_nonzero(share) < MIN_POINTS[model]:
        raise FieldError(
            f"{np.count_nonzero(share)} points: a map of model {model} needs "
            f"{MIN_POINTS[model]}"
        )
    share = share / share.sum()
    middle, image_middle = share @ points, share @ images
    centred, image_centred = points - middle, images - image_middle
    covariance = (image_centred * share[:, None]).T @ centred
    if model == "affine":
        spread = (centred * share[:, None]).T @ centred
        linear = covariance @ np.linalg.pinv(spread)
    else:
        left, stretch, right = np.linalg.svd(covariance)
        sign = np.array([1.0, np.sign(np.linalg.det(left @ right)) or 1.0])
        linear = (left * sign) @ right
        if model == "similarity":
            variance = float(share @ (centred**2).sum(1))
            linear *= (stretch @ sign) / max(variance, 1e-12)
    return np.column_stack([linear, image_middle - linear @ middle])


def nearest_similarity(matrix: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Remove stretch and shear from a map; a map that mirrors still does.

    Args:
        matrix: (2, 3).
        center: (2,) col and row of the point whose image stays the same.

    Returns:
        (2, 3): the similarity whose linear part is nearest in the least-squares sense.
    """
    left, stretch, right = np.linalg.svd(matrix[:, :2])
    linear = stretch.mean() * (left @ right)
    image = matrix[:, :2] @ center + matrix[:, 2]
    return np.column_stack([linear, image - linear @ center])


def change_mip(matrix: np.ndarray, mip: int, new_mip: int) -> np.ndarray:
    """Express a map in pixels of another mip.

    Pixel j of mip m has its centre at (j + 0.5) * 2**m - 0.5 in mip-0 pixels.
    """
    factor = 2.0 ** (mip - new_mip)
    linear = matrix[:, :2]
    half = np.array([0.5, 0.5])
    shift = factor * (matrix[:, 2] - linear @ half + half) + linear @ half - half
    return np.column_stack([linear, shift])


def swap_axes(matrix: np.ndarray) -> np.ndarray:
    """Express a map of (col, row) as one of (row, col), or the other way round."""
    return matrix[::-1][:, [1, 0, 2]]


def as_field(matrix: np.ndarray, grid: Grid) -> Tensor:
    """Compute the displacement field of a map.

    Args:
        matrix: (2, 3) pull map of (col, row) in mip-0 pixels of the volume: col counts
            along its y, row along its x.
        grid: pixels of the field.

    Returns:
        (1, 2, H, W) float32, relative, pixels of grid.mip, channel 0 along cols. It is
        computed in float64 and rounded at the end.
    """
    spacing = 1 << grid.mip
    cols = grid.y + (np.arange(grid.cols) + 0.5) * spacing - 0.5
    rows = grid.x + (np.arange(grid.rows) + 0.5) * spacing - 0.5
    relative = matrix[:, :2] - np.eye(2)
    along_cols = relative[:, :1] * cols + matrix[:, 2:]
    along_rows = relative[:, 1:] * rows
    field = (along_cols[:, None, :] + along_rows[:, :, None]) / spacing
    return torch.from_numpy(field.astype(np.float32))[None]
