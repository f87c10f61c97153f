"""Turn the fields of pairs into one displacement for each section.

f_zk pulls section z onto section z - k, both placed. U_z pulls the placed section z to
its aligned position: aligned_z(q) = placed_z(q + U_z(q)). Two sections agree if

    U_z(q) = U_y(q) + f_zk(q + U_y(q)),   y = z - k.

All U are found at once. They minimise

    sum_zk  w_zk |U_z - U_y - f_zk(q + U_y)|^2      agreement of pairs
    + a sum_z  |U_z|^2                              pull to the placement
    + b sum_z  m_z (U_xx^2 + 2 U_xy^2 + U_yy^2)     bending; m_z is low at defects

The sum is linear in U but for the place where f is read. So f is read at the U of the
last round, and conjugate gradients solve the rest, on coarse grids first.

*Weights.* A pair is trusted by c, the correlation of the two sections after they were
aligned. Matching by least squares has a variance in proportion to (1 - c^2) / c^2, so
p = c^2 / (1 - c^2) is its precision. Fields of more distant sections are worse, and
add noise where the nearer ones are sound. So w_zk of k > 1 counts only where the path
through sections between has less than a quarter of its precision: there a section is
bad, and z-2 or z-3 carries the stack over it.

*Drift.* Each section has its own distortion, and the placement is all that is known of
the truth. The weak pull averages the distortions of sqrt(w / a), about 14, sections on
each side. It is too weak to straighten what runs obliquely. Mean error, px, of 12
sections of mouse cortex with known distortions of 5 px (2026-11):

    a                     0.001   0.005   0.02    0.05
    jitter                0.55    0.55    0.59    0.72
    drift                 1.70    1.68    1.69    1.81

Of 40 such sections 1.7 px of drift are left: 1.2 px of their own distortions, averaged,
and 1.1 px of shifts: the tissue itself moves on along z, and pairs follow it. The rest
is size and turn, of which the placement knows no more.

Source: elastic relaxation of stacks as in Saalfeld et al. 2012
(doi:10.1038/nmeth.2072), with an energy that is quadratic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.errors import DatasetError
from metroem.geometry import affine
from metroem.geometry.field import pixel_positions, sample
from metroem.geometry.grid import Grid
from metroem.io.volume import Volume, crop_array
from metroem.io.volume_write import FIELD_NOTES, BlockWriter, NewVolume
from metroem.stack.place import Placement
from metroem.stack.tasks import Block, Step, split_blocks

# Correlations that chance gives count nothing, and from _SURE on a pair is sure.
_CHANCE, _SURE = 0.15, 0.86
# A longer path counts where the shorter one has less than this fraction of its
# precision.
_PATH_FRACTION = 0.25
# Difference from the other pairs that quarters a weight, cells.
_OUTLIER = 0.75
# Bending costs this fraction at a defect: tissue may be torn there.
_AT_DEFECT = 0.02
_LEVELS, _ROUNDS, _STEPS, _SOLVED = 3, 3, 150, 1e-4
# A task also solves so many sections before and after its own, and cells around its
# area, and drops them. A section's influence falls to 1 / e over 14 sections. So two
# sizes of blocks differ by 0.03 px at most (99.9 % of pixels).
MARGIN_SECTIONS, MARGIN_CELLS = 64, 32
# The finest level, which takes most time and memory, solves only so many on both sides,
# between ones that the coarser level has solved. Of 112 sections with known distortions
# 16 were wanted. Against all of them at all levels, solved to 1e-6 (two stacks, 99.9 %
# of pixels; CPU time): 12 sections 0.050 and 0.056 px, 0.4 s; 20 0.026 and 0.036 px,
# 0.5 s; 24 0.023 and 0.021 px, 0.5 s; all 0.017 and 0.023 px, 0.8 s (2026-11).
_FINEST_MARGIN = 24


@dataclass(frozen=True)
class RelaxOptions:
    """How all sections are relaxed at once.

    Attributes:
        pull: a, how much a section is pulled to its placement.
        bending: b, how much bending costs, at cells of 8 px.
    """

    pull: float = 0.005
    bending: float = 6.0


@dataclass(frozen=True)
class PairFields:
    """The fields of all sections on their k-th neighbours.

    Attributes:
        fields: by k, (n, 2, h, w), pull, pixels of the grid (cells). Index z holds the
            field of section z on z - k; the first k are not used.
        correlations: by k, (n, 1, h, w), 0 to 1: how alike the two are when aligned.
            0 where nothing is known.
        defects: (n, 1, h, w), 1 where a section has a fold or a crack, else 0.
    """

    fields: Mapping[int, Tensor]
    correlations: Mapping[int, Tensor]
    defects: Tensor

    def part(self, sections: range) -> "PairFields":
        """Take some sections; the first k of them have no pair with those before."""
        some = slice(sections.start, sections.stop)
        return PairFields(
            {k: f[some] for k, f in self.fields.items()},
            {k: c[some] for k, c in self.correlations.items()},
            self.defects[some],
        )

    def coarsen(self, level: int) -> "PairFields":
        """Average everything over squares of 2**level cells."""
        if level == 0:
            return self
        size = 2**level
        return PairFields(
            {k: _average(f, size) / size for k, f in self.fields.items()},
            {k: _average(c, size) for k, c in self.correlations.items()},
            F.max_pool2d(self.defects, size, ceil_mode=True),
        )


def relax(
    pairs: PairFields,
    options: RelaxOptions,
    known: Mapping[int, Tensor] | None = None,
    wanted: range | None = None,
) -> Tensor:
    """Find the displacement of every section.

    Args:
        pairs: the fields of all pairs.
        options: see `RelaxOptions`.
        known: displacements of sections that are not changed, by index, (1, 2, h, w).
        wanted: indices of the sections to return; those around them are solved as far
            as they matter. None: all.

    Returns:
        (sections, 2, h, w): U, pull, pixels of the grid.

    Raises:
        DatasetError: they are not finite, since bending costs too much.
    """
    known = known or {}
    part = range(len(pairs.defects))
    wanted = part if wanted is None else wanted
    found: Tensor | None = None
    for level in reversed(range(_LEVELS)):
        inner = part if level else _widen(wanted, _FINEST_MARGIN, part)
        here = pairs.part(inner).coarsen(level)
        num, _, rows, cols = here.defects.shape
        if found is None:
            found = here.defects.new_zeros(num, 2, rows, cols)
        else:
            found = found[inner.start - part.start : inner.stop - part.start]
            found = 2 * F.interpolate(
                found, scale_factor=2, mode="bilinear", align_corners=False
            )
            found = found[..., :rows, :cols].contiguous()
        free = torch.ones(num, 1, 1, 1)
        # Sections at an end that was cut off are held where they are.
        if inner.start > 0:
            free[: max(pairs.fields)] = 0
        if inner.stop < len(pairs.defects):
            free[-max(pairs.fields) :] = 0
        for index in set(known) & set(inner):
            at = index - inner.start
            found[at] = _average(known[index], 2**level)[0] / 2**level
            free[at] = 0
        bending = options.bending / 16**level
        found = _relax_level(here, found, free, options.pull, bending)
        part = inner
    assert found is not None
    if not torch.isfinite(found).all():
        raise DatasetError(
            "the displacements that align the sections are not finite; give a smaller "
            "--smoothness"
        )
    return found[wanted.start - part.start : wanted.stop - part.start]


def _widen(sections: range, margin: int, limits: range) -> range:
    """Add sections on both sides of a range, within limits."""
    return range(
        max(sections.start - margin, limits.start),
        min(sections.stop + margin, limits.stop),
    )


def pair_precisions(correlations: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Compute the weight w of each pair from the correlations, see the file's head.

    Args:
        correlations: as in `PairFields`.

    Returns:
        By k, (n, 1, h, w), 0 to 1.
    """
    weights: dict[int, Tensor] = {}
    best: dict[int, Tensor] = {}
    for k in sorted(correlations):
        own = _precision(correlations[k])
        own[:k] = 0
        path = torch.zeros_like(own)
        for first in range(1, k):
            if first in best and k - first in best:
                one = best[first]
                other = torch.zeros_like(one)
                other[first:] = best[k - first][:-first]
                path = torch.maximum(path, one * other / (one + other + 1e-9))
        share = (1 - path / (_PATH_FRACTION * own + 1e-9)).clamp(min=0)
        weights[k] = own.clamp(max=1) * share
        best[k] = torch.maximum(own, path)
    return weights


