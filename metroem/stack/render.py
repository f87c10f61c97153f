"""Write the aligned volume: every section is pulled once, from the raw volume.

The field of a section leads from an aligned pixel to the raw section, placement
included. So grey levels are interpolated once. Coarser mips average the tissue of the
block that was just made, so nothing is read back. Other layers of the raw volume
(masks, labels) are pulled through the same fields.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metroem.errors import DatasetError, UsageError
from metroem.geometry import affine
from metroem.geometry.grid import Grid
from metroem.imaging.normalize import coarsen_image, round_greys
from metroem.io.cloud_paths import cloud_path
from metroem.io.image_volume import ImageVolume
from metroem.io.volume import Volume
from metroem.io.volume_info import check_encoding
from metroem.io.volume_write import BlockWriter, NewVolume
from metroem.stack.place import Placement
from metroem.stack.pulled_sections import ReadCount, iter_nearest, iter_pulled
from metroem.stack.tasks import Block, Step, split_blocks
from metroem.utils import cli

# Pixels of its mip around a block that interpolating a field needs.
_MARGIN_PX = 1
# A field that is made of the placement has pixels of so many mips more.
_PLACED_LEVELS = 3
# Types that are interpolated: grey levels.
_GREY_TYPES = ("uint8", "uint16", "float32")
# Encodings that change values a little.
_LOSSY = ("jpeg", "jxl", "zfpc")
# Chunks of a source that do not fit are replaced by these, unless they are that small.
_CHUNK_PX, _SMALLEST_PX = 128, 32


@dataclass(frozen=True)
class RenderStep(Step):
    """Pull the sections of a volume: a block of sections and an area a task.

    Attributes:
        destination: the folder of the stack.
        path: volume to write.
        cv_path: volume of raw sections to pull: the images, or another layer of them.
        placement: where the sections lie, and the area that is written.
        field_mip: mip of the fields in <destination>/field; None: only the placement.
        sections: range of z.
        mip: finest mip to write.
        mips: number of mips to write.
        chunk_px: side of a block, px of `mip`.
        block_sections: sections of a block.
        resolution: nm of a mip-0 voxel of the images.
        encoding: of the written volume; None: that of `cv_path`.
        chunk_size: of the written volume, x, y, z; None: that of `cv_path`, or nearly.
        nearest: take the nearest pixel: labels, masks.
        flag: the flag that gave `cv_path`, for messages.
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
            # A stack that is moved as a whole stays done.
            "to": self.path.removeprefix(f"{self.destination}/"),
            "mip": self.mip,
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
        fields = self._read_fields(block)
        count = ReadCount()
        finest = np.zeros(
            (len(block.sections), 1, *block.grid.shape), self._volume.dtype
        )
        if self.nearest:
            for z, labels in iter_nearest(self._volume, fields, block.grid, count):
                finest[z - block.sections.start, 0] = labels
        else:
            for z, image in iter_pulled(self._volume, fields, block.grid, count):
                finest[z - block.sections.start] = round_greys(image, finest.dtype)[0]
        made = _iter_label_mips(finest) if self.nearest else _iter_grey_mips(finest)
        for mip, values in zip(self._writer.mips, made, strict=False):
            self._writer.write(values, block.grid.at_mip(mip), block.sections)
        return count.figures()

    def prepare(self, replaces: bool) -> None:
        """Refuse what cannot be written, before any task runs; make the volume.

        Args:
            replaces: see `Step.prepare`.

        Raises:
            UsageError: flags that do not fit the source; see `check_rendering`.
            DatasetError: another volume exists there, or the source lacks sections.
        """
        volume = self._volume
        check_rendering(
            *(volume, self.mip, self.mips, self.chunk_px, self.block_sections),
            *(self.encoding, self.chunk_size, self.nearest),
        )
        held = volume.sections_at(volume.source_mip(self.mip))
        sections = self.sections
        if not (held.start <= sections.start and sections.stop <= held.stop):
            raise DatasetError(
                f"{self.flag} {self.cv_path}: holds sections {held.start}..."
                f"{held.stop - 1}, the stack {sections.start}...{sections.stop - 1}; "
                "give a volume that holds all of them"
            )
        area, step = self.placement.area, 1 << (self.mip + self.mips - 1)
        if any(one % step for one in (area.x, area.y, area.rows, area.cols)):
            raise UsageError(
                f"--mips {self.mips}: the aligned area, x {area.x}...{area.end[0]}, y "
                f"{area.y}...{area.end[1]}, does not consist of whole pixels of mip "
                f"{self.mip + self.mips - 1}; give fewer mips"
            )
        sources = [cloud_path(self.cv_path)]
        method: dict[str, Any] = {"command": cli.command_line()}
        if self.field_mip is None:
            sources.append(f"{self.destination}/placement.json")
        else:
            sources.append(f"{self.destination}/field")
        method["interpolation"] = "nearest" if self.nearest else "linear"
        entry = {"method": method, "by": f"metroem {self.name}"}
        self._open_writer(replaces).describe(sources, entry)

    def of_layer(self, layer: str, nearest: bool) -> "RenderStep":
        """Make the step that renders another volume of the same raw sections.

        It is written to <destination>/layers/<name of its folder>, at `layer_mips`. Its
        chunks and encoding are its own ones.

        Args:
            layer: path of the volume.
            nearest: take the nearest pixel.

        Raises:
            DatasetError: it cannot be opened, or has no such mip.
        """
        volume = Volume(layer, flag="--layer", resolution=self.resolution)
        mips = layer_mips(volume, range(self.mip, self.mip + self.mips))
        folder = cloud_path(layer).rstrip("/").rpartition("/")[2]
        return replace(
            self,
            path=f"{self.destination}/layers/{folder}",
            cv_path=layer,
            flag="--layer",
            mip=mips.start,
            mips=len(mips),
            chunk_px=self.chunk_px >> (mips.start - self.mip),
            encoding=None,
            chunk_size=None,
            nearest=nearest,
            name=f"{self.name}-layer",
        )

    def _read_fields(self, block: Block) -> dict[int, tuple[Tensor, Grid]]:
        """Read the fields of a block's sections, by z, with their grid."""
        if self.field_mip is None:
            mip = block.grid.mip + _PLACED_LEVELS
            grid = block.grid.cover(mip, margin_px=_MARGIN_PX)
            return {
                z: (affine.as_field(self.placement.matrices[z], grid), grid)
                for z in block.sections
            }
        wide = block.grid.cover(self.field_mip, margin_px=_MARGIN_PX)
        grid = self._fields.clip(wide) or wide
        stored = torch.from_numpy(self._fields.read(grid, block.sections))
        return {
            z: (one[None], grid) for z, one in zip(block.sections, stored, strict=True)
        }

    @cached_property
    def _writer(self) -> BlockWriter:
        return self._open_writer()

    def _open_writer(self, replaces: bool = False) -> BlockWriter:
        layer_type = str(self._volume.info["type"])
        kind = "images" if layer_type == "image" else "labels"
        wanted = NewVolume(
            *(1, str(self._volume.dtype), self.mip, self.placement.area),
            *(self.sections, self.resolution, {"kind": kind, "aligned": True}),
            layer_type,
        )
        size = self.chunk_size or _fitting_chunk(
            self._volume, self.mip, self.chunk_px, self.block_sections
        )
        encoding = self.encoding or _own_encoding(self._volume, self.mip, self.nearest)
        return BlockWriter(
            *(self.path, wanted),
            flag="--dst_path",
            block_px=self.chunk_px,
            chunk_size=size,
            mips=self.mips,
            encoding=encoding,
            replaces=replaces,
        )

    @cached_property
    def _volume(self) -> Volume:
        # Labels cannot be averaged, so mips that are not stored are not made of them.
        kind = Volume if self.nearest else ImageVolume
        return kind(self.cv_path, flag=self.flag, resolution=self.resolution)

    @cached_property
    def _fields(self) -> Volume:
        path = f"{self.destination}/field"
        nm = self.resolution
        return Volume(path, flag="--dst_path", resolution=nm, is_whole=True)


