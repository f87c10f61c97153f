"""Read reference areas and defect masks, the volumes beside images and fields.

A reference area gives the mean and standard deviation that normalise a section. By
default the patch itself does. Averaging removes noise at coarser mips, so the
standard deviation of an area depends on the mip that is read. Images need the value
for their own pixels:

    area finer than the images    the area is averaged to their mip
    area coarser                  var = var(area) + mean over samples of
                                        (var(images) - var(area))

The second line is the law of total variance: the variance inside the pixels of the
area is missing. It is measured in samples, windows of the area read at both mips.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid
from metroem.imaging.normalize import GreyStatistics, coarsen_image
from metroem.io.volume import Volume, crop_array

logger = logging.getLogger(__name__)

# Side of a sample, pixels of the images, and the number of samples along x and y.
_SAMPLE_PX, _NUM_SAMPLES = 128, 3
_LEAST_PX = 4  # smallest side of a sample, pixels of the area
# Smallest variance: the difference between samples may exceed that of the area.
_LEAST_VARIANCE = 1e-12


class Moments(NamedTuple):
    """Number, mean and variance of the tissue pixels of an area."""

    count: float
    mean: float  # grey levels
    variance: float  # grey levels squared


class ReferenceArea(NamedTuple):
    """An area of fixed size around each patch, for its statistics or its mean field."""

    volume: Volume
    mip: int
    rows: int  # pixels of `mip`
    cols: int  # pixels of `mip`

    def around(self, window: Grid) -> Grid:
        """The area around the centre of a patch, clipped to the volume.

        Raises:
            DatasetError: the volume has nothing there.
        """
        x, y = (
            int(center - (size << self.mip) / 2) >> self.mip << self.mip
            for center, size in zip(window.center, (self.rows, self.cols), strict=True)
        )
        inner = self.volume.clip(Grid(self.mip, x, y, self.rows, self.cols))
        if inner is None:
            raise DatasetError(
                f"{self.volume.flag} {self.volume.path}: does not reach the reference "
                f"area at x {x}, y {y} (mip-0 pixels)"
            )
        return inner


def missing_reference(
    reference: ReferenceArea, sections: Iterable[int], flag: str
) -> DatasetError:
    """The error for sections that have tissue but no reference to normalise by."""
    volume, named = reference.volume, ", ".join(map(str, sorted(set(sections))))
    return DatasetError(
        f"{volume.flag} {volume.path}: has no tissue at mip {reference.mip} around the "
        f"patch in sections {named}, where the images have some; was it written there? "
        f"Give a {flag} that is written, another volume, or leave the reference out"
    )


def sample_windows(area: Grid, mip: int) -> list[Grid]:
    """Choose windows of an area that are also measured at the mip of the images.

    They are spread evenly, on whole pixels of the area; a small area is one window.
    There are none if the area's own mip is as fine as the images or finer.
    """
    if area.mip <= mip:
        return []
    side = max(_SAMPLE_PX >> (area.mip - mip), _LEAST_PX)
    spans = []
    for size in area.shape:
        is_single = size <= _NUM_SAMPLES * side
        starts = [
            (2 * number + 1) * size // (2 * _NUM_SAMPLES) - side // 2
            for number in range(_NUM_SAMPLES)
        ]
        spans.append([(0, size)] if is_single else [(start, side) for start in starts])
    return [
        area.crop(row, col, rows, cols).at_mip(mip)
        for row, rows in spans[0]
        for col, cols in spans[1]
    ]


def tissue_moments(image: np.ndarray, grid: Grid, window: Grid, mip: int) -> Moments:
    """Compute the moments of the tissue in a window, for pixels of a mip.

    Args:
        image: (H, W), finite, 0 = no data.
        grid: of the image.
        window: of any mip; pixels outside the image are left out.
        mip: pixels are averaged to it if it is coarser than the image.
    """
    inside = window.cover(grid.mip).overlap(grid)
    if inside is None:
        return Moments(0, 0, 0)
    cropped = torch.from_numpy(crop_array(image, grid, inside).astype(np.float32))
    levels = max(mip - grid.mip, 0)
    tissue = coarsen_image(cropped[None, None], levels).double().numpy()
    tissue = tissue[tissue != 0]
    if not tissue.size:
        return Moments(0, 0, 0)
    return Moments(tissue.size, float(tissue.mean()), float(tissue.var()))


def has_contrast(image: np.ndarray) -> bool:
    """Whether there is tissue with more than one grey level."""
    tissue = image[image != 0]
    return bool(tissue.size and tissue.min() < tissue.max())


def measure_area(image: np.ndarray, grid: Grid, patch: Grid) -> list[Moments]:
    """Compute the moments of the patch and of each sample, as read in an area.

    Args:
        image: (H, W) on `grid`, the area.
        grid: of the area; the samples are spread over it.
        patch: at the mip of the images.
    """
    windows = [patch, *sample_windows(grid, patch.mip)]
    return [tissue_moments(image, grid, window, patch.mip) for window in windows]


def reference_statistics(
    coarse: Sequence[Moments], fine: Sequence[Moments], image: np.ndarray
) -> GreyStatistics | None:
    """Compute the mean and standard deviation that normalise an image.

    Args:
        coarse: moments at the mip of the area: of the area, of the patch, and of
            each sample.
        fine: moments of each sample at the mip of the images.
        image: (H, W), the patch.

    Returns:
        None if there is nothing to normalise by: the area has no tissue or no
        contrast, or the patch is mostly tissue and the area has none there.
    """
    area, patch, *samples = coarse
    if not area.variance > 0 or (np.mean(image != 0) > 0.5 and not patch.count):
        return None
    if samples and not any(sample.count for sample in fine):
        # The images may be written only where the patch is.
        grid = Grid(0, 0, 0, *image.shape)
        samples, fine = [patch], [tissue_moments(image, grid, grid, 0)]
    measured = [
        (c, f) for c, f in zip(samples, fine, strict=True) if c.count and f.count
    ]
    inside = sum(f.count * (f.variance - c.variance) for c, f in measured)
    inside /= sum(f.count for _, f in measured) or 1
    return GreyStatistics(
        area.mean, max(area.variance + inside, _LEAST_VARIANCE) ** 0.5
    )


class DefectMask(NamedTuple):
    """A volume that marks the pixels to blank: folds, cracks and dirt.

    Attributes:
        volume: its values are compared with `threshold`.
        threshold: values >= this are defects.
        mip: the mip that is read. None: the mip of the masked pixels, else the
            nearest finer mip of the volume, else its finest. A mip that is in the
            info but was never written reads as "no defect".
    """

    volume: Volume
    threshold: float
    mip: int | None = None

    def source_mip(self, mip: int) -> int:
        """The mip of the mask that is read to mask pixels of `mip`."""
        if self.mip is not None:
            return self.mip
        finer = [m for m in self.volume.mips if m <= mip]
        return finer[-1] if finer else self.volume.mips[0]

    def check(self, of: Volume, mip: int, windows: Mapping[int, Grid]) -> None:
        """Refuse a mask that does not cover the pixels that it masks.

        Args:
            of: the volume that is masked.
            mip: of the masked pixels.
            windows: by z, the area that is read of `of`.

        Raises:
            DatasetError: it does not cover them, or lies elsewhere.
        """
        source = self.source_mip(mip)
        self.volume.check_mip("mip", source)
        self.volume.check_lies_on(of, source)
        self.volume.check_sections(range(min(windows), max(windows) + 1), source)
        for window in set(windows.values()):
            if (inside := of.clip(window)) is not None:
                self.volume.check_covers(inside, "the masked area", at=source)


def open_mask(path: str | None, threshold: float, of: Volume) -> list[DefectMask]:
    """Open the mask of a download; it shares the mips and coordinates of `of`.

    Raises:
        DatasetError: it cannot be opened, or none of its scales is a mip of `of`.
    """
    if path is None:
        return []
    volume = Volume(path, flag="--cv_path_defects", resolution=of.resolution)
    volume.check_channels(1, "a defect mask")
    return [DefectMask(volume, threshold)]


def resample_mask(window: Grid, marked: np.ndarray, source: Grid) -> np.ndarray:
    """Bring a mask to the pixels of another mip.

    Args:
        window: area wanted.
        marked: (H, W) bool on `source`.
        source: covers `window` on whole pixels of its own mip.

    Returns:
        (window.rows, window.cols) bool: whether any finer pixel inside, or the
        coarser pixel around it, is marked.
    """
    levels = source.mip - window.mip
    if levels <= 0:
        rows, cols = window.shape
        blocks = marked.reshape(rows, 1 << -levels, cols, 1 << -levels)
        return np.asarray(blocks.any((1, 3)))
    fine = marked.repeat(1 << levels, 0).repeat(1 << levels, 1)
    grid = Grid(window.mip, source.x, source.y, fine.shape[0], fine.shape[1])
    return crop_array(fine, grid, window)


def warn_if_integers(volume: Volume, cure: str) -> None:
    """Warn, before anything is read, that integer images will not be normalised.

    Args:
        volume: of images that are kept as stored.
        cure: the flag or entry that normalises them.
    """
    if volume.dtype.kind in "iu":
        logger.warning(
            "%s %s: is %s and is kept as stored, which train.py refuses; give %s, or "
            "normalise the files yourself",
            *(volume.flag, volume.path, volume.dtype, cure),
        )
