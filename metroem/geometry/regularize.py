"""Make fields smooth, free of folds, and consistent in both directions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.geometry.field import invert, jacobian_determinant

# Planes are fitted to means over blocks, so many to the Gaussian's deviation or a side.
_BLOCKS = 4
# Where less than this share of the Gaussian counts, planes are held flat, and where
# far less, to 0.
_FLAT_BELOW, _ZERO_BELOW = 1e-5, 1e-6
# A place that shrinks to less than this share is on its way to folding over.
_LEAST_DETERMINANT = 0.02
_MOST_ROUNDS = 6
# Where the two are so far apart, the other one counts exp(-1) of its half: beside a
# tear, whose other side has no inverse.
_TRUSTED_PX = 4.0


def smooth_field(field: Tensor, weight: Tensor, deviation_px: float) -> Tensor:
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


def remove_folds(field: Tensor) -> Tensor:
    """Smooth a field where it folds over, and nowhere else.

    Tissue does not fold over itself within a section, so a fold is an error, at
    most places one of a sharp bend beside a tear. Each round averages the field
    over a window around the folds that are left, twice as wide as the round before.

    Args:
        field: (B, 2, H, W), pixels; H and W >= 3.

    Returns:
        (B, 2, H, W); `field` itself where nothing folds. Folds that 64 px windows do
        not smooth away stay.
    """
    for round_ in range(_MOST_ROUNDS):
        folded = jacobian_determinant(field) < _LEAST_DETERMINANT
        if not bool(folded.any()):
            break
        reach = 2**round_
        size = 2 * reach + 1
        around = F.max_pool2d(F.pad(folded.float(), (1, 1, 1, 1)), size, 1, reach)
        # A soft border, so that the window does not leave a step of its own.
        share = F.avg_pool2d(around, size, 1, reach, count_include_pad=False)
        smooth = F.avg_pool2d(field, size, 1, reach, count_include_pad=False)
        field = torch.lerp(field, smooth, torch.maximum(share, around))
    return field


def make_inverse_consistent(forward: Tensor, backward: Tensor) -> Tensor:
    """The mean of a field and the inverse of the swapped pair's.

    What a network or a search errs by for a reason of its own, such as which of the
    two sections is sampled between its pixels, cancels in the mean. Swapping the
    arguments gives the inverse of the result (to 0.1 px for fields 1 px apart).

    Args:
        forward: of the pair, (B, 2, H, W), pixels.
        backward: of the pair with src and tgt swapped, (B, 2, H, W), pixels.

    Returns:
        (B, 2, H, W), pixels; `forward` where they contradict each other.
    """
    back = invert(backward)
    apart = (back - forward).square().sum(1, keepdim=True)
    return torch.lerp(forward, back, 0.5 * torch.exp(-apart / _TRUSTED_PX**2))
