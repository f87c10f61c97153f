"""CloudVolumes of grey levels: "no data" is exactly 0, and coarser mips are made.

What is stored comes as it is, but for two things. Lossy encodings (jpeg) leave traces
of tissue where there is none: `blank_traces` takes them out. And a mip that the volume
does not have is made of the next finer one that it has, as `coarsen_image` does:
volumes of FIB-SEM halve z, too, so that their own coarser scales hold other sections.
"""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from scipy import ndimage

from metroem.geometry.grid import Grid
from metroem.imaging.normalize import coarsen_image
from metroem.io.volume import Volume, bounding_grid, crop_array

logger = logging.getLogger(__name__)

# What is read at a time of sections that are made coarser.
_STRIP_BYTES = 2**26
# jpeg transforms blocks of this side, in which its errors stay.
_BLOCK_PX = 8
# What traces are. Measured 2026-11 on made edges and cracks, with jpeg of quality 50 to
# 95: half of what was 0 beside tissue is 0 still, 99 % of the rest at most 2 px from
# a 0; it is at most 23 of 255 at quality 85, 99 % below 53 at quality 50.
_DARK, _AROUND_PX, _FEWEST_ZEROS = 32, 5, 5
# "No data" holds a square of 0 of this side, or is so large and half of it 0, as cracks
# of 3 to 8 px are. Around dark tissue there are single 0, and fewer of them.
_SOLID_PX, _LARGE_PX, _SHARE = 3, 100, 0.5


class ImageVolume(Volume):
    """A volume of grey levels; see the module and `Volume`."""

    def source_mip(self, mip: int) -> int:
        """The stored mip that another is read from, or made of."""
        return max((m for m in self.mips if m <= mip), default=mip)

    def check_mip(self, flag: str, mip: int) -> None:
        """Refuse a mip that is neither there nor can be made; say what is made.

        Raises:
            DatasetError: as said.
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
            (num_sections, C, H, W), the dtype of the volume, float32 where the mip is
            made.
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
        """Parts of a grid, along x, that do not share chunks; a few chunks each."""
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
        """Read a stored mip; what a lossy encoding left where nothing is becomes 0."""
        inner = self.clip(grid)
        if inner is None or not self._is_lossy(grid.mip):
            return super().read(grid, sections)
        # What is around tells traces from tissue: as far as no other chunk is read.
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


def blank_traces(image: np.ndarray) -> np.ndarray:
    """Blank what a lossy encoding made of "no data" beside tissue.

    Errors of a block that holds both leave near-black pixels among the 0. They are
    taken together with the 0 that they lie among, where these are "no data" and not
    the darkest pixels of tissue.

    Args:
        image: (H, W) uint8, 0 = no data.

    Returns:
        (H, W) uint8; `image` itself where there is nothing to blank.
    """
    is_zero = image == 0
    if not is_zero.any():
        return image
    share = ndimage.uniform_filter(is_zero.astype(np.float32), _AROUND_PX)
    among = share > (_FEWEST_ZEROS - 0.5) / _AROUND_PX**2
    labels = np.zeros(image.shape, np.int32)
    ndimage.label(is_zero | (among & (image < _DARK)), np.ones((3, 3)), labels)
    area = np.bincount(labels.ravel())
    num_zeros = np.bincount(labels[is_zero], minlength=len(area))
    is_blank = (area >= _LARGE_PX) & (num_zeros >= _SHARE * area)
    square = np.ones((_SOLID_PX, _SOLID_PX))
    solid = is_zero & ndimage.binary_erosion(is_zero, square, border_value=1)
    is_blank[labels[solid]] = True
    is_blank[0] = False
    return np.where(is_blank[labels], 0, image).astype(image.dtype)


def _coarsened(layers: np.ndarray, levels: int) -> np.ndarray:
    """(num_sections, C, H, W) so many mips coarser, float32, section by section."""
    made = []
    for layer in layers:
        image = layer.astype(np.float32)
        image[~np.isfinite(image)] = 0
        made.append(coarsen_image(torch.from_numpy(image)[None], levels)[0].numpy())
    return np.stack(made)
