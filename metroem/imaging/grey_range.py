"""Map grey levels of any type to 1..255 by one linear range, so that sections compare.

0 stays 0: no data. NaN becomes 0. Where values below 0 exist, 0 may be a grey level in
the middle of tissue, so they are refused unless the range is stated and begins below 0.
Then only NaN is no data.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from metroem.errors import DatasetError

# Percentiles of tissue that become 1 and 255: a few hot and dead pixels lie outside.
_PERCENTILES = 0.1, 99.9
_STATE_IT = "state the range: --grey_range LOW HIGH"


@dataclass(frozen=True)
class GreyRange:
    """The grey levels that become 1 and 255.

    Attributes:
        low: becomes 1.
        high: becomes 255.
    """

    low: float
    high: float

    def to_uint8(self, image: np.ndarray) -> tuple[np.ndarray, int, int]:
        """Map an image; levels outside of the range are clipped.

        Args:
            image: any shape, of numbers.

        Returns:
            uint8 of the same shape, 0 = no data; the number of pixels that were
            clipped; the number of pixels of tissue.

        Raises:
            DatasetError: a level is infinite, or below 0 and the range is not.
        """
        is_tissue = find_tissue(image, zero_is_grey=self.low < 0)
        levels = image[is_tissue].astype(np.float64)
        clipped = int(((levels < self.low) | (levels > self.high)).sum())
        scaled = (levels - self.low) * (254 / (self.high - self.low))
        mapped = np.zeros(image.shape, np.uint8)
        mapped[is_tissue] = 1 + np.clip(np.round(scaled), 0, 254)
        return mapped, clipped, len(levels)


def find_tissue(image: np.ndarray, *, zero_is_grey: bool = False) -> np.ndarray:
    """Find the pixels with data: not NaN, and not 0.

    Args:
        image: any shape, of numbers.
        zero_is_grey: 0 and levels below it are tissue, too.

    Raises:
        DatasetError: a level is infinite, or is below 0 unasked.
    """
    is_float = image.dtype.kind == "f"
    if is_float and np.isinf(image).any():
        raise DatasetError("holds infinite values; expected grey levels")
    if zero_is_grey:
        return ~np.isnan(image) if is_float else np.ones(image.shape, bool)
    if image.dtype.kind in "if" and (image < 0).any():
        raise DatasetError(
            f"holds values below 0, such as {np.nanmin(image):g}, so 0 may be a grey "
            f"level; {_STATE_IT}, with LOW below 0, and only NaN is no data"
        )
    return (image != 0) & ~np.isnan(image) if is_float else image != 0


def find_grey_range(samples: Iterable[np.ndarray]) -> GreyRange:
    """Find the range of grey levels of tissue, without its few extremes.

    Args:
        samples: pixels of sections all over the stack.

    Raises:
        DatasetError: there is no tissue, or it has one grey level; see `find_tissue`.
    """
    tissue = [one[find_tissue(one)] for one in samples]
    levels = np.concatenate([np.zeros(0), *tissue]).astype(np.float64)
    if not len(levels):
        raise DatasetError(f"the sections looked at are blank; {_STATE_IT}")
    low, high = (float(one) for one in np.percentile(levels, _PERCENTILES))
    if not low < high:
        raise DatasetError(
            f"the sections looked at have one grey level, {low:g}; {_STATE_IT}"
        )
    return GreyRange(low, high)
