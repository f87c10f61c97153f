"""Compute rigidity: how much springs from each pixel to its 8 neighbours stretch.

A spring along the unit step d joins pixel p to p + d. A field moves its ends, so

    vector = d + field(p + d) - field(p),    stretch = |vector| - |d|.

`rigidity_map` gives the mean of |stretch|^power over the springs of each pixel, with a
gradient for autograd. `weighted_rigidity` gives the weighted sum of stretch^2 and its
gradient, block by block; the finetuner calls it hundreds of times.
`metroem.finetune.triton_kernels` does the same on a GPU. Tests check that the three
agree. The gradient of stretch^power by a spring's far end is

    power * sign(stretch) * |stretch|^(power - 1) * vector / |vector|,

and its negative by the near end. It is written out because autograd would store a dozen
maps for each spring, and take three times as long (fields of 512 px, 2 cores, 2026-11).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metroem.geometry.field import check_field

# (cols, rows) from a pixel to four of its neighbours. The springs to the other four
# begin at these neighbours.
_SPRINGS = ((0, 1), (1, 0), (1, 1), (1, -1))
# The same springs, each beginning at its upper end.
_SPRINGS_DOWN = ((0, 1), (1, 0), (1, 1), (-1, 1))
NUM_NEIGHBOURS = 2 * len(_SPRINGS)
BORDER_PX = 2  # the original does not define the rigidity there
# Pixels of a block, for the speed of a CPU: 128 rows of 512 px (2026-11).
_BLOCK_PX = 4 * 32 * 512
_SHORTEST = 1e-6  # px: least length, so that a spring has a direction


def rigidity_map(
    field: Tensor, *, power: float = 2, diagonal_mult: float = 1.0
) -> Tensor:
    """Average the stretch of the springs from each pixel to its 8 neighbours.

    Args:
        field: (B, 2, H, W), pixels; H and W >= 5.
        power: exponent of the change of length.
        diagonal_mult: weight of a diagonal spring, whose rest length is
            sqrt(2), against that of a straight one.

    Returns:
        (B, 1, H, W): mean over the springs of |length - rest length|^power,
        px^power; a border of 2 px is 0.

    Raises:
        FieldError: `field` is not a field.

    Source: the original's `loss.py`, whose values are kept.
    """
    check_field(field)
    return _Rigidity.apply(field, power, diagonal_mult)  # type: ignore[no-any-return]


class _Spring(NamedTuple):
    """All springs of one direction."""

    near: tuple[Any, ...]  # index of the pixels where they begin
    far: tuple[Any, ...]  # index of the pixels where they end
    vector: Tensor  # (B, 2, h, w) px, from near to far
    length: Tensor  # (B, 1, h, w) px
    stretch: Tensor  # (B, 1, h, w) px, length minus rest length
    fraction: float  # weight in the mean over the springs of a pixel


class _Rigidity(torch.autograd.Function):
    """`rigidity_map` with its gradient."""

    @staticmethod
    def forward(ctx: Any, field: Tensor, power: float, diagonal_mult: float) -> Tensor:
        ctx.save_for_backward(field)
        ctx.power, ctx.diagonal_mult = power, diagonal_mult
        total = torch.zeros_like(field[:, :1])
        for spring in _springs(field, diagonal_mult):
            strain = _powered(spring.stretch, power).mul_(spring.fraction)
            total[spring.near] += strain
            total[spring.far] += strain
        return inside_border(total, BORDER_PX)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (field,) = ctx.saved_tensors
        weight = inside_border(gradients[0], BORDER_PX)
        total = torch.zeros_like(field)
        for spring in _springs(field, ctx.diagonal_mult):
            pull = weight[spring.near] + weight[spring.far]
            slope = _powered(spring.stretch, ctx.power - 1)
            pull *= slope.copysign_(spring.stretch).mul_(ctx.power * spring.fraction)
            vector = spring.vector.mul_(pull.div_(spring.length))
            total[spring.far] += vector
            total[spring.near] -= vector
        return total, None, None


def _springs(field: Tensor, diagonal_mult: float) -> Iterator[_Spring]:
    """Stretch the springs of each direction by a field."""
    rows = field.shape[-2]
    for d_cols, d_rows in _SPRINGS:
        near, far = _ends(field.shape[-2:], slice(0, rows), (d_cols, d_rows))
        vector = field[far] - field[near]
        vector[:, 0] += d_cols
        vector[:, 1] += d_rows
        # vector_norm over 2 channels took 80 times as long as hypot.
        length = torch.hypot(vector[:, :1], vector[:, 1:]).clamp_(min=_SHORTEST)
        mult = diagonal_mult if d_rows and d_cols else 1.0
        stretch = length - float(d_cols**2 + d_rows**2) ** 0.5
        fraction = mult / (4 + 4 * diagonal_mult)
        yield _Spring(near, far, vector, length, stretch, fraction)


def _powered(stretch: Tensor, power: float) -> Tensor:
    """Compute |stretch|^power in a new tensor."""
    if power == 2:
        return stretch.square()
    absolute = stretch.abs()
    return absolute if power == 1 else absolute.pow_(power)


def inside_border(values: Tensor, border: int) -> Tensor:
    """Set a border of a map, (B, C, H, W), to 0; px on each side."""
    rows, cols = values.shape[-2:]
    inner = (..., slice(border, rows - border), slice(border, cols - border))
    result = torch.zeros_like(values)
    result[inner] = values[inner]
    return result


def weighted_rigidity(
    field: Tensor, weight: Tensor, strain: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum stretch^2 over the springs of each pixel, times the pixel's weight.

    Args:
        field: (B, 2, H, W), pixels.
        weight: (B, 1, H, W), 0 in the outermost row and col on each side.
        strain: (B, 1, H, W): the sum of each pixel, without its weight, is added to it;
            or an empty tensor.

    Returns:
        The sum, (B,), and half its gradient, (B, 2, H, W).
    """
    value = field.new_zeros(field.shape[0])
    gradient = torch.zeros_like(field)
    for samples, rows in row_blocks(field, _BLOCK_PX):
        for d_cols, d_rows in _SPRINGS_DOWN:
            near, far = _ends(field.shape[-2:], rows, (d_cols, d_rows))
            near, far = (samples, *near), (samples, *far)
            vector = field[far] - field[near]
            cols_part, rows_part = vector[:, :1], vector[:, 1:]
            if d_cols:
                cols_part += d_cols
            if d_rows:
                rows_part += d_rows
            square = (cols_part * cols_part).addcmul_(rows_part, rows_part)
            square.clamp_(min=_SHORTEST**2)
            rest = (d_cols**2 + d_rows**2) ** 0.5
            # Stretch as a fraction of the length.
            change = torch.rsub(square.rsqrt(), 1, alpha=rest)
            weighted = (weight[near] + weight[far]).mul_(change)
            vector *= weighted
            square.mul_(change)
            value[samples] += torch.linalg.vecdot(
                weighted.flatten(1), square.flatten(1)
            )
            if strain.numel():
                square.mul_(change)
                strain[near] += square
                strain[far] += square
            gradient[far] += vector
            gradient[near] -= vector
    return value, gradient


def _ends(
    shape: torch.Size, block: slice, spring: tuple[int, int]
) -> tuple[tuple, tuple]:
    """Index the pixels p of a block of rows, and p + spring, where both exist."""
    rows, cols = shape
    d_cols, d_rows = spring
    low, high = max(block.start, -d_rows), min(block.stop, rows - d_rows)
    left, right = max(0, -d_cols), cols - max(0, d_cols)
    near = (..., slice(low, high), slice(left, right))
    far = (
        ...,
        slice(low + d_rows, high + d_rows),
        slice(left + d_cols, right + d_cols),
    )
    return near, far


def row_blocks(field: Tensor, size_px: int) -> Iterator[tuple[slice, slice]]:
    """Split a batch into blocks of rows that stay in the cache of a CPU.

    Args:
        field: (B, C, H, W).
        size_px: pixels of a block; on a GPU there is one block.

    Yields:
        Samples and rows of each block.
    """
    batch, _, rows, cols = field.shape
    if field.device.type != "cpu":
        yield slice(0, batch), slice(0, rows)
        return
    height = max(size_px // cols, 1)
    for sample in range(batch):
        for row in range(0, rows, height):
            yield slice(sample, sample + 1), slice(row, min(row + height, rows))