def _precision(correlation: Tensor) -> Tensor:
    """Compute p of correlations, 1 for a pair that is sure."""
    c = ((correlation - _CHANCE) / (1 - _CHANCE)).clamp(min=0, max=0.97)
    sure = ((_SURE - _CHANCE) / (1 - _CHANCE)) ** 2
    return c.square() / (1 - c.square()) * (1 - sure) / sure


def _relax_level(
    pairs: PairFields, start: Tensor, free: Tensor, pull: float, bending: float
) -> Tensor:
    """Relax on one grid, from a start; sections that are not free keep theirs."""
    found = start
    stiffness = bending * (1 - (1 - _AT_DEFECT) * _dilate(pairs.defects))
    weights = pair_precisions(pairs.correlations)
    # A z-chain of n sections needs about n steps to carry a change from end to end.
    max_steps = _STEPS + len(start)
    for _ in range(_ROUNDS):
        rows = [
            _linearise(found, k, pairs.fields[k], weights[k])
            for k in sorted(pairs.fields)
            if k < len(found)
        ]
        found = _solve(rows, found, free, pull, stiffness, max_steps)
    return found


@dataclass(frozen=True)
class _Rows:
    """The equations U_z - U_(z-k) = difference, weighted."""

    k: int
    difference: Tensor  # (n - k, 2, h, w)
    weight: Tensor  # (n - k, 1, h, w)


