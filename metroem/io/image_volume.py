"""Read volumes of grey levels; make "no data" exactly 0, and make missing coarse mips.

Stored values are unchanged except for two things. Lossy encodings (jpeg) leave traces
of tissue where there is no data; `blank_traces` removes them. A mip that the volume
lacks is made from its next finer mip by `coarsen_image`. FIB-SEM volumes need this:
their coarser scales also halve z, and so hold other sections.
"""

import hashlib
import logging
from collections.abc import Iterator

import numpy as np
import torch
from scipy import ndimage

from metroem.geometry.grid import Grid
from metroem.imaging.normalize import coarsen_image
from metroem.io.volume import Volume, bounding_grid, crop_array

logger = logging.getLogger(__name__)

# Sections, and the side of the square in the middle of each, that tell whether a volume
# has changed.
_DIGEST_SECTIONS, _DIGEST_PX = 8, 64
# Bytes that are read at a time when a coarser mip is made.
_STRIP_BYTES = 2**26
# Side of the blocks that jpeg transforms; its errors stay inside a block.
_BLOCK_PX = 8
# A trace is darker than _DARK, and of the _AROUND_PX square around it at least
# _MIN_ZEROS pixels are 0. Measured 2026-11 on artificial edges and cracks, jpeg quality
# 50 to 95. Half of the pixels that were 0 beside tissue are still 0; 99 % of the rest
# are at most 2 px from a 0. Their value is at most 23 of 255 at quality 85. At quality
# 50, 99 % are below 53.
_DARK, _AROUND_PX, _MIN_ZEROS = 32, 5, 5
# "No data" has a square of 0 with side _SOLID_PX; or it has at least _LARGE_PX pixels,
# half of them 0 (_MIN_FRACTION), as cracks of 3 to 8 px do. Dark tissue has only single
# pixels of 0, and fewer of them.
_SOLID_PX, _LARGE_PX, _MIN_FRACTION = 3, 100, 0.5


