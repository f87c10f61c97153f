"""Make artificial brain tissue, cut into sections as electron microscopes show them.

Cells are unions of 3-d Voronoi regions with bent borders and dark membranes. They
contain mitochondria with cristae, bright vacuoles, vesicles, microtubules and
grain. Sections are planes through one volume. So a neurite continues from section
to section, moves and changes, and small objects appear and vanish. As in serial
sections, aligned neighbours correlate (about 0.7 in chunks of 64 px) but differ.

Lengths are pixels of mip 0; positions are (z, row, col) with z in pixels too.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from metroem.errors import UsageError

MARGIN_PX = 48.0  # tissue beyond the sections, so that borders look like the rest
SEED_PX = 40.0  # side of a cube that contains one Voronoi seed on average
CANDIDATES = 8  # nearest seeds that are compared for each pixel
LATTICE_PX = 4  # side of blocks with the same candidates: far below SEED_PX
DEEP_PX = 40.0  # distance to the membrane if no other cell is near


@dataclass(frozen=True)
class TissueRecipe:
    """Size and seed of the tissue to make.

    Attributes:
        num_sections: how many sections.
        rows: height of a section, px.
        cols: width of a section, px.
        thickness_px: distance between sections; 3.5 is about 40 nm at 11 nm per pixel.
        seed: the same seed gives the same tissue.

    Raises:
        UsageError: a size is not positive.
    """

    num_sections: int = 28
    rows: int = 512
    cols: int = 448
    thickness_px: float = 3.5
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_sections, self.rows, self.cols) < 1 or self.thickness_px <= 0:
            raise UsageError(f"{self}: sizes must be positive")

    @property
    def extent_px(self) -> tuple[float, float, float]:
        """Size of the block along z, rows, cols."""
        return self.num_sections * self.thickness_px, self.rows, self.cols


def bspline_weights(positions: np.ndarray, num_knots: int) -> np.ndarray:
    """Compute the weights of cubic B-splines at knots 0, 1, 2, ...

    Args:
        positions: (n,), in units of the knot distance.
        num_knots: how many knots.

    Returns:
        (n, num_knots) float32; rows sum to 1 between knot 1 and the last but one.
    """
    t = np.abs(positions[:, None] - np.arange(num_knots))
    near = 2 / 3 - t**2 + t**3 / 2
    far = np.clip(2 - t, 0, None) ** 3 / 6
    return np.where(t < 1, near, far).astype(np.float32)


class SmoothNoise:
    """A smooth random function of (z, row, col), mean 0, standard deviation about 1."""

    # Cubic B-splines of white noise: the variance is 0.48 per dimension.
    _DEVIATION = 0.48**1.5

    def __init__(
        self,
        rng: np.random.Generator,
        extent_px: tuple[float, float, float],
        scale_px: tuple[float, float],
    ) -> None:
        """Draw the knots; `scale_px` is their distance along z and in the plane."""
        self._scale_px = scale_px[0], scale_px[1], scale_px[1]
        knots = [
            int(size / scale) + 4
            for size, scale in zip(extent_px, self._scale_px, strict=True)
        ]
        self._lattice = rng.standard_normal(knots, np.float32) / self._DEVIATION
        self._rows, self._cols = (
            bspline_weights(np.arange(int(size)) / scale + 1, num)
            for size, scale, num in zip(
                extent_px[1:], self._scale_px[1:], knots[1:], strict=True
            )
        )

    def section(self, z_px: float) -> np.ndarray:
        """Evaluate the function on one plane: (rows, cols) float32."""
        position = np.array([z_px / self._scale_px[0] + 1])
        weights = bspline_weights(position, len(self._lattice))[0]
        used = weights > 0
        plane = np.tensordot(weights[used], self._lattice[used], 1)
        return self._rows @ plane @ self._cols.T


class Organelle(NamedTuple):
    """A capsule: the points within `radius_px` of a line segment."""

    center: np.ndarray  # (3,) z, row, col
    axis: np.ndarray  # (3,) unit vector
    half_length_px: float
    radius_px: float
    is_mitochondrion: bool  # else a vacuole


class _Cells:
    """Voronoi regions joined to cells; finds the cell and membrane of a point."""

    def __init__(self, rng: np.random.Generator, recipe: TissueRecipe) -> None:
        low = np.full(3, -MARGIN_PX)
        high = np.array(recipe.extent_px) + MARGIN_PX
        count = int(np.prod((high - low) / SEED_PX))
        self.seeds = rng.uniform(low, high, (count, 3)).astype(np.float32)
        # Cells are unions of about four regions. The metric counts z less, so cells
        # are elongated along z like neurites.
        stretch = np.array([0.4, 1.0, 1.0])
        parents = self.seeds[: max(count // 4, 2)]
        _, cell = KDTree(parents * stretch).query(self.seeds * stretch)
        self.cell = np.asarray(cell)
        self.grey = 158 + 14 * rng.standard_normal(len(parents))
        self.grey[rng.random(len(parents)) < 0.12] -= 42  # glia
        self.vesicles = rng.random(len(parents)) < 0.3
        self._tree = KDTree(self.seeds)

    def candidates(self, points: np.ndarray) -> np.ndarray:
        """Find the nearest seeds of (3, ...) points: (CANDIDATES, ...) int."""
        _, nearest = self._tree.query(np.moveaxis(points, 0, -1), CANDIDATES)
        return np.ascontiguousarray(np.moveaxis(np.asarray(nearest), -1, 0))

    def locate(
        self, points: np.ndarray, nearest: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the cell of (3, ...) points, and the distance to its membrane.

        Returns:
            Cell and distance (px), each (...,).
        """
        columns = np.ascontiguousarray(self.seeds.T)
        seeds = [columns[:, candidate] for candidate in nearest]
        squared = np.stack([np.square(points - seed).sum(0) for seed in seeds])
        own = squared.argmin(0)[None]
        own_squared = np.take_along_axis(squared, own, 0)[0]
        own_seed = np.take_along_axis(nearest, own, 0)[0]
        cell, own_position = self.cell[own_seed], columns[:, own_seed]
        distance = np.full(cell.shape, DEEP_PX, np.float32)
        for seed, candidate, far in zip(seeds, nearest, squared, strict=True):
            apart = np.sqrt(np.square(seed - own_position).sum(0))
            to_plane = (far - own_squared) / (2 * np.maximum(apart, 1e-3))
            to_plane[self.cell[candidate] == cell] = DEEP_PX
            np.minimum(distance, to_plane, out=distance)
        return cell, distance