def _linearise(found: Tensor, k: int, fields: Tensor, weights: Tensor) -> _Rows:
    """Read the fields of neighbours k at the displacements found so far."""
    earlier, later = found[:-k], found[k:]
    positions = pixel_positions(earlier) + earlier
    both = torch.cat((fields[k:], weights[k:]), 1)
    both = sample(both, earlier, positions, padding="border")
    difference, weight = both[:, :2].contiguous(), both[:, 2:]
    residual = (later - earlier - difference).square().sum(1, keepdim=True)
    return _Rows(k, difference, weight / (1 + residual / _OUTLIER**2).square())


def _solve(
    rows: Sequence[_Rows],
    start: Tensor,
    free: Tensor,
    pull: float,
    stiffness: Tensor,
    max_steps: int,
) -> Tensor:
    """Solve the equations by conjugate gradients, from a start."""
    right = torch.zeros_like(start)
    diagonal = pull + 20 * stiffness.expand(len(start), 1, *start.shape[-2:])
    for row in rows:
        weighted = row.weight * row.difference
        right[row.k :] += weighted
        right[: -row.k] -= weighted
        diagonal[row.k :] += row.weight
        diagonal[: -row.k] += row.weight

    def multiply(values: Tensor) -> Tensor:
        product = pull * values + _bending_gradient(values, stiffness)
        for row in rows:
            change = row.weight * (values[row.k :] - values[: -row.k])
            product[row.k :] += change
            product[: -row.k] -= change
        return product

    x, residual = start, free * (right - multiply(start))
    scaled = residual / diagonal
    direction, size = scaled, (residual * scaled).sum()
    limit = _SOLVED**2 * max(float((free * right * right / diagonal).sum()), 1e-12)
    for _ in range(max_steps):
        if float(size) <= limit:
            break
        product = free * multiply(direction)
        length = size / (direction * product).sum()
        x = x + length * direction
        residual = residual - length * product
        scaled = residual / diagonal
        size, before = (residual * scaled).sum(), size
        direction = scaled + size / before * direction
    return x


