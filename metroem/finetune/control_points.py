"""Interpolate fields between control points, and compute how much they bend.

With R, (H, h), and C, (W, w), the matrices of linear interpolation along rows and cols:

    interpolate(v)           = R v C^T        control points -> pixels
    interpolate_transpose(x) = R^T x C        pixels -> control points

The bending energy of a field f, in pixels, with the weights w of control points is

    mean of w * (f_rr^2 + 2 f_rc^2 + f_cc^2) * (32 px)^2,

summed over both components. Second derivatives are differences of neighbours, which are
matrix products too. So the energy is quadratic: its gradient is a matrix times f.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Bending is the change of a field's gradient over this distance.
_BENDING_PX = 32


class ControlPoints:
    """Control points on a grid of pixels, one in the middle of each block.

    Values are bilinear between control points and constant beyond the outermost.
    `metroem.geometry.field.upsample_field` does the same for powers of 2.

    Attributes:
        spacing: distance of the control points, px.
        shape: (h, w), number of control points.
    """

    def __init__(self, shape: tuple[int, int], spacing: int, like: Tensor) -> None:
        """Place control points `spacing` px apart over (H, W) pixels.

        Args:
            shape: (H, W) of the pixels.
            spacing: distance of the control points, px.
            like: tensor on the device to use.
        """
        rows, cols = shape
        self.spacing = spacing
        self.shape = -(-rows // spacing), -(-cols // spacing)
        self._rows = _interpolation(rows, spacing).to(like.device)
        self._cols = _interpolation(cols, spacing).to(like.device)

    def interpolate(self, values: Tensor) -> Tensor:
        """Interpolate between control points: (B, C, h, w) -> (B, C, H, W)."""
        return self._rows @ values @ self._cols.mT

    def interpolate_transpose(self, values: Tensor) -> Tensor:
        """Apply the transpose of `interpolate`: (B, C, H, W) -> (B, C, h, w)."""
        return self._rows.mT @ values @ self._cols

    def weighted_diagonal(self, weight: Tensor) -> Tensor:
        """Compute the diagonal of a product of three matrices.

        They interpolate, multiply by `weight`, and apply `interpolate_transpose`.

        Args:
            weight: (B, C, H, W).

        Returns:
            (B, C, h, w).
        """
        return self._rows.mT.square() @ weight @ self._cols.square()

    def mean(self, values: Tensor) -> Tensor:
        """Average around each control point: (B, C, H, W) -> (B, C, h, w)."""
        ones = torch.ones_like(values[:1, :1])
        return self.interpolate_transpose(values) / self.interpolate_transpose(ones)

    def minimum(self, values: Tensor) -> Tensor:
        """Find the minimum of each block: (B, C, H, W) -> (B, C, h, w)."""
        return -F.max_pool2d(-values, self.spacing, ceil_mode=True)


class BendingEnergy:
    """Weighted mean of squared second derivatives of a field at control points.

    See the equations at the head of the file. Shifts, rotations and shears cost
    nothing.
    """

    def __init__(self, weight: Tensor, spacing_px: float) -> None:
        """Prepare the matrices, which are constant over a search.

        Args:
            weight: (B, 1, h, w), weight of the bending at each control point; >= 0.
            spacing_px: distance of the control points, in pixels of the field.
        """
        rows, cols = weight.shape[-2:]
        scale = _BENDING_PX / spacing_px**2
        self._bend_rows = scale * _differences(_difference_matrix(rows, weight))
        self._bend_cols = scale * _differences(_difference_matrix(cols, weight))
        self._slope_rows = scale * _difference_matrix(rows, weight)
        self._slope_cols = _difference_matrix(cols, weight)
        weight = weight / (rows * cols)
        # The weight of a second derivative is the least of its control points.
        self._weights = (
            _least_weight(weight, (3, 1)),
            _least_weight(weight, (1, 3)),
            2 * _least_weight(weight, (2, 2)),
        )

    def value(self, field: Tensor) -> Tensor:
        """Compute the energy: (B, 2, h, w), pixels, at the control points -> (B,)."""
        return (self.half_gradient(field) * field).sum((1, 2, 3))

    def half_gradient(self, field: Tensor) -> Tensor:
        """Compute half the gradient of `value`; linear in the field, (B, 2, h, w)."""
        rows, cols, both = self._weights
        bend_rows, bend_cols = self._bend_rows, self._bend_cols
        slope_rows, slope_cols = self._slope_rows, self._slope_cols
        return (
            bend_rows.mT @ (rows * (bend_rows @ field))
            + (cols * (field @ bend_cols.mT)) @ bend_cols
            + slope_rows.mT @ (both * (slope_rows @ field @ slope_cols.mT)) @ slope_cols
        )

    def diagonal(self) -> Tensor:
        """Compute the diagonal of the matrix of `half_gradient`: (B, 1, h, w)."""
        rows, cols, both = self._weights
        return (
            self._bend_rows.square().mT @ rows
            + cols @ self._bend_cols.square()
            + self._slope_rows.square().mT @ both @ self._slope_cols.square()
        )


def _interpolation(size: int, spacing: int) -> Tensor:
    """Make a matrix of linear interpolation: (size, number of control points)."""
    count = -(-size // spacing)
    pixels = torch.arange(size, dtype=torch.float32)
    position = ((pixels + 0.5) / spacing - 0.5).clamp(0, count - 1)
    distance = position[:, None] - torch.arange(count)
    return (1 - distance.abs()).clamp(min=0)


def _difference_matrix(count: int, like: Tensor) -> Tensor:
    """Make the matrix that subtracts neighbours: (count - 1, count)."""
    return _differences(torch.eye(count, dtype=torch.float32, device=like.device))


def _differences(matrix: Tensor) -> Tensor:
    return matrix[1:] - matrix[:-1]


def _least_weight(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Find the least weight among the control points of each difference."""
    if weight.shape[-2] < size[0] or weight.shape[-1] < size[1]:
        rows, cols = (
            max(n - s + 1, 0) for n, s in zip(weight.shape[-2:], size, strict=True)
        )
        return weight.new_zeros(*weight.shape[:2], rows, cols)
    return -F.max_pool2d(-weight, size, stride=1)