def _place_organelles(
    rng: np.random.Generator, cells: _Cells, extent_px: tuple[float, float, float]
) -> list[Organelle]:
    """Place mitochondria and vacuoles where cells are wide enough."""
    block = np.prod(np.array(extent_px) / 100)
    tries = rng.uniform(0, extent_px, (int(300 * block) + 1, 3)).astype(np.float32)
    _, depths = cells.locate(tries.T, cells.candidates(tries.T))
    placed: list[Organelle] = []
    centers = np.empty((0, 3), np.float32)
    for center, depth in zip(tries[depths > 7], depths[depths > 7], strict=True):
        axis = rng.standard_normal(3) * (1.6, 1.0, 1.0)
        axis /= np.linalg.norm(axis)
        is_mitochondrion = depth > 11 and rng.random() < 0.8
        spacing = 34.0 if is_mitochondrion else 22.0
        if len(centers) and np.linalg.norm(centers - center, axis=1).min() < spacing:
            continue
        centers = np.vstack([centers, center])
        radius = rng.uniform(8, min(15, depth)) if is_mitochondrion else 0.0
        radius = radius or rng.uniform(3.5, 6.5)
        length = rng.uniform(6, 30) if is_mitochondrion else rng.uniform(0, 14)
        placed.append(Organelle(center, axis, length, radius, is_mitochondrion))
    return placed


def _spots(
    rng: np.random.Generator, extent_px: tuple[float, float, float], spacing_px: float
) -> np.ndarray:
    """Draw positions of small objects: (n, 3), sorted by z."""
    count = int(np.prod(np.array(extent_px) / spacing_px))
    spots = rng.uniform(0, extent_px, (count, 3))
    return spots[spots[:, 0].argsort()]


@dataclass(frozen=True)
class _Tissue:
    """Everything that sections are painted from."""

    recipe: TissueRecipe
    cells: _Cells
    organelles: list[Organelle]
    vesicles: np.ndarray  # (n, 3)
    microtubules: np.ndarray  # (n, 3), of one plane, since they run along z
    bend: list[SmoothNoise]  # of borders, along rows and cols: large, then small
    density: SmoothNoise  # where membranes are thick and dark
    grain: SmoothNoise
    shade: SmoothNoise


def _make_block(recipe: TissueRecipe) -> _Tissue:
    """Draw all random parts of a block of tissue."""
    rng = np.random.default_rng(recipe.seed)
    extent = recipe.extent_px
    cells = _Cells(rng, recipe)
    bend_scales = [(200.0, 34.0)] * 2 + [(50.0, 11.0)] * 2
    return _Tissue(
        recipe,
        cells,
        _place_organelles(rng, cells, extent),
        _spots(rng, extent, 13.0),
        _spots(rng, (1.0, *extent[1:]), 7.0),
        [SmoothNoise(rng, extent, scale) for scale in bend_scales],
        SmoothNoise(rng, extent, (10.0, 14.0)),
        SmoothNoise(rng, extent, (6.0, 2.0)),
        SmoothNoise(rng, extent, (40.0, 60.0)),
    )


def _bent_points(tissue: _Tissue, z_px: float) -> np.ndarray:
    """Position of each pixel in the unbent block: (3, rows, cols) float32."""
    rows, cols = np.meshgrid(
        np.arange(tissue.recipe.rows, dtype=np.float32),
        np.arange(tissue.recipe.cols, dtype=np.float32),
        indexing="ij",
    )
    large_rows, large_cols, small_rows, small_cols = (
        noise.section(z_px) for noise in tissue.bend
    )
    rows += 8 * large_rows + 2.2 * small_rows
    cols += 8 * large_cols + 2.2 * small_cols
    return np.stack([np.full_like(rows, z_px), rows, cols])