def _bending_gradient(values: Tensor, stiffness: Tensor) -> Tensor:
    """Compute half the gradient of the bending energy, (n, 2, h, w)."""
    out = torch.zeros_like(values)
    along_cols = values[..., 2:] - 2 * values[..., 1:-1] + values[..., :-2]
    along_cols = along_cols * stiffness[..., 1:-1]
    out[..., 2:] += along_cols
    out[..., 1:-1] -= 2 * along_cols
    out[..., :-2] += along_cols
    along_rows = values[..., 2:, :] - 2 * values[..., 1:-1, :] + values[..., :-2, :]
    along_rows = along_rows * stiffness[..., 1:-1, :]
    out[..., 2:, :] += along_rows
    out[..., 1:-1, :] -= 2 * along_rows
    out[..., :-2, :] += along_rows
    twist = values[..., 1:, 1:] - values[..., 1:, :-1]
    twist = twist - values[..., :-1, 1:] + values[..., :-1, :-1]
    # 2 twist^2 of the square between four cells, as stiff as the softest of them.
    twist = 2 * twist * -F.max_pool2d(-stiffness, 2, 1)
    out[..., 1:, 1:] += twist
    out[..., 1:, :-1] -= twist
    out[..., :-1, 1:] -= twist
    out[..., :-1, :-1] += twist
    return out


def _average(values: Tensor, size: int) -> Tensor:
    return F.avg_pool2d(values, size, ceil_mode=True, count_include_pad=False)


def _dilate(mask: Tensor) -> Tensor:
    """Grow a mask by one cell."""
    return F.max_pool2d(mask, 3, 1, 1)


def compose_affine(displacement: Tensor, matrix: np.ndarray, grid: Grid) -> Tensor:
    """Compose the displacement of a placed section with its placement.

    Args:
        displacement: U, (1, 2, H, W), pixels of the grid: from an aligned pixel to the
            placed section.
        matrix: (2, 3), from the placed to the raw section, mip-0 pixels.
        grid: grid of the displacement.

    Returns:
        (1, 2, H, W): from an aligned pixel to the raw section, pixels of the grid.
    """
    linear = torch.from_numpy((matrix[:, :2] - np.eye(2)).astype(np.float32))
    moved = torch.einsum("ij,bjhw->bihw", linear, displacement)
    return affine.as_field(matrix, grid) + displacement + moved


def remove_affine(field: Tensor, matrix: np.ndarray, grid: Grid) -> Tensor:
    """Undo `compose_affine`: find the displacement of a placed section.

    Args:
        field: (1, 2, H, W), as `compose_affine` returns it.
        matrix: the same as there.
        grid: the same as there.
    """
    inverse = torch.from_numpy(np.linalg.inv(matrix[:, :2]))
    placed = field.double() - affine.as_field(matrix, grid).double()
    return torch.einsum("ij,bjhw->bihw", inverse, placed).float()