def layer_mips(layer: Volume, mips: range) -> range:
    """Choose the mips of a layer that are written.

    Args:
        layer: the volume.
        mips: those of the aligned images.

    Returns:
        From the finest mip of the layer that is not finer than the images, up to their
        coarsest one.

    Raises:
        DatasetError: it has none of the mips.
    """
    found = [mip for mip in layer.mips if mip in mips]
    if not found:
        raise DatasetError(
            f"{layer.flag} {layer.path}: has mips {', '.join(map(str, layer.mips))}, "
            f"the aligned images {mips.start} to {mips.stop - 1}; give a layer that "
            "has one of them, or more --mips"
        )
    return range(found[0], mips.stop)


def check_rendering(
    volume: Volume,
    mip: int,
    mips: int,
    chunk_px: int,
    block_sections: int,
    encoding: str | None = None,
    chunk_size: tuple[int, int, int] | None = None,
    nearest: bool = False,
) -> None:
    """Refuse to render a volume in a form that it cannot have.

    Args:
        volume: the source.
        mip: see `RenderStep`, also for the rest.
        mips: number of mips.
        chunk_px: side of a block.
        block_sections: sections of a block.
        encoding: of the result.
        chunk_size: of the result, x, y, z.
        nearest: take the nearest pixel.

    Raises:
        UsageError: the encoding, the chunks or the mips do not fit.
        DatasetError: the volume lacks the mip or has several channels.
    """
    volume.check_channels(1, "what is rendered")
    volume.check_mip("--mip", mip)
    if not nearest and str(volume.dtype) not in _GREY_TYPES:
        raise UsageError(
            f"{volume.flag} {volume.path}: is {volume.dtype}; grey levels are "
            f"{', '.join(_GREY_TYPES)}; give --nearest if these are labels"
        )
    if not nearest and volume.info["type"] == "segmentation":
        raise UsageError(
            f"{volume.flag} {volume.path}: is a segmentation, says its info file, and "
            "the mean of two labels is a third one; give --nearest"
        )
    if encoding is not None:
        check_encoding(encoding, str(volume.dtype))
        if nearest and encoding in _LOSSY:
            raise UsageError(
                f"--encoding {encoding}: changes labels; give --encoding raw"
            )
    if chunk_px % (1 << (mips - 1)):
        raise UsageError(
            f"--mips {mips}: blocks of {chunk_px} px cannot be halved {mips - 1} "
            "times; give fewer mips or another --chunk_px"
        )
    if chunk_size is not None:
        rows, cols, layers = chunk_size
        is_positive = min(chunk_size) > 0
        if not is_positive or chunk_px % rows or chunk_px % cols:
            raise UsageError(
                f"--chunk_size {rows} {cols} {layers}: a block of {chunk_px} px does "
                "not consist of whole chunks; give sizes that divide --chunk_px"
            )
        if block_sections % layers:
            raise UsageError(
                f"--chunk_size {rows} {cols} {layers}: a block of {block_sections} "
                "sections does not consist of whole chunks; give a size along z that "
                "divides --block_sections"
            )


