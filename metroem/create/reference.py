"""The area that a section is normalised by, if it is not the patch.

Averaging takes noise out of coarser mips, so that the standard deviation of an area
depends on the mip that it is read at. It is wanted for the pixels of the images:

    finer than the images    the area is averaged to their mip
    coarser                  var = var(area) + mean over samples of
                                   (var(images) - var(area))

The second is the law of total variance: what is missing is the variance inside the
pixels of the area. It is measured in windows of the area that are read at both mips.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from metroem.errors import DatasetError
from metroem.grid import Grid
from metroem.io.volume import Volume, cut
from metroem.normalize import GreyStatistics, coarsen_image

# Side of a sample, pixels of the images, and how many there are along x and y.
_SAMPLE_PX, _NUM_SAMPLES = 128, 3
_LEAST_PX = 4  # of the area
_LEAST = 1e-12  # variance: samples may differ more than the area


class Moments(NamedTuple):
    """How many pixels of tissue there are, and what they are like."""

    count: float
    mean: float  # grey levels
    variance: float  # grey levels squared


class Reference(NamedTuple):
    """An area of one size, around whatever patch is normalised or profiled by it."""

    volume: Volume
    mip: int
    rows: int  # pixels of `mip`
    cols: int  # pixels of `mip`

    def around(self, window: Grid) -> Grid:
        """The area around the centre of a patch, as far as the volume goes.

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
                f"{self.volume.flag} {self.volume.path}: holds nothing around x {x}, y "
                f"{y} (mip-0 pixels)"
            )
        return inner


def no_reference(
    reference: Reference, sections: Sequence[int], flag: str
) -> DatasetError:
    """The error for sections that have tissue, and nothing to be normalised by."""
    volume = reference.volume
    return DatasetError(
        f"{volume.flag} {volume.path}: has no tissue at mip {reference.mip} around the "
        f"patch in sections {', '.join(map(str, sections))}, where the images have "
        f"some; was it written there? Give a {flag} that was, another volume, or leave "
        "the reference out"
    )


def samples_of(area: Grid, mip: int) -> list[Grid]:
    """Windows of an area to measure at the mip of the images, if that is finer.

    They are spread evenly, on whole pixels of the area; a small area is one window.
    """
    if area.mip <= mip:
        return []
    side = max(_SAMPLE_PX >> (area.mip - mip), _LEAST_PX)
    spans = []
    for size in area.shape:
        whole = size <= _NUM_SAMPLES * side
        starts = [
            (2 * number + 1) * size // (2 * _NUM_SAMPLES) - side // 2
            for number in range(_NUM_SAMPLES)
        ]
        spans.append([(0, size)] if whole else [(start, side) for start in starts])
    return [
        area.crop(row, col, rows, cols).at_mip(mip)
        for row, rows in spans[0]
        for col, cols in spans[1]
    ]


def moments_of(image: np.ndarray, grid: Grid, window: Grid, mip: int) -> Moments:
    """The moments of the tissue in a window, for pixels of a mip.

    Args:
        image: (H, W), finite, 0 = no data.
        grid: of the image.
        window: of any mip; what of it lies outside of the image is left out.
        mip: where it is coarser than the image, pixels are averaged.
    """
    inside = window.cover(grid.mip).overlap(grid)
    if inside is None:
        return Moments(0, 0, 0)
    part = torch.from_numpy(cut(image, grid, inside).astype(np.float32))
    levels = max(mip - grid.mip, 0)
    tissue = coarsen_image(part[None, None], levels).double().numpy()
    tissue = tissue[tissue != 0]
    if not tissue.size:
        return Moments(0, 0, 0)
    return Moments(tissue.size, float(tissue.mean()), float(tissue.var()))


def has_contrast(image: np.ndarray) -> bool:
    """Whether there is tissue, of more than one grey level."""
    tissue = image[image != 0]
    return bool(tissue.size and tissue.min() < tissue.max())


def measure(image: np.ndarray, grid: Grid, patch: Grid) -> list[Moments]:
    """The moments of an area where the patch is, and of each sample.

    Args:
        image: (H, W) on `grid`, the area or more.
        grid: that the samples are spread over.
        patch: at the mip of the images.
    """
    parts = [patch, *samples_of(grid, patch.mip)]
    return [moments_of(image, grid, part, patch.mip) for part in parts]


def statistics_for(
    coarse: Sequence[Moments], fine: Sequence[Moments], image: np.ndarray
) -> GreyStatistics | None:
    """Mean and standard deviation for the pixels of the images.

    Args:
        coarse: at the mip of the area: of the whole, of where the patch is, and of each
            sample.
        fine: of each sample, at the mip of the images.
        image: (H, W), the patch.

    Returns:
        None where there is nothing to normalise by: the area has no tissue or no
        contrast, or none of it is where the patch has some.
    """
    area, patch, *samples = coarse
    if not area.variance > 0 or (np.mean(image != 0) > 0.5 and not patch.count):
        return None
    if samples and not any(sample.count for sample in fine):
        # The images may be written where the patch is alone.
        grid = Grid(0, 0, 0, *image.shape)
        samples, fine = [patch], [moments_of(image, grid, grid, 0)]
    both = [(c, f) for c, f in zip(samples, fine, strict=True) if c.count and f.count]
    inside = sum(f.count * (f.variance - c.variance) for c, f in both)
    inside /= sum(f.count for _, f in both) or 1
    return GreyStatistics(area.mean, max(area.variance + inside, _LEAST) ** 0.5)