@dataclass(frozen=True)
class RelaxStep(Step):
    """Relax the fields of pairs: a block of sections and an area a task.

    When a stack grows, sections before the last block keep their fields. So blocks know
    up to which section the stack went when they were relaxed first. Blocks of a later
    run read the fields of the earlier ones, so each run is a step of its own.

    Attributes:
        destination: the folder of the stack.
        placement: where the sections lie.
        ends: one past the last section, of the first run and each one that made the
            stack grow.
        z_start: the first section.
        mip: mip of the chunks.
        chunk_px: side of a chunk.
        block_sections: sections of a task.
        cell_mip: mip of the fields.
        neighbours: number of sections before it that a section was aligned with.
        resolution: nm of a mip-0 voxel along x, y, z.
        options: see `RelaxOptions`.
        before: settings of the steps before.
        generation: index in `ends` of the run that relaxed these blocks first.
    """

    destination: str
    placement: Placement
    ends: tuple[int, ...]
    z_start: int
    mip: int
    chunk_px: int
    block_sections: int
    cell_mip: int
    neighbours: int
    resolution: tuple[float, float, float]
    options: RelaxOptions
    before: Mapping[str, Any] = field(default_factory=dict)
    generation: int = 0

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the step."""
        return f"relax-{self.generation}" if self.generation else "relax"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            **self.before,
            "pull": self.options.pull,
            "bending": self.options.bending,
            "chunk_px": self.chunk_px,
        }

    @property
    def sections(self) -> range:
        """The range of z."""
        return range(self.z_start, self.ends[-1])

    def tasks(self) -> list[str]:
        area = self.placement.area.at_mip(self.mip)
        blocks = split_blocks(area, self.sections, self.chunk_px, self.block_sections)
        end = self.ends[self.generation]
        return [block.name for block in blocks if self._known(block.sections)[1] == end]

    def prepare(self, replaces: bool) -> None:
        # Fields of earlier runs are kept.
        is_first = Block.parse(self.tasks()[0]).sections.start == self.z_start
        self._open_writer(replaces and is_first)

    def run(self, task: str) -> Mapping[str, Any]:
        block = Block.parse(task)
        known_end, end = self._known(block.sections)
        core = block.grid.cover(self.cell_mip)
        area = self.placement.area.cover(self.cell_mip)
        window = core.cover(core.mip, margin_px=MARGIN_CELLS).overlap(area)
        assert window is not None
        first = max(block.sections.start - MARGIN_SECTIONS, self.z_start)
        # Of the known ones, those are needed that pairs connect to the others.
        first = max(first, known_end - self.neighbours)
        read = range(first, min(block.sections.stop + MARGIN_SECTIONS, end))
        known = {}
        for z in range(first, known_end):
            stored = torch.from_numpy(self._fields.read(window, range(z, z + 1)))
            known[z - first] = remove_affine(stored, self.placement.matrices[z], window)
        start, stop = (z - first for z in (block.sections.start, block.sections.stop))
        found = relax(
            self._read_pairs(window, read), self.options, known, range(start, stop)
        )
        found = crop_array(found, window, core)
        fields = torch.cat(
            [
                compose_affine(one[None], self.placement.matrices[z], core)
                for z, one in zip(block.sections, found, strict=True)
            ]
        )
        self._writer.write(fields.numpy(), core, block.sections)
        return {}

    def _known(self, sections: range) -> tuple[int, int]:
        """Find when a block was relaxed first.

        Returns:
            One past the last section that was known then, and the end of the stack.
        """
        known_end = self.z_start
        for end in self.ends:
            whole = (end - self.z_start) // self.block_sections * self.block_sections
            if sections.stop <= self.z_start + whole or end == self.ends[-1]:
                return known_end, end
            known_end = self.z_start + whole
        raise AssertionError("the last end returns")

    def _read_pairs(self, window: Grid, sections: range) -> PairFields:
        """Read the fields of pairs."""
        fields, correlations = {}, {}
        for k in range(1, self.neighbours + 1):
            stored = self._pairs[f"k{k}"].read(window, sections)
            fields[k] = torch.from_numpy(stored)
            stored = self._pairs[f"k{k}_correlation"].read(window, sections)
            correlations[k] = torch.from_numpy(stored).float() / 255
        defects = self._pairs["defects"].read(window, sections)
        return PairFields(fields, correlations, torch.from_numpy(defects).float())

    @cached_property
    def _writer(self) -> BlockWriter:
        return self._open_writer()

    def _open_writer(self, replaces: bool = False) -> BlockWriter:
        return BlockWriter(
            f"{self.destination}/field",
            NewVolume(
                *(2, "float32", self.cell_mip, self.placement.area, self.sections),
                self.resolution,
                {**FIELD_NOTES, "mip": self.cell_mip},
            ),
            flag="--dst_path",
            block_px=self.chunk_px << self.mip >> self.cell_mip,
            chunk_size=(256, 256, 1),
            replaces=replaces,
        )

    @cached_property
    def _fields(self) -> Volume:
        path = f"{self.destination}/field"
        nm = self.resolution
        return Volume(path, flag="--dst_path", resolution=nm, is_whole=True)

    @cached_property
    def _pairs(self) -> dict[str, Volume]:
        names = [f"k{k}" for k in range(1, self.neighbours + 1)]
        names += [f"{name}_correlation" for name in names] + ["defects"]
        return {
            name: Volume(
                f"{self.destination}/pairs/{name}",
                flag="--dst_path",
                resolution=self.resolution,
                is_whole=True,
            )
            for name in names
        }
