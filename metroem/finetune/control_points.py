"""Fields that are given at knots and bilinear between them, and how they bend."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Over how many pixels the bending counts the change of a field's gradient.
_BENDING_PX = 32


class ControlPoints:
    """Knots over a grid of pixels, one in the middle of each block of them.

    Bilinear between the knots and constant beyond the outermost, as
    `metroem.geometry.field.upsample_field`, but for any spacing.

    Attributes:
        shape: (h, w), how many knots there are.
    """

    def __init__(self, shape: tuple[int, int], spacing: int, like: Tensor) -> None:
        """Knots `spacing` px apart over (H, W) pixels.

        Args:
            shape: (H, W) of the pixels.
            spacing: of the knots, px.
            like: has the device.
        """
        rows, cols = shape
        self.spacing = spacing
        self.shape = -(-rows // spacing), -(-cols // spacing)
        self._rows = _interpolation(rows, spacing).to(like.device)
        self._cols = _interpolation(cols, spacing).to(like.device)

    def expand(self, values: Tensor) -> Tensor:
        """(B, C, h, w) at the knots -> (B, C, H, W)."""
        return self._rows @ values @ self._cols.mT

    def gather(self, values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, h, w): the transpose of `expand`."""
        return self._rows.mT @ values @ self._cols

    def gather_squares(self, values: Tensor) -> Tensor:
        """The diagonal of expanding, multiplying by (B, C, H, W) and gathering."""
        return self._rows.mT.square() @ values @ self._cols.square()

    def mean(self, values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, h, w): the mean around each knot."""
        return self.gather(values) / self.gather(torch.ones_like(values[:1, :1]))

    def least(self, values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, h, w): the least value in the block of each knot."""
        return -F.max_pool2d(-values, self.spacing, ceil_mode=True)


class BendingEnergy:
    """How much a field at knots bends: mean squared second derivatives.

    For a field f in pixels, the weighted mean over the knots of
    (f_rr^2 + 2 f_rc^2 + f_cc^2) * (32 px)^2, both components together: what its
    gradient changes over 32 px, squared. Shifts, turns and shears cost nothing.
    """

    def __init__(self, weight: Tensor, spacing_px: float) -> None:
        """What is constant over a search.

        Args:
            weight: (B, 1, h, w), what bending at each knot counts; >= 0.
            spacing_px: of the knots, in the pixels of the field.
        """
        rows, cols = weight.shape[-2:]
        scale = _BENDING_PX / spacing_px**2
        self._bend_rows = scale * _differences(_differences_of(rows, weight))
        self._bend_cols = scale * _differences(_differences_of(cols, weight))
        self._slope_rows = scale * _differences_of(rows, weight)
        self._slope_cols = _differences_of(cols, weight)
        weight = weight / (rows * cols)
        # A second derivative counts as its least knot does.
        self._weights = (
            _least_of(weight, (3, 1)),
            _least_of(weight, (1, 3)),
            2 * _least_of(weight, (2, 2)),
        )

    def value(self, field: Tensor) -> Tensor:
        """(B, 2, h, w), pixels, at the knots -> (B,)."""
        return (self.half_gradient(field) * field).sum((1, 2, 3))

    def half_gradient(self, field: Tensor) -> Tensor:
        """Half the gradient of `value` by the field, which is linear in it."""
        rows, cols, both = self._weights
        bend_rows, bend_cols = self._bend_rows, self._bend_cols
        slope_rows, slope_cols = self._slope_rows, self._slope_cols
        return (
            bend_rows.mT @ (rows * (bend_rows @ field))
            + (cols * (field @ bend_cols.mT)) @ bend_cols
            + slope_rows.mT @ (both * (slope_rows @ field @ slope_cols.mT)) @ slope_cols
        )

    def diagonal(self) -> Tensor:
        """(B, 1, h, w): the diagonal of `half_gradient` as a matrix."""
        rows, cols, both = self._weights
        return (
            self._bend_rows.square().mT @ rows
            + cols @ self._bend_cols.square()
            + self._slope_rows.square().mT @ both @ self._slope_cols.square()
        )


def _interpolation(size: int, spacing: int) -> Tensor:
    """(size, number of knots): what each knot is worth at each pixel."""
    count = -(-size // spacing)
    pixels = torch.arange(size, dtype=torch.float32)
    position = ((pixels + 0.5) / spacing - 0.5).clamp(0, count - 1)
    distance = position[:, None] - torch.arange(count)
    return (1 - distance.abs()).clamp(min=0)


def _differences_of(count: int, like: Tensor) -> Tensor:
    """(count - 1, count): differences of neighbours."""
    return _differences(torch.eye(count, dtype=torch.float32, device=like.device))


def _differences(matrix: Tensor) -> Tensor:
    return matrix[1:] - matrix[:-1]


def _least_of(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """The least weight of the knots that each difference is made of."""
    if weight.shape[-2] < size[0] or weight.shape[-1] < size[1]:
        rows, cols = (
            max(n - s + 1, 0) for n, s in zip(weight.shape[-2:], size, strict=True)
        )
        return weight.new_zeros(*weight.shape[:2], rows, cols)
    return -F.max_pool2d(-weight, size, stride=1)
