"""Find the fields of each section on the sections before it, window by window.

All sections are placed first. The stages of a pyramid run on one window at a time, each
at its own mip with a halo of its own pixels. With a halo of 256 px, networks find the
same field in all windows, to 0.002 px. The finetuner does not: it averages over the
window (fly nerve cord, windows of 512 and of 1024 px: 0.5 px). So what it adds falls to
0 towards the next window: there is no seam. And windows have a size of their own:
fields do not depend on the chunks of other steps.

The field on z - 1 is finetuned. Fields on z - 2 and further are the networks' own: they
are only used where z - 1 is bad, and the finetuner does not make them better (error on
z - 2 of mouse cortex: 1.27 px, finetuned 1.31 px; on z - 3: 1.74 and 3.11 px; 2026-11).

Fields and correlations are stored as averages over cells of 8 x 8 px of the last stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.data.sample import Sample
from metroem.errors import DatasetError
from metroem.geometry import affine
from metroem.geometry.field import warp
from metroem.geometry.grid import Grid
from metroem.imaging.correlation_map import correlation_map
from metroem.imaging.defects import find_defects
from metroem.imaging.normalize import GreyStatistics, normalize
from metroem.io.image_volume import ImageVolume
from metroem.io.volume import Volume, crop_array
from metroem.io.volume_write import FIELD_NOTES, BlockWriter, NewVolume, Notes
from metroem.pyramid import Pyramid, StageInput
from metroem.stack.place import Placement
from metroem.stack.pulled_sections import ReadCount, iter_nearest, iter_pulled
from metroem.stack.tasks import Block, Step, parse_sections, split_blocks

# A cell of the stored fields spans 2**CELL_LEVELS px of the last stage.
CELL_LEVELS = 3
# What the finetuner adds falls to 0 over so many px at the border of a window.
_BLEND_PX = 128


class SectionWindow(NamedTuple):
    """One placed section in a window and its halo, as the stages read it."""

    images: tuple[Tensor, ...]  # a stage each, (1, 1, h, w), normalised, 0 = no data
    defects: Tensor  # (1, 1, H, W) bool at the last stage


def stage_grids(
    core: Grid, area: Grid, mips: Sequence[int], halo_px: int
) -> list[Grid]:
    """Find the part that each stage reads of a window and its halo.

    Args:
        core: the window without its halo.
        area: the area of all sections; windows end there.
        mips: mip of each stage.
        halo_px: pixels of the stage's mip around the window.
    """
    grids = []
    for mip in mips:
        window = core.cover(mip, margin_px=halo_px).overlap(area.cover(mip))
        assert window is not None  # the core lies in the area
        grids.append(window)
    return grids


def open_masks(path: str, images: ImageVolume, mip: int, sections: range) -> Volume:
    """Open the volume of masks.

    Args:
        path: the volume.
        images: the volume of the raw sections.
        mip: mip of the last stage, which reads the masks.
        sections: range of z that is aligned.

    Raises:
        DatasetError: it cannot be opened, lacks the mip, or does not cover the images.
    """
    masks = Volume(path, flag="--masks", resolution=images.resolution)
    masks.check_channels(1, "a volume of masks")
    masks.check_mip("mip of the last stage", mip)
    masks.check_covers(images.extent()[0], "the volume of sections", at=mip)
    masks.check_sections(sections, mip)
    return masks


def finetuned_share(core: Grid, window: Grid, area: Grid) -> Tensor:
    """Compute how much of the finetuner's correction counts at each pixel.

    It is 1 inside of the core, and falls to 0 towards the cores of other windows.

    Args:
        core: the window without its halo, at the mip of the last stage.
        window: what the last stage reads.
        area: the area of all sections.

    Returns:
        (1, 1, H, W) of the window, 0 to 1.
    """
    area = area.cover(core.mip)
    shares = []
    for first, count, begin, end, low, high in (
        (window.x, window.rows, core.x, core.end[0], area.x, area.end[0]),
        (window.y, window.cols, core.y, core.end[1], area.y, area.end[1]),
    ):
        at = (torch.arange(count) + 0.5) * 2**core.mip + first
        inside = torch.full_like(at, torch.inf)
        if begin > low:
            inside = at - begin
        if end < high:
            inside = torch.minimum(inside, end - at)
        shares.append((inside / (_BLEND_PX * 2**core.mip)).clamp(min=0, max=1))
    return (shares[0][:, None] * shares[1])[None, None]


def make_window(
    images: Sequence[Tensor], known_defects: Tensor | None = None
) -> SectionWindow:
    """Collect what the stages read of one section.

    Args:
        images: the images of the stages, (1, 1, h, w), normalised, 0 = no data.
        known_defects: mask at the last stage, (1, 1, H, W) bool; found if None.
    """
    defects = find_defects(images[-1]) if known_defects is None else known_defects
    return SectionWindow(tuple(images), defects)


def align_windows(
    pyramid: Pyramid,
    src: SectionWindow,
    tgt: SectionWindow,
    grids: Sequence[Grid],
    finetuned: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the field of a pair, and how alike the two are once they are aligned.

    Args:
        pyramid: its stages.
        src: the window of the moving section.
        tgt: the window of the fixed section.
        grids: the windows of the stages, see `stage_grids`.
        finetuned: how much the field that each stage improved on the pair itself
            counts, (1, 1, H, W), 0 to 1, see `finetuned_share`; the rest is the
            networks' own field. None: it does not count.

    Returns:
        The field, (1, 2, H, W), pull, pixels of the last stage, and the correlation,
        (1, 1, H, W), 0 to 1, of the last stage.
    """
    plain = [
        StageInput(Sample(one, other, None, ()), grid)
        for one, other, grid in zip(src.images, tgt.images, grids, strict=True)
    ]
    field = None
    if finetuned is None or bool((finetuned < 1).any()):
        field = pyramid.run(plain, False)[-1].cpu()
    if finetuned is not None:
        marked = plain[-1].sample._replace(
            src_defects=src.defects, tgt_defects=tgt.defects
        )
        inputs = [*plain[:-1], StageInput(marked, grids[-1])]
        better = pyramid.run(inputs, True)[-1].cpu()
        field = better if field is None else field + finetuned * (better - field)
    assert field is not None
    return field, correlation_map(warp(src.images[-1], field), tgt.images[-1])


