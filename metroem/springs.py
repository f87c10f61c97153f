"""Springs that join each pixel of a field to its 8 neighbours: how much they stretch.

The gradient is written out: autograd would keep a dozen maps for each spring, and
take three times as long (fields of 512 px, 2 cores, 2026-11).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metroem.field import check_field

# Changes of (col, row) from a pixel to the four neighbours after it; the springs to
# the other four are theirs.
_SPRINGS = ((0, 1), (1, 0), (1, 1), (1, -1))
# Border within which the original does not define the rigidity, px.
_BORDER = 2
_SHORTEST = 1e-6  # px: length of a spring whose direction is not known


def rigidity_map(
    field: Tensor, *, power: float = 2, diagonal_mult: float = 1.0
) -> Tensor:
    """Change of length of the springs from each pixel to its 8 neighbours.

    Args:
        field: (B, 2, H, W), pixels; H and W >= 5.
        power: exponent of the change of length.
        diagonal_mult: weight of a diagonal spring, whose rest length is
            sqrt(2), against that of a straight one.

    Returns:
        (B, 1, H, W): mean over the springs of |length - rest length|^power,
        px^power; a border of 2 px is 0.

    Raises:
        FieldError: `field` is no field.

    Source: the original's `loss.py`, whose values are kept.
    """
    check_field(field)
    return _Rigidity.apply(field, power, diagonal_mult)  # type: ignore[no-any-return]


class _Spring(NamedTuple):
    """All springs of one direction."""

    near: tuple[Any, ...]  # index of the pixels that they begin at
    far: tuple[Any, ...]  # and of those that they end at
    vector: Tensor  # (B, 2, h, w) px, from one to the other
    length: Tensor  # (B, 1, h, w) px
    stretch: Tensor  # (B, 1, h, w) px, beyond the length at rest
    share: float  # of the mean over the springs of a pixel


class _Rigidity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, field: Tensor, power: float, diagonal_mult: float) -> Tensor:
        ctx.save_for_backward(field)
        ctx.power, ctx.diagonal_mult = power, diagonal_mult
        total = torch.zeros_like(field[:, :1])
        for spring in _springs(field, diagonal_mult):
            strain = _powered(spring.stretch, power).mul_(spring.share)
            total[spring.near] += strain
            total[spring.far] += strain
        return _without_border(total)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (field,) = ctx.saved_tensors
        weight = _without_border(gradients[0])
        total = torch.zeros_like(field)
        for spring in _springs(field, ctx.diagonal_mult):
            pull = weight[spring.near] + weight[spring.far]
            slope = _powered(spring.stretch, ctx.power - 1)
            pull *= slope.copysign_(spring.stretch).mul_(ctx.power * spring.share)
            vector = spring.vector.mul_(pull.div_(spring.length))
            total[spring.far] += vector
            total[spring.near] -= vector
        return total, None, None


def _springs(field: Tensor, diagonal_mult: float) -> Iterator[_Spring]:
    rows, cols = field.shape[-2:]
    for d_cols, d_rows in _SPRINGS:
        low, high = max(0, -d_rows), rows - max(0, d_rows)
        near = (..., slice(low, high), slice(0, cols - d_cols))
        far = (..., slice(low + d_rows, high + d_rows), slice(d_cols, cols))
        vector = field[far] - field[near]
        vector[:, 0] += d_cols
        vector[:, 1] += d_rows
        # hypot, since vector_norm over 2 channels took 80 times as long.
        length = torch.hypot(vector[:, :1], vector[:, 1:]).clamp_(min=_SHORTEST)
        mult = diagonal_mult if d_rows and d_cols else 1.0
        stretch = length - float(d_cols**2 + d_rows**2) ** 0.5
        share = mult / (4 + 4 * diagonal_mult)
        yield _Spring(near, far, vector, length, stretch, share)


def _powered(stretch: Tensor, power: float) -> Tensor:
    """|stretch|^power, in memory of its own."""
    if power == 2:
        return stretch.square()
    size = stretch.abs()
    return size if power == 1 else size.pow_(power)


def _without_border(values: Tensor) -> Tensor:
    """The map with 0 where the rigidity is not defined."""
    inner = (..., slice(_BORDER, -_BORDER), slice(_BORDER, -_BORDER))
    result = torch.zeros_like(values)
    result[inner] = values[inner]
    return result
