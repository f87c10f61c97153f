"""Make fields smooth, free of folds, and consistent in both directions.

`smooth_field` fits a plane v(x) = a + b . x around each pixel, weighted by a Gaussian g
and by the pixels' weights w, and takes its value a there. With moments over offsets x

    n = sum g w,   r, c = sum g w x,   rr, cc, rc = sum g w x x',

the normal equations [[n, r, c], [r, rr, rc], [c, rc, cc]] [a, b_r, b_c] = moments of
the field are solved for a. A Gaussian is separable, so each moment is a product with
two matrices.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.geometry.field import invert, jacobian_determinant

# Planes are fitted to means over blocks. This many blocks make up the Gaussian's
# standard deviation, or a side of the field if that is shorter.
_BLOCKS = 4
# Added to moments: where less than the first fraction of the Gaussian has weight,
# planes become flat; where less than the second has weight, they become 0.
_FLAT_BELOW, _ZERO_BELOW = 1e-5, 1e-6
# A location whose area shrinks to less than this fraction is treated as a fold.
_MIN_DETERMINANT = 0.02
_MAX_ROUNDS = 6
# Where the two fields differ by this distance, the inverse of the backward field has
# weight 0.5 * exp(-1). Such places lie beside a tear, whose other side has no inverse.
_CONSISTENT_PX = 4.0


def smooth_field(field: Tensor, weight: Tensor, deviation_px: float) -> Tensor:
    """Remove detail that varies over less than some pixels.

    The value at a pixel is the value of the plane that fits the field best around it.
    So an affine field is unchanged up to its borders, and is extrapolated to where the
    weight is 0.

    Args:
        field: (B, 2, H, W), pixels; finite.
        weight: (B, 1, H, W), weight of each pixel, 0 to 1.
        deviation_px: standard deviation of the Gaussian.

    Returns:
        (B, 2, H, W), pixels; 0 far from all pixels with a weight.
    """
    size = max(1, int(min(deviation_px, *field.shape[-2:]) / _BLOCKS))
    sums = torch.cat((field * weight, weight), 1)
    means = F.avg_pool2d(sums, size, ceil_mode=True, count_include_pad=False)
    rows, cols = (
        _moments(count, size, deviation_px, field) for count in field.shape[-2:]
    )

    def moment(values: Tensor, along_rows: int, along_cols: int) -> Tensor:
        return rows[along_rows] @ values @ cols[along_cols].mT

    # The first row of the inverse of the normal equations, times its determinant.
    values, weights = means.split((2, 1), 1)
    n = moment(weights, 0, 0) + _ZERO_BELOW
    r, c, rc = (moment(weights, *powers) for powers in ((1, 0), (0, 1), (1, 1)))
    rr, cc = moment(weights, 2, 0) + _FLAT_BELOW, moment(weights, 0, 2) + _FLAT_BELOW
    cofactor_n, cofactor_r, cofactor_c = (
        rr * cc - rc * rc,
        rc * c - r * cc,
        r * rc - c * rr,
    )
    fitted = cofactor_n * moment(values, 0, 0)
    fitted = fitted + cofactor_r * moment(values, 1, 0)
    fitted = fitted + cofactor_c * moment(values, 0, 1)
    return fitted / (n * cofactor_n + r * cofactor_r + c * cofactor_c)


def _moments(
    count: int, size: int, deviation_px: float, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Make three matrices: a Gaussian times distances to the power 0, 1 and 2.

    Args:
        count: number of pixels along the axis.
        size: side of a block, px.
        deviation_px: standard deviation of the Gaussian; the unit of distances.
        like: tensor on the device to use.

    Returns:
        (pixels, blocks) each; the first sums to 1 over the blocks.
    """
    pixels = torch.arange(count, dtype=torch.float32, device=like.device)
    firsts = pixels[::size]
    sizes = (count - firsts).clamp(max=size)
    apart = (firsts + (sizes - 1) / 2 - pixels[:, None]) / deviation_px
    near = torch.exp(-0.5 * apart.square()) * sizes
    near = near / near.sum(1, keepdim=True)
    return near, near * apart, near * apart.square()


def remove_folds(field: Tensor) -> Tensor:
    """Smooth a field where it folds over, and nowhere else.

    Tissue does not fold over itself within a section. So a fold is an error, mostly at
    a sharp bend beside a tear. Each round averages the field over a window around the
    folds that are left. The radius of the window doubles from round to round.

    Args:
        field: (B, 2, H, W), pixels; H and W >= 3.

    Returns:
        (B, 2, H, W); `field` itself if nothing folds. Folds stay if a window of 65 px
        does not smooth them away.
    """
    for round_ in range(_MAX_ROUNDS):
        folded = jacobian_determinant(field) < _MIN_DETERMINANT
        if not bool(folded.any()):
            break
        radius = 2**round_
        size = 2 * radius + 1
        near_fold = F.pad(folded.float(), (1, 1, 1, 1))
        near_fold = F.max_pool2d(near_fold, (size, 1), 1, (radius, 0))
        near_fold = F.max_pool2d(near_fold, (1, size), 1, (0, radius))
        # A soft border, so that the window itself does not leave a step.
        border, smooth = (_box_average(maps, radius) for maps in (near_fold, field))
        field = torch.lerp(field, smooth, torch.maximum(border, near_fold))
    return field


def _box_average(maps: Tensor, radius: int) -> Tensor:
    """Average over a window around each pixel that ends at the border.

    Along one axis after the other: a window of 65 px takes a thirtieth of the time.
    """
    size = 2 * radius + 1
    for sides, margins in (((size, 1), (radius, 0)), ((1, size), (0, radius))):
        maps = F.avg_pool2d(maps, sides, 1, margins, count_include_pad=False)
    return maps


def make_inverse_consistent(forward: Tensor, backward: Tensor) -> Tensor:
    """Average a field with the inverse of the swapped pair's field.

    Errors that do not come from the sections cancel in the mean: for example which of
    them is interpolated between its pixels. Swapping the arguments gives the inverse of
    the result (to 0.1 px for fields 1 px apart).

    Args:
        forward: field of the pair, (B, 2, H, W), pixels.
        backward: field of the pair with src and tgt swapped, (B, 2, H, W), pixels.

    Returns:
        (B, 2, H, W), pixels; `forward` where they contradict each other.
    """
    back = invert(backward)
    apart = (back - forward).square().sum(1, keepdim=True)
    return torch.lerp(forward, back, 0.5 * torch.exp(-apart / _CONSISTENT_PX**2))
