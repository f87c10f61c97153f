"""Read volumes of displacements in any unit and channel order."""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch

from metroem.errors import DatasetError, UsageError
from metroem.geometry.field import fill_not_finite, resample_field
from metroem.geometry.grid import Grid
from metroem.io.volume import Volume

logger = logging.getLogger(__name__)

CHANNEL_ORDERS = ("xy", "yx")
FIELD_UNITS = ("mip0", "relative")
# corgie and related programs store quarter pixels in int16 volumes.
_QUARTER = 0.25
# Pixels around the patch that bilinear resampling needs.
_MARGIN_PX = 1


@dataclass(frozen=True)
class FieldFormat:
    """What the values of a volume of displacements mean.

    Attributes:
        channel_order: axes of channels 0 and 1, "xy" or "yx".
        field_unit: "mip0": mip-0 pixels; "relative": pixels of the mip that is read.
        int16_scale: length of a stored 1 in an int16 volume, in `field_unit`; None
            means 0.25.

    Raises:
        UsageError: a value is not allowed.
    """

    channel_order: str
    field_unit: str
    int16_scale: float | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("channel_order", self.channel_order, CHANNEL_ORDERS),
            ("field_unit", self.field_unit, FIELD_UNITS),
        ):
            if value not in known:
                raise UsageError(f"{name} {value}: expected {' or '.join(known)}")
        if self.int16_scale is not None and not self.int16_scale > 0:
            raise UsageError(f"int16_scale {self.int16_scale}: must be > 0")


class FieldVolume:
    """The displacements of a volume at one mip.

    Attributes:
        volume: the volume that stores them.
        mip: the mip that is read.
        scale: length of a stored 1, mip-0 pixels.

    Raises:
        DatasetError: the volume is neither float nor int16.
        UsageError: `int16_scale` is given, but the volume is float.
    """

    def __init__(self, volume: Volume, mip: int, form: FieldFormat) -> None:
        self.volume, self.mip, self._form = volume, mip, form
        self.scale = self._stored_scale()

    def window(self, patch: Grid) -> Grid:
        """Grid to read for a patch: with the margin for resampling, inside the volume.

        If the volume does not overlap the patch, it is the patch at the mip that is
        read.
        """
        margin = 0 if self.mip == patch.mip else _MARGIN_PX
        wide = patch.cover(self.mip, margin_px=margin)
        return self.volume.clip(wide) or patch.cover(self.mip)

    def displacements(self, stored: np.ndarray) -> np.ndarray:
        """Convert stored values to displacements.

        Args:
            stored: (2, H, W) as in the volume; may contain NaN.

        Returns:
            (2, H, W) float32, mip-0 pixels, channel 0 along cols.
        """
        vectors = stored.astype(np.float32) * np.float32(self.scale)
        # cols run along the volume's y, so the displacement along y comes first.
        return vectors if self._form.channel_order == "yx" else vectors[::-1]

    def _stored_scale(self) -> float:
        volume, int16_scale = self.volume, self._form.int16_scale
        if volume.dtype.kind != "f" and volume.dtype != np.int16:
            raise DatasetError(
                f"{volume.flag} {volume.path}: is {volume.dtype}; fields are stored as "
                "float32 or as int16"
            )
        if volume.dtype.kind == "f" and int16_scale is not None:
            raise UsageError(
                f"int16_scale {int16_scale}: {volume.path} is {volume.dtype}; leave it "
                "out"
            )
        unit = 1 << self.mip if self._form.field_unit == "relative" else 1
        if volume.dtype.kind == "f":
            return unit
        scale = int16_scale or _QUARTER
        logger.info(
            "%s: int16, 1 is taken for %g px of %s; int16_scale changes that",
            volume.path,
            scale,
            "mip 0" if unit == 1 else f"mip {self.mip}",
        )
        return scale * unit


def mean_translation(
    displacements: np.ndarray, counts: np.ndarray, mip: int
) -> tuple[int, int] | None:
    """Compute the mean displacement, rounded down to whole pixels of a mip.

    Args:
        displacements: (2, H, W), mip-0 pixels, channel 0 along cols.
        counts: (H, W) bool, True where a vector counts. Vectors that are not finite
            never count.
        mip: the result is a multiple of 2**mip.

    Returns:
        x and y, mip-0 pixels; None if no vector counts.
    """
    counts = counts & np.isfinite(displacements).all(0)
    if not counts.any():
        return None
    along_y, along_x = displacements[:, counts].mean(1, dtype=np.float64)
    step = 1 << mip
    return math.floor(along_x / step) * step, math.floor(along_y / step) * step


def residual_field(
    displacements: np.ndarray, source: Grid, patch: Grid, translation: tuple[int, int]
) -> np.ndarray:
    """Subtract the translation from a field, and resample the rest to the patch.

    Args:
        displacements: (2, H, W) on `source`, mip-0 pixels, channel 0 along cols.
            Vectors that are not finite are replaced by the nearest finite one.
        source: grid of the displacements.
        patch: grid of the result; its mip must not be coarser.
        translation: x and y, mip-0 pixels.

    Returns:
        (2, H, W) float32 on the patch, pixels of its mip, channel 0 along cols.
    """
    x, y = translation
    filled = fill_not_finite(torch.from_numpy(displacements.copy())[None])
    residual = filled - torch.tensor([y, x], dtype=filled.dtype)[:, None, None]
    field = residual / (1 << source.mip)
    return resample_field(field, source, patch)[0].numpy()