def _locate_section(tissue: _Tissue, points: np.ndarray) -> tuple[np.ndarray, ...]:
    """Find cell and distance to the membrane of each pixel of a section."""
    coarse = points[:, ::LATTICE_PX, ::LATTICE_PX]
    nearest = tissue.cells.candidates(coarse)
    nearest = nearest.repeat(LATTICE_PX, 1).repeat(LATTICE_PX, 2)
    rows, cols = points.shape[1:]
    return tissue.cells.locate(points, nearest[:, :rows, :cols])


def _line(distance: np.ndarray, width_px: float | np.ndarray) -> np.ndarray:
    """Profile of a line: 1 on it, falling to 0 over about `width_px`."""
    return np.exp(-np.square(distance / width_px))


def _paint_organelle(
    grey: np.ndarray, points: np.ndarray, depth: np.ndarray, organelle: Organelle
) -> None:
    """Draw one organelle into `grey` (rows, cols), in place."""
    extent = organelle.half_length_px + organelle.radius_px + 26
    if abs(points[0, 0, 0] - organelle.center[0]) > extent:
        return
    window = tuple(
        slice(max(int(middle - extent), 0), max(int(middle + extent), 0))
        for middle in organelle.center[1:]
    )
    local = points[:, window[0], window[1]]
    if local.size == 0:
        return
    offset = local - organelle.center[:, None, None]
    along = np.tensordot(organelle.axis, offset, 1)
    end = np.clip(along, -organelle.half_length_px, organelle.half_length_px)
    off_axis = offset - end * organelle.axis[:, None, None]
    outside = np.sqrt(np.square(off_axis).sum(0)) - organelle.radius_px
    outside = np.maximum(outside, 3.0 - depth[window])  # stays within its cell
    inner = 184.0 + 0 * outside
    wall = 1.4
    if organelle.is_mitochondrion:
        wave = np.sin(along * 0.85 + 0.35 * off_axis[1] + 0.25 * off_axis[2])
        inner = 106 - 34 * np.clip(wave, 0, 1) * (outside < -3)
        wall = 1.9
    coverage = np.clip(0.5 - outside, 0, 1)
    view = grey[window]
    view += coverage * (inner - view)
    view += 0.8 * _line(outside, wall) * (52 - view)


_RADIUS = np.hypot(*np.mgrid[-4:5, -4:5])  # (9, 9)
_DOT = _line(_RADIUS, 1.3)  # a microtubule
_RING = 0.3 * np.clip(2.8 - _RADIUS, 0, 1) - _line(_RADIUS - 2.8, 1.0)  # a vesicle


def _stamp(spots: np.ndarray, shape: tuple[int, int], kernel: np.ndarray) -> np.ndarray:
    """Stamp `kernel` at each (row, col) of `spots` (n, 2)."""
    marks = np.zeros(shape, np.float32)
    rows, cols = np.round(spots).astype(int).T
    inside = (rows >= 0) & (rows < shape[0]) & (cols >= 0) & (cols < shape[1])
    marks[rows[inside], cols[inside]] = 1
    return ndimage.convolve(marks, kernel.astype(np.float32), mode="constant")


def _paint_section(tissue: _Tissue, z_px: float) -> np.ndarray:
    """Paint the plane at `z_px`: (rows, cols) float32, grey levels."""
    points = _bent_points(tissue, z_px)
    cell, depth = _locate_section(tissue, points)
    shape = depth.shape
    grey = tissue.cells.grey[cell].astype(np.float32)
    grey += 5 * tissue.shade.section(z_px) + 9 * tissue.grain.section(z_px)
    lo, hi = np.searchsorted(tissue.vesicles[:, 0], [z_px - 4, z_px + 4])
    inside = depth > 5
    ring = _stamp(tissue.vesicles[lo:hi, 1:], shape, _RING)
    grey += 45 * ring * (inside & tissue.cells.vesicles[cell])
    dots = _stamp(tissue.microtubules[:, 1:], shape, _DOT)
    grey -= 40 * dots * (inside & ~tissue.cells.vesicles[cell])
    for organelle in tissue.organelles:
        _paint_organelle(grey, points, depth, organelle)
    thick = 2.0 + 1.6 * np.clip(tissue.density.section(z_px) - 1.0, 0, 1.5)
    grey += 0.92 * _line(depth, thick) * (48 - grey)
    return ndimage.gaussian_filter(grey, 0.6)


def make_tissue(recipe: TissueRecipe) -> np.ndarray:
    """Make a block of tissue and cut it into sections, truly aligned.

    Args:
        recipe: size and seed.

    Returns:
        (num_sections, rows, cols) uint8, 1..255, without imaging noise.
    """
    tissue = _make_block(recipe)
    sections = [
        _paint_section(tissue, index * recipe.thickness_px)
        for index in range(recipe.num_sections)
    ]
    return np.clip(np.round(np.stack(sections)), 1, 255).astype(np.uint8)
