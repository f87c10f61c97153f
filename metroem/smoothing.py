"""What of a field is smooth: planes fitted to it around each pixel.

Source: local regression, Cleveland 1979 (doi:10.1080/01621459.1979.10481038), here
with Gaussian weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Planes are fitted to means over blocks, so many to the Gaussian's deviation or a side.
_BLOCKS = 4
# Where less than this share of the Gaussian counts, planes are held flat, and where
# far less, to 0.
_FLAT_BELOW, _ZERO_BELOW = 1e-5, 1e-6


def smoothed(field: Tensor, weight: Tensor, deviation_px: float) -> Tensor:
    """A field without what varies over less than some pixels.

    At each pixel the plane is taken that fits the field best around it. An affine
    field is kept as it is up to its borders, and goes on where nothing counts.

    Args:
        field: (B, 2, H, W), pixels; finite.
        weight: (B, 1, H, W), what each pixel counts, 0 to 1.
        deviation_px: of the Gaussian that a plane counts pixels around it by.

    Returns:
        (B, 2, H, W), pixels; 0 far from all that counts.
    """
    size = max(1, int(min(deviation_px, *field.shape[-2:]) / _BLOCKS))
    sums = torch.cat((field * weight, weight), 1)
    means = F.avg_pool2d(sums, size, ceil_mode=True, count_include_pad=False)
    rows, cols = (
        _moments(count, size, deviation_px, field) for count in field.shape[-2:]
    )

    def moment(values: Tensor, along_rows: int, along_cols: int) -> Tensor:
        return rows[along_rows] @ values @ cols[along_cols].mT

    # The normal equations of value and slopes; the first row of their inverse.
    values, weights = means.split((2, 1), 1)
    n = moment(weights, 0, 0) + _ZERO_BELOW
    r, c, rc = (moment(weights, *powers) for powers in ((1, 0), (0, 1), (1, 1)))
    rr, cc = moment(weights, 2, 0) + _FLAT_BELOW, moment(weights, 0, 2) + _FLAT_BELOW
    of_n, of_r, of_c = rr * cc - rc * rc, rc * c - r * cc, r * rc - c * rr
    fitted = of_n * moment(values, 0, 0)
    fitted = fitted + of_r * moment(values, 1, 0) + of_c * moment(values, 0, 1)
    return fitted / (n * of_n + r * of_r + c * of_c)


def _moments(
    count: int, size: int, deviation_px: float, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(pixels, blocks) each: a Gaussian times distances to the power 0, 1 and 2."""
    pixels = torch.arange(count, dtype=torch.float32, device=like.device)
    firsts = pixels[::size]
    sizes = (count - firsts).clamp(max=size)
    apart = (firsts + (sizes - 1) / 2 - pixels[:, None]) / deviation_px
    near = torch.exp(-0.5 * apart.square()) * sizes
    near = near / near.sum(1, keepdim=True)
    return near, near * apart, near * apart.square()