class ImageVolume(Volume):
    """A volume of grey levels; see `Volume` and the module's docstring."""

    def source_mip(self, mip: int) -> int:
        """Return the stored mip that a mip is read or made from."""
        return max((m for m in self.mips if m <= mip), default=mip)

    def pixel_type(self, mip: int) -> np.dtype:
        """Return the type in which a mip is read: float32 if it has to be made."""
        return self.dtype if self.source_mip(mip) == mip else np.dtype(np.float32)

    def check_mip(self, flag: str, mip: int) -> None:
        """Refuse a mip that neither exists nor can be made; log a mip that is made.

        Raises:
            DatasetError: the mip is refused; see `Volume.check_mip`.
        """
        source = self.source_mip(mip)
        super().check_mip(flag, source)
        if source != mip:
            logger.info(
                "%s %d: %s has no such mip; mip %d is read and averaged in x and y",
                *(flag, mip, self.path, source),
            )

    def read(self, grid: Grid, sections: range) -> np.ndarray:
        """Read one area of consecutive sections; see `Volume.read`.

        Returns:
            (num_sections, C, H, W), the dtype of the volume; float32 if the mip is
            made from a finer one.
        """
        source = self.source_mip(grid.mip)
        if source == grid.mip:
            return self._read_clean(grid, sections)
        step = 1 << (grid.mip - source)
        fine = grid.at_mip(source)
        made: list[np.ndarray] = []
        rest = np.empty((len(sections), self.num_channels, 0, fine.cols), self.dtype)
        for strip in self._strips(fine, len(sections)):
            layers = np.concatenate([rest, self._read_clean(strip, sections)], axis=2)
            whole = layers.shape[2] // step * step
            if whole:
                made.append(_coarsened(layers[:, :, :whole], grid.mip - source))
            rest = layers[:, :, whole:]
        return np.concatenate(made, axis=2)

    def _strips(self, grid: Grid, num_sections: int) -> Iterator[Grid]:
        """Split a grid along x into strips of a few chunks that share no chunks."""
        (start, _), *_ = self._bounds(grid.mip)
        chunk = int(self._at(0).mip_chunk_size(self.index_of(grid.mip))[0])
        row_bytes = grid.cols * num_sections * self.num_channels * self.dtype.itemsize
        rows = max(_STRIP_BYTES // (row_bytes * chunk), 1) * chunk
        corner = (grid.x >> grid.mip) - start
        row = 0
        while row < grid.rows:
            end = min(((corner + row) // chunk * chunk + rows) - corner, grid.rows)
            yield grid.crop(row, 0, end - row, grid.cols)
            row = end

    def _read_clean(self, grid: Grid, sections: range) -> np.ndarray:
        """Read a stored mip, with the traces of lossy encodings set to 0."""
        inner = self.clip(grid)
        if inner is None or not self._is_lossy(grid.mip):
            return super().read(grid, sections)
        # Surroundings help to tell traces from tissue. Take those in the same chunks.
        chunks, _ = self.chunks_around(inner, sections.start)
        around = grid.cover(grid.mip, margin_px=_BLOCK_PX).overlap(chunks)
        wide = bounding_grid([grid, around or grid])
        layers = np.array(super().read(wide, sections))
        for layer in layers:
            layer[0] = blank_traces(layer[0])
        return crop_array(layers, wide, grid)

    def _is_lossy(self, mip: int) -> bool:
        scale = self.info["scales"][self.index_of(mip)]
        encoding = scale.get("encoding")
        return encoding == "jpeg" or (
            encoding == "jxl" and (scale.get("jxl_quality") or 0) < 100
        )


def content_digest(
    volume: ImageVolume, sections: range, area: Grid | None = None
) -> str:
    """Compute a digest of small squares in the middle of some sections.

    It tells that a volume was written again, most likely; not that it was not.

    Args:
        volume: the volume.
        sections: range of z; at most `_DIGEST_SECTIONS` of them are read.
        area: area whose middle is read, at its mip; None: all of the volume, at its
            finest and coarsest mip.
    """
    whole = volume.extent()[0]
    mips = sorted({volume.mips[0], volume.mips[-1]})
    areas = [whole.cover(mip) for mip in mips] if area is None else [area]
    digest = hashlib.sha256()
    count = min(_DIGEST_SECTIONS, len(sections))
    for one in areas:
        rows, cols = (min(_DIGEST_PX, size) for size in one.shape)
        square = one.crop((one.rows - rows) // 2, (one.cols - cols) // 2, rows, cols)
        for number in range(count):
            z = sections[number * len(sections) // count]
            digest.update(volume.read(square, range(z, z + 1)).tobytes())
    return digest.hexdigest()[:16]


def blank_traces(image: np.ndarray) -> np.ndarray:
    """Set near-black pixels to 0 that a lossy encoding left in areas without data.

    A block that holds both tissue and "no data" gets near-black pixels among the 0.
    Dark pixels and the 0 around them form one component. It is blanked if it is
    "no data", and kept if it is the darkest part of tissue.

    Args:
        image: (H, W) uint8, 0 = no data.

    Returns:
        (H, W) uint8; `image` itself if it has no 0.
    """
    is_zero = image == 0
    if not is_zero.any():
        return image
    fraction = ndimage.uniform_filter(is_zero.astype(np.float32), _AROUND_PX)
    near_zeros = fraction > (_MIN_ZEROS - 0.5) / _AROUND_PX**2
    labels = np.zeros(image.shape, np.int32)
    ndimage.label(is_zero | (near_zeros & (image < _DARK)), np.ones((3, 3)), labels)
    area = np.bincount(labels.ravel())
    num_zeros = np.bincount(labels[is_zero], minlength=len(area))
    is_blank = (area >= _LARGE_PX) & (num_zeros >= _MIN_FRACTION * area)
    square = np.ones((_SOLID_PX, _SOLID_PX))
    solid = is_zero & ndimage.binary_erosion(is_zero, square, border_value=1)
    is_blank[labels[solid]] = True
    is_blank[0] = False
    return np.where(is_blank[labels], 0, image).astype(image.dtype)


def _coarsened(layers: np.ndarray, levels: int) -> np.ndarray:
    """Make sections (num_sections, C, H, W) `levels` mips coarser, float32."""
    made = []
    for layer in layers:
        image = layer.astype(np.float32)
        image[~np.isfinite(image)] = 0
        made.append(coarsen_image(torch.from_numpy(image)[None], levels)[0].numpy())
    return np.stack(made)
