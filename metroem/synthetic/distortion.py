"""Distort sections by known fields, as cutting, mounting and imaging do.

Section z shows tissue T_z through a pull field g_z:

    section_z(p) = T_z(p + g_z(p))

If T_z and T_(z-1) are truly aligned, section z (src) is aligned to section z - 1
(tgt) by the field

    truth = compose(g_tgt, invert(g_src))

Alignments of these sections are scored against it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from metroem.errors import UsageError
from metroem.geometry.field import compose, invert, warp
from metroem.synthetic.tissue import SmoothNoise

BORDER_PX = 16  # the truth is not valid this close to borders and defects
FOLD_PX = 5.0  # half the width of the dark line of a fold
FOLD_MARGIN_PX = 24.0  # the truth is not valid this close to a fold
FOLD_GREY = 24.0  # grey level of a fold


@dataclass(frozen=True)
class Distortion:
    """How much sections are distorted; random values are drawn for each section.

    Attributes:
        peak_px: range of the largest smooth displacement of a section.
        knot_px: distance between control points of the smooth displacement.
        shift_px: largest shift along rows and cols.
        degrees: largest rotation.
        stretch: largest change of length, as a fraction.
        fold: probability of a fold.
        corner: probability of a missing corner.
        noise: range of the standard deviation of imaging noise, grey levels.
        contrast: largest change of contrast, as a fraction.
        brightness: largest change of brightness, grey levels.
    """

    peak_px: tuple[float, float] = (4.0, 8.0)
    knot_px: float = 120.0
    shift_px: float = 4.0
    degrees: float = 0.4
    stretch: float = 0.004
    fold: float = 0.15
    corner: float = 0.15
    noise: tuple[float, float] = (5.0, 9.0)
    contrast: float = 0.15
    brightness: float = 12.0


class Section(NamedTuple):
    """One distorted section."""

    image: np.ndarray  # (H, W) uint8, 0 = no data, tissue >= 1
    field: Tensor  # (1, 2, H + 2 * margin, W + 2 * margin), px: distorted it
    near_fold: np.ndarray  # (H, W) bool: in or near a fold


class GroundTruth(NamedTuple):
    """The field that truly aligns a pair."""

    field: Tensor  # (1, 2, H, W), px
    valid: Tensor  # (1, 1, H, W) bool: tissue in both, away from borders and folds


def random_field(
    rng: np.random.Generator, shape: tuple[int, int], distortion: Distortion
) -> Tensor:
    """Draw a smooth random displacement plus a shift, a rotation and a stretch.

    Args:
        rng: source of all randomness.
        shape: (H, W), px.
        distortion: ranges of the random values.

    Returns:
        (1, 2, H, W) float32, px, pull.
    """
    scale = (distortion.knot_px, distortion.knot_px)
    smooth = np.stack(
        [SmoothNoise(rng, (1.0, *shape), scale).section(0.0) for _ in range(2)]
    )
    largest = np.linalg.norm(smooth, axis=0).max()
    smooth *= rng.uniform(*distortion.peak_px) / largest
    angle = np.deg2rad(rng.uniform(-1, 1) * distortion.degrees)
    linear = np.array([[0.0, angle], [-angle, 0.0]])
    linear += rng.uniform(-1, 1, (2, 2)) * distortion.stretch
    row, col = np.mgrid[: shape[0], : shape[1]]
    centred = np.stack([col - shape[1] / 2, row - shape[0] / 2])
    shift = rng.uniform(-1, 1, (2, 1, 1)) * distortion.shift_px
    field = smooth + np.tensordot(linear, centred, 1) + shift
    return torch.from_numpy(field.astype(np.float32))[None]


def distort(
    tissue: np.ndarray,
    distortion: Distortion,
    *,
    margin_px: int,
    rng: np.random.Generator,
) -> Section:
    """Make one section as a microscope might show it.

    Args:
        tissue: (H + 2 * margin_px, W + 2 * margin_px) uint8, tissue everywhere.
        distortion: ranges of the random values, and probabilities of defects.
        margin_px: width of extra tissue on each side, for displacements to reach.
        rng: source of all randomness.

    Returns:
        The section with its field.

    Raises:
        UsageError: no pixel is left inside the margin.
    """
    rows, cols = (size - 2 * margin_px for size in tissue.shape)
    if min(rows, cols) < 1:
        raise UsageError(
            f"tissue of {tissue.shape} px has nothing inside a margin of "
            f"{margin_px} px; give larger sections"
        )
    field = random_field(rng, (tissue.shape[0], tissue.shape[1]), distortion)
    fold_distance = np.full(tissue.shape, np.inf)
    if rng.random() < distortion.fold:
        fold_distance, jump = _fold(rng, (tissue.shape[0], tissue.shape[1]))
        field = field + jump
    inside = slice(margin_px, margin_px + rows), slice(margin_px, margin_px + cols)
    image = _image(_pull(tissue, field)[inside], distortion, rng)
    distance = np.abs(fold_distance[inside])
    dark = np.clip(FOLD_PX + 0.5 - distance, 0, 1)
    image += dark * (FOLD_GREY + rng.normal(0, 4, image.shape) - image)
    image = np.clip(np.round(image), 1, 255).astype(np.uint8)
    if rng.random() < distortion.corner:
        image[_corner(rng, (rows, cols))] = 0
    return Section(image, field, distance < FOLD_MARGIN_PX)


def true_pair(src: Section, tgt: Section) -> GroundTruth:
    """Compute the field that truly aligns src to tgt.

    Args:
        src: the moving section.
        tgt: the fixed section.

    Returns:
        The true field on the pixels of the sections, and where it is valid.
    """
    margin = (tgt.field.shape[-1] - tgt.image.shape[-1]) // 2
    field = compose(tgt.field, invert(src.field))
    rows, cols = tgt.image.shape
    field = field[..., margin : margin + rows, margin : margin + cols].contiguous()
    clear_src, clear_tgt = (_clear(section) for section in (src, tgt))
    valid = (warp(clear_src, field) > 0.999) & (clear_tgt > 0)
    return GroundTruth(field, valid)


def _clear(section: Section) -> Tensor:
    """Mark tissue away from borders and defects: (1, 1, H, W) float, 1 there."""
    clear = (section.image > 0) & ~section.near_fold
    distance = np.asarray(ndimage.distance_transform_edt(np.pad(clear, 1)))
    away = distance[1:-1, 1:-1] > BORDER_PX
    return torch.from_numpy(away.astype(np.float32))[None, None]


def _pull(tissue: np.ndarray, field: Tensor) -> np.ndarray:
    """Warp tissue: (H, W) float32 tissue(p + field(p)), by cubic splines.

    Linear interpolation would blur more.
    """
    row, col = np.mgrid[: tissue.shape[0], : tissue.shape[1]]
    d_cols, d_rows = field[0].numpy()
    positions = [row + d_rows, col + d_cols]
    return ndimage.map_coordinates(
        tissue.astype(np.float32), positions, order=3, mode="mirror"
    )


def _image(
    tissue: np.ndarray, distortion: Distortion, rng: np.random.Generator
) -> np.ndarray:
    """Change contrast and brightness, and add noise: (H, W) float64."""
    contrast = 1 + distortion.contrast * rng.uniform(-1, 1)
    brightness = distortion.brightness * rng.uniform(-1, 1)
    noise = rng.normal(0, rng.uniform(*distortion.noise), tissue.shape)
    mean = tissue.mean()
    return mean + contrast * (tissue - mean) + brightness + noise


def _fold(
    rng: np.random.Generator, shape: tuple[int, int]
) -> tuple[np.ndarray, Tensor]:
    """Draw a fold: signed distance to it (H, W), px, and its field (1, 2, H, W).

    A fold hides tissue, so its two sides have moved together: the field jumps across
    it. The jump is smooth enough that the field can be inverted.
    """
    row, col = np.mgrid[: shape[0], : shape[1]]
    angle = rng.uniform(0, np.pi)
    normal = np.array([np.cos(angle), np.sin(angle)])  # along cols, rows
    middle = rng.uniform(0.25, 0.75, 2) * shape
    wave = SmoothNoise(rng, (1.0, *shape), (60.0, 60.0)).section(0.0)
    distance = normal[0] * (col - middle[1]) + normal[1] * (row - middle[0]) + 4 * wave
    jump = rng.uniform(4, 8) / 2 * np.tanh(distance / 12)
    field = normal[:, None, None] * jump
    return distance, torch.from_numpy(field.astype(np.float32))[None]


def _corner(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Draw a missing corner: (H, W) bool, ragged, up to a third of each side."""
    row, col = np.mgrid[: shape[0], : shape[1]]
    size = rng.uniform(0.15, 0.33, 2) * shape
    raggedness = SmoothNoise(rng, (1.0, *shape), (12.0, 12.0)).section(0.0)
    missing = row / size[0] + col / size[1] < 1 + 0.04 * raggedness
    if rng.random() < 0.5:
        missing = missing[::-1]
    return missing[:, ::-1] if rng.random() < 0.5 else missing