def to_cells(field: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Average a field and a correlation over cells.

    Args:
        field: (1, 2, H, W), pixels.
        correlation: (1, 1, H, W).

    Returns:
        (1, 2, h, w), in cells, and (1, 1, h, w).
    """
    size = 2**CELL_LEVELS
    return (
        F.avg_pool2d(field, size, ceil_mode=True, count_include_pad=False) / size,
        F.avg_pool2d(correlation, size, ceil_mode=True, count_include_pad=False),
    )


# Grey levels of a section are measured on at most this many squares of it.
_SAMPLES, _SAMPLE_PX = 16, 512


@dataclass(frozen=True)
class GreysStep(Step):
    """Measure mean and standard deviation of the grey levels of each section.

    All windows of a section must be normalised by the same numbers, so they cannot come
    from a window itself. They are measured at the mip of each stage, on up to 16
    squares of 512 px that are spread over the tissue.

    Attributes:
        destination: the folder of the stack.
        cv_path: volume of the raw sections.
        placement: where the sections lie.
        sections: range of z.
        block_sections: sections of a task.
        mips: mip of each stage.
        before: settings of the steps before.
    """

    destination: str
    cv_path: str
    placement: Placement
    sections: range
    block_sections: int
    mips: tuple[int, ...]
    before: Mapping[str, Any] = field(default_factory=dict)
    name: str = "pairs-greys"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**self.before, "mips": list(self.mips)}

    def tasks(self) -> list[str]:
        return [
            f"z{z}-{min(z + self.block_sections, self.sections.stop)}"
            for z in range(self.sections.start, self.sections.stop, self.block_sections)
        ]

    def run(self, task: str) -> Mapping[str, Any]:
        sections = parse_sections(task)
        volume = ImageVolume(self.cv_path)
        tissue = self._tissue_area(volume, sections)
        found: dict[str, dict[str, list[float] | None]] = {str(z): {} for z in sections}
        num_bytes = 0
        for mip in self.mips:
            sums = np.zeros((len(sections), 3))
            for window in _sample_windows(tissue.cover(mip)):
                layers = volume.read(window, sections)[:, 0]
                num_bytes += layers.nbytes
                for index, layer in enumerate(layers):
                    grey = layer[np.isfinite(layer) & (layer != 0)].astype(np.float64)
                    sums[index] += len(grey), grey.sum(), (grey**2).sum()
            for z, (count, total, squares) in zip(sections, sums, strict=True):
                mean = total / max(count, 1)
                variance = squares / max(count, 1) - mean**2
                known = [mean, variance**0.5] if variance > 0 else None
                if known is None and self.placement.placed[z].how != "blank":
                    raise DatasetError(
                        f"{self.cv_path}: section {z} has tissue, but none "
                        f"at mip {mip} on {_SAMPLES} squares of {_SAMPLE_PX} px that "
                        "are spread over it; crop the volume to the tissue"
                    )
                found[str(z)][str(mip)] = known
        Notes(f"{self.destination}/greys").write(f"{task}.json", found)
        return {"bytes_read": num_bytes, "bytes_needed": num_bytes}

    def _tissue_area(self, volume: ImageVolume, sections: range) -> Grid:
        """Find the part of the raw volume that the sections' tissue lies in."""
        area, extent = self.placement.area, volume.extent()[0]
        corners = np.array(
            [(c, r) for c in (area.y, area.end[1]) for r in (area.x, area.end[0])],
            float,
        )
        at = np.concatenate(
            [affine.apply(self.placement.matrices[z], corners) for z in sections]
        )
        low = np.floor(at.min(0)).astype(int)[::-1].tolist()
        high = np.ceil(at.max(0)).astype(int)[::-1].tolist()
        whole = Grid(0, low[0], low[1], high[0] - low[0], high[1] - low[1])
        return whole.overlap(extent) or extent


def _sample_windows(extent: Grid) -> list[Grid]:
    """Choose squares that are spread over an extent; all of it if it is small."""
    size = _SAMPLE_PX
    squares = [
        extent.crop(
            row, col, min(size, extent.rows - row), min(size, extent.cols - col)
        )
        for row in range(0, extent.rows, size)
        for col in range(0, extent.cols, size)
    ]
    if len(squares) <= _SAMPLES:
        return squares
    chosen = np.linspace(0, len(squares) - 1, _SAMPLES).round().astype(int)
    return [squares[index] for index in chosen]


@dataclass(frozen=True)
class PairsStep(Step):
    """Find the fields of all pairs: a block of sections and an area a task.

    Attributes:
        destination: the folder of the stack.
        cv_path: volume of the raw sections.
        masks: volume of masks, not 0 where tissue cannot be trusted; None: defects are
            found.
        pyramid_path: the pyramid.
        checkpoint_name: name of its weights.
        device: where it runs.
        placement: where the sections lie.
        sections: range of z.
        mip: mip of the windows.
        window_px: side of a window without its halo.
        block_sections: sections of a task.
        halo_px: pixels of each stage around a window.
        neighbours: number of sections before it that a section is aligned with.
        mips: mip of each stage.
        weights: digest of the weights.
        resolution: nm of a mip-0 voxel along x, y, z.
        before: settings of the steps before.
    """

    destination: str
    cv_path: str
    masks: str | None
    pyramid_path: Path
    checkpoint_name: str
    device: str
    placement: Placement
    sections: range
    mip: int
    window_px: int
    block_sections: int
    halo_px: int
    neighbours: int
    mips: tuple[int, ...]
    weights: str
    resolution: tuple[float, float, float]
    before: Mapping[str, Any] = field(default_factory=dict)
    name: str = "pairs"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            **self.before,
            "pyramid": f"{self.pyramid_path}:{self.checkpoint_name}",
            "weights": self.weights,
            "masks": self.masks,
            "halo_px": self.halo_px,
            "neighbours": self.neighbours,
            "window_px": self.window_px,
        }

    @property
    def area(self) -> Grid:
        """The area of all sections at the mip of the windows."""
        return self.placement.area.at_mip(self.mip)

    @property
    def cell_mip(self) -> int:
        """Mip of the stored fields."""
        return self.mips[-1] + CELL_LEVELS

    def tasks(self) -> list[str]:
        blocks = split_blocks(
            self.area, self.sections, self.window_px, self.block_sections
        )
        return [block.name for block in blocks]

    def prepare(self, replaces: bool) -> None:
        self._open_writers(replaces)

    def run(self, task: str) -> Mapping[str, Any]:
        block = Block.parse(task)
        core = block.grid.cover(self.mips[-1])
        grids = stage_grids(core, self.placement.area, self.mips, self.halo_px)
        share = finetuned_share(core, grids[-1], self.placement.area)
        cells = core.at_mip(self.cell_mip)
        first = max(block.sections.start - self.neighbours, self.sections.start)
        read = range(first, block.sections.stop)
        num = len(block.sections)
        reach = range(1, self.neighbours + 1)
        fields = {k: np.zeros((num, 2, *cells.shape), np.float32) for k in reach}
        correlations = {k: np.zeros((num, 1, *cells.shape), np.uint8) for k in reach}
        defects = np.zeros((num, 1, *cells.shape), np.uint8)
        count = ReadCount()
        earlier: list[SectionWindow | None] = []
        for z, window in self._windows(read, grids, count):
            index = z - block.sections.start
            if index >= 0 and window is not None:
                size = 2**CELL_LEVELS
                marks = crop_array(window.defects.float(), grids[-1], core)
                defects[index] = F.max_pool2d(marks, size, ceil_mode=True)[0].byte()
                for k in reach:
                    tgt = earlier[-k] if k <= len(earlier) else None
                    if tgt is None:
                        continue
                    found = align_windows(
                        *(self._pyramid, window, tgt, grids), share if k == 1 else None
                    )
                    found = (crop_array(one, grids[-1], core) for one in found)
                    vectors, alike = to_cells(*found)
                    fields[k][index] = vectors[0].numpy()
                    correlations[k][index] = (255 * alike[0]).round().byte().numpy()
            earlier = [*earlier, window][-self.neighbours :]
        for k in reach:
            self._writers[f"k{k}"].write(fields[k], cells, block.sections)
            self._writers[f"k{k}_correlation"].write(
                correlations[k], cells, block.sections
            )
        self._writers["defects"].write(defects, cells, block.sections)
        return count.figures()

    def _windows(
        self, sections: range, grids: Sequence[Grid], count: ReadCount
    ) -> Iterator[tuple[int, SectionWindow | None]]:
        """Read sections, placed; None for one without tissue in the window."""
        fields = [{z: self._placed(z, grid) for z in sections} for grid in grids]
        readers = [
            iter_pulled(self._volume, of_stage, grid, count)
            for of_stage, grid in zip(fields, grids, strict=True)
        ]
        marks = None
        if self._masks is not None:
            marks = iter_nearest(self._masks, fields[-1], grids[-1], count)
        for stages in zip(*readers, strict=True):
            z = stages[0][0]
            known = None
            if marks is not None:
                known = torch.from_numpy(next(marks)[1] != 0)[None, None]
            images = [
                normalize(image, statistics) if statistics else torch.zeros_like(image)
                for (_, image), statistics in zip(stages, self._greys(z), strict=True)
            ]
            has_tissue = all(bool((image != 0).any()) for image in images)
            yield z, make_window(images, known) if has_tissue else None

    def _placed(self, z: int, grid: Grid) -> tuple[Tensor, Grid]:
        """Make the field that places a section on a grid, and the field's grid."""
        around = grid.cover(grid.mip + CELL_LEVELS, margin_px=1)
        return affine.as_field(self.placement.matrices[z], around), around

    def _greys(self, z: int) -> list[GreyStatistics | None]:
        """Return the grey levels of a section at the mip of each stage."""
        if z not in self._known_greys:
            notes = Notes(f"{self.destination}/greys")
            start = self.sections.start
            first = start + (z - start) // self.block_sections * self.block_sections
            name = f"z{first}-{min(first + self.block_sections, self.sections.stop)}"
            of_block = notes.read([f"{name}.json"]).get(f"{name}.json", {})
            self._known_greys.update(
                {
                    int(key): [
                        GreyStatistics(*values[str(mip)]) if values[str(mip)] else None
                        for mip in self.mips
                    ]
                    for key, values in of_block.items()
                }
            )
        if z not in self._known_greys:
            raise DatasetError(
                f"{self.destination}/greys: section {z} was not measured; run "
                "align-stack --steps pairs again, without a queue or a shard"
            )
        return self._known_greys[z]

    @cached_property
    def _writers(self) -> dict[str, BlockWriter]:
        return self._open_writers()

    def _open_writers(self, replaces: bool = False) -> dict[str, BlockWriter]:
        """Open the volumes of the fields, correlations and defects."""
        kinds = {
            f"k{k}": (2, "float32", FIELD_NOTES) for k in range(1, self.neighbours + 1)
        }
        kinds |= {f"{name}_correlation": (1, "uint8", {}) for name in kinds}
        kinds["defects"] = (1, "uint8", {})
        return {
            name: BlockWriter(
                f"{self.destination}/pairs/{name}",
                NewVolume(
                    *(num_channels, dtype, self.cell_mip, self.placement.area),
                    *(self.sections, self.resolution, about),
                ),
                flag="--dst_path",
                block_px=self.window_px << self.mip >> self.cell_mip,
                chunk_size=(256, 256, 1),
                replaces=replaces,
            )
            for name, (num_channels, dtype, about) in kinds.items()
        }

    @cached_property
    def _known_greys(self) -> dict[int, list[GreyStatistics | None]]:
        return {}

    @cached_property
    def _volume(self) -> ImageVolume:
        return ImageVolume(self.cv_path)

    @cached_property
    def _masks(self) -> Volume | None:
        if self.masks is None:
            return None
        return open_masks(self.masks, self._volume, self.mips[-1], self.sections)

    @cached_property
    def _pyramid(self) -> Pyramid:
        return Pyramid.load(self.pyramid_path, self.checkpoint_name, self.device)