def _own_encoding(volume: Volume, mip: int, nearest: bool) -> str:
    """Choose the encoding of the source, or raw where it cannot be written."""
    index = volume.index_of(volume.source_mip(mip))
    encoding = str(volume.info["scales"][index].get("encoding", "raw"))
    if nearest and encoding in _LOSSY:
        return "raw"
    try:
        check_encoding(encoding, str(volume.dtype))
    except UsageError:
        return "raw"
    return encoding


def _fitting_chunk(
    volume: Volume, mip: int, chunk_px: int, block_sections: int
) -> tuple[int, int, int]:
    """Choose chunks of which blocks consist: those of the source, or nearly."""
    index = volume.index_of(volume.source_mip(mip))
    size = [int(one) for one in volume.info["scales"][index]["chunk_sizes"][0]]
    sides = []
    for one in size[:2]:
        side = math.gcd(one, chunk_px)
        if side < min(one, _SMALLEST_PX):
            side = math.gcd(_CHUNK_PX, chunk_px)
        sides.append(side)
    return sides[0], sides[1], math.gcd(size[2], block_sections)


def _iter_grey_mips(finest: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a block, (n, 1, H, W), and its coarser mips: averages of tissue."""
    yield finest
    grey = [torch.from_numpy(one.astype(np.float32))[None] for one in finest]
    while True:
        grey = [coarsen_image(one, 1) for one in grey]
        yield np.concatenate([round_greys(one, finest.dtype) for one in grey])


def _iter_label_mips(finest: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a block, (n, 1, H, W), and its coarser mips: the most frequent of 2 x 2.

    Of labels that are as frequent, the first one is taken.
    """
    labels = finest
    while True:
        yield labels
        rows, cols = labels.shape[-2:]
        pad = ((0, 0), (0, 0), (0, rows % 2), (0, cols % 2))
        labels = np.pad(labels, pad, mode="edge")
        a, b = labels[..., ::2, ::2], labels[..., ::2, 1::2]
        c, d = labels[..., 1::2, ::2], labels[..., 1::2, 1::2]
        rest = np.where((b == c) | (b == d), b, np.where(c == d, c, a))
        labels = np.where((a == b) | (a == c) | (a == d), a, rest)
