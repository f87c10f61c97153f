"""Write the aligned volume: every section is pulled once, from the raw volume.

The field of a section leads from an aligned pixel to the raw section, placement
included. So grey levels are interpolated once. Coarser mips average the tissue of the
block that was just made, so nothing is read back.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metroem.errors import UsageError
from metroem.geometry import affine
from metroem.geometry.grid import Grid
from metroem.imaging.normalize import coarsen_image
from metroem.io.image_volume import ImageVolume
from metroem.io.volume import Volume
from metroem.io.volume_write import BlockWriter, NewVolume
from metroem.stack.place import Placement
from metroem.stack.pulled_sections import ReadCount, iter_nearest, iter_pulled
from metroem.stack.tasks import Block, Step, split_blocks

# Pixels of its mip around a block that interpolating a field needs.
_MARGIN_PX = 1
# Encodings that hold 8 bits a pixel.
_8_BIT = ("jpeg", "png")


@dataclass(frozen=True)
class RenderStep(Step):
    """Pull the sections of a volume: a block of sections and an area a task.

    Attributes:
        destination: the folder of the stack.
        path: volume to write.
        cv_path: volume of raw sections to pull: the images, or another layer of them.
        flag: the flag that gave it, for messages.
        placement: where the sections lie.
        field_mip: mip of the fields in <destination>/field; None: only the placement.
        sections: range of z.
        mip: finest mip to write.
        mips: number of mips to write.
        chunk_px: side of a block, px of `mip`.
        block_sections: sections of a block.
        resolution: nm of a mip-0 voxel of the images.
        encoding: of the written volume; None: that of `cv_path`.
        chunk_size: of the written volume, x, y, z; None: that of `cv_path`.
        nearest: take the nearest pixel: labels, masks.
        before: settings of the steps before.
        name: name of the step.
    """

    destination: str
    path: str
    cv_path: str
    placement: Placement
    field_mip: int | None
    sections: range
    mip: int
    mips: int
    chunk_px: int
    block_sections: int
    resolution: tuple[float, float, float]
    encoding: str | None = None
    chunk_size: tuple[int, int, int] | None = None
    nearest: bool = False
    flag: str = "--cv_path"
    before: Mapping[str, Any] = field(default_factory=dict)
    name: str = "render"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            **self.before,
            "rendered": self.cv_path,
            "mips": self.mips,
            "encoding": self.encoding,
            "chunk_size": self.chunk_size and list(self.chunk_size),
            "nearest": self.nearest,
        }

    def tasks(self) -> list[str]:
        area = self.placement.area.at_mip(self.mip)
        blocks = split_blocks(area, self.sections, self.chunk_px, self.block_sections)
        return [block.name for block in blocks]

    def run(self, task: str) -> Mapping[str, Any]:
        block = Block.parse(task)
        count = ReadCount()
        finest = np.zeros(
            (len(block.sections), 1, *block.grid.shape), self._volume.dtype
        )
        fields = {z: self._field(z, block.grid) for z in block.sections}
        if self.nearest:
            for z, labels in iter_nearest(self._volume, fields, block.grid, count):
                finest[z - block.sections.start, 0] = labels
        else:
            for z, image in iter_pulled(self._volume, fields, block.grid, count):
                stored = _to_dtype(image, finest.dtype)
                finest[z - block.sections.start] = stored[0]
        for mip in self._writer.mips:
            levels = mip - self.mip
            self._writer.write(
                self._coarsen(finest, levels), block.grid.at_mip(mip), block.sections
            )
        return count.figures()

    def check(self) -> None:
        """Refuse what cannot be written, before any task runs.

        Raises:
            UsageError: an encoding does not fit the type, or too many mips are wanted.
            DatasetError: another volume exists there, or the source lacks the mip.
        """
        if self._encoding in _8_BIT and self._volume.dtype != np.uint8:
            raise UsageError(
                f"--encoding {self._encoding}: holds 8 bits, {self._volume.path} is "
                f"{self._volume.dtype}; give --encoding raw"
            )
        if self.chunk_px >> (self.mips - 1) << (self.mips - 1) != self.chunk_px:
            raise UsageError(
                f"--mips {self.mips}: chunks of {self.chunk_px} px cannot be halved "
                f"{self.mips - 1} times; give fewer mips or another --chunk_px"
            )
        if self.nearest is False and self._volume.dtype.itemsize > 4:
            raise UsageError(
                f"{self.flag} {self.cv_path}: is {self._volume.dtype}, so these are "
                "labels; give --nearest"
            )
        self._volume.check_mip(self.flag, self.mip)
        _ = self._writer

    def _field(self, z: int, block: Grid) -> tuple[Tensor, Grid]:
        """Read the field of a section around a block, and its grid."""
        if self.field_mip is None:
            grid = block.cover(max(self.mip + 3, 3), margin_px=_MARGIN_PX)
            return affine.as_field(self.placement.matrices[z], grid), grid
        grid = block.cover(self.field_mip, margin_px=_MARGIN_PX)
        inside = self._fields.clip(grid)
        assert inside is not None  # fields cover the whole area
        stored = torch.from_numpy(self._fields.read(inside, range(z, z + 1)))
        if inside == grid:
            return stored, grid
        # Beyond the border of all fields the displacement stays the same, and the
        # placement goes on.
        matrix = self.placement.matrices[z]
        placed = affine.as_field(matrix, grid)
        left = (inside.y - grid.y) >> grid.mip
        top = (inside.x - grid.x) >> grid.mip
        pad = (
            *(left, grid.cols - inside.cols - left),
            *(top, grid.rows - inside.rows - top),
        )
        rest = stored - affine.as_field(matrix, inside)
        return torch.nn.functional.pad(rest, pad, mode="replicate") + placed, grid

    def _coarsen(self, finest: np.ndarray, levels: int) -> np.ndarray:
        """Make a coarser mip of a block, (n, 1, H, W), in its type."""
        if levels == 0:
            return finest
        if self.nearest:
            return np.ascontiguousarray(finest[..., :: 1 << levels, :: 1 << levels])
        coarse = [
            _to_dtype(
                coarsen_image(torch.from_numpy(one.astype(np.float32))[None], levels),
                finest.dtype,
            )[0]
            for one in finest
        ]
        return np.stack(coarse)

    @property
    def _encoding(self) -> str:
        if self.encoding is not None:
            return self.encoding
        scale = self._volume.info["scales"][
            self._volume.index_of(self._volume.source_mip(self.mip))
        ]
        return "raw" if self.nearest else str(scale.get("encoding", "raw"))

    @cached_property
    def _writer(self) -> BlockWriter:
        rows, cols, thickness = self.chunk_size or self._source_chunk()
        wanted = NewVolume(
            *(1, str(self._volume.dtype), self.mip, self.placement.area),
            *(self.sections, self.resolution, {"kind": "images", "aligned": True}),
        )
        return BlockWriter(
            *(self.path, wanted),
            flag="--dst_path",
            block_px=self.chunk_px,
            chunk_size=(rows, cols, math.gcd(thickness, self.block_sections)),
            mips=self.mips,
            encoding=self._encoding,
        )

    def _source_chunk(self) -> tuple[int, int, int]:
        index = self._volume.index_of(self._volume.source_mip(self.mip))
        rows, cols, thickness = self._volume.info["scales"][index]["chunk_sizes"][0]
        return int(rows), int(cols), int(thickness)

    @cached_property
    def _volume(self) -> ImageVolume:
        return ImageVolume(self.cv_path, flag=self.flag, resolution=self.resolution)

    @cached_property
    def _fields(self) -> Volume:
        path = f"{self.destination}/field"
        return Volume(path, flag="--dst_path", resolution=self.resolution)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a copy opens by itself."""
        opened = ("_writer", "_volume", "_fields")
        return {k: v for k, v in self.__dict__.items() if k not in opened}


def _to_dtype(image: Tensor, dtype: np.dtype) -> np.ndarray:
    """Round grey levels to a type; tissue stays tissue: it does not become 0."""
    values = image.numpy()
    if dtype.kind == "f":
        return values.astype(dtype)
    most = np.iinfo(dtype).max
    return np.where(values > 0, np.clip(np.round(values), 1, most), 0).astype(dtype)
