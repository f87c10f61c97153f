"""Triton kernels: loss and gradient in one pass over memory.

They compute the loss of a field and its gradient; the equations are at the head of
`metroem.finetune.analytic_loss`. For `metroem.finetune.adam`, `upsample_transpose`
computes the gradient by a coarser change. Sums are taken within blocks of pixels, then
over the blocks, always in the same order. So a search gives the same bits each time.

Three kernels make the loss and its gradient:

1. `_compare` warps src, compares it with tgt, and writes the terms of each pixel.
2. `_strain` computes the springs of each pixel and half their gradient.
3. `_combine` multiplies the terms by their factors and adds them up.

Triton compiles a kernel once, for all sizes, in one or two seconds, and caches it on
disk. Triton comes with torch for GPUs.
"""

# Kernels are written in Triton's language, whose types are not Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


class Constants(NamedTuple):
    """Maps that are constant over a search."""

    table: Tensor  # (C or C + 2, B * (H + 2 pad) * (W + 2 pad)): src and weights
    tgt: Tensor  # (C, B, H, W)
    tgt_weights: Tensor  # (2, B, H, W)
    is_defined: Tensor  # (B, 1, H, W), 0 where rigidity is not defined
    pad: int
    are_weights_moving: bool


class Factors(NamedTuple):
    """Factors of the terms of the loss."""

    smoothness: float
    num_springs: int
    l2: float


def _on_device_of_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run on the GPU of the first argument: Triton uses torch's current GPU."""

    @functools.wraps(function)
    def run(tensor: Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return function(tensor, *args)

    return run


@_on_device_of_argument
def loss_and_gradient(
    field: Tensor, constants: Constants, factors: Factors
) -> tuple[Tensor, Tensor]:
    """Compute the loss of a field and its gradient, on the GPU of the field.

    Args:
        field: (B, 2, H, W), pixels, float32.
        constants: maps of the pair.
        factors: factors of the terms of the loss.

    Returns:
        The loss, (B,), and its gradient, (B, 2, H, W).
    """
    batch, _, rows, cols = field.shape
    field = field.contiguous()
    moving = constants.are_weights_moving
    size = rows * cols
    blocks = triton.cdiv(size, _BLOCK)
    maps = field.new_empty(10 if moving else 2, batch, rows, cols)
    sums = field.new_empty(5, batch, blocks)
    weights = maps[8:] if moving else constants.tgt_weights
    grid = (blocks, batch)
    _compare[grid](
        field, constants.table, constants.tgt, constants.tgt_weights, maps, sums,
        rows, cols, batch * size, batch * blocks,
        FEATURES=len(constants.tgt), PAD=constants.pad, MOVING=moving, BLOCK=_BLOCK,
    )  # fmt: skip
    gradient = torch.empty_like(field)
    strain = maps[7] if moving else maps
    _strain[grid](
        field, weights[1], constants.is_defined, strain, gradient, sums,
        rows, cols, batch * blocks, MOVING=moving, BLOCK=_BLOCK,
    )  # fmt: skip
    value, similarity_total, rigidity_total, strained, squares = sums.sum(2)
    totals = torch.stack((similarity_total, rigidity_total))
    totals = torch.where(totals > 0, totals, 1.0)
    inverse = 1 / totals
    inverse[0] /= len(constants.tgt)
    inverse[1] *= factors.smoothness / factors.num_springs
    costs = torch.stack((value, strained)) * inverse
    scalars = torch.cat((inverse, costs / totals)).contiguous()
    l2 = factors.l2 / (2 * size)
    _combine[grid](
        field, maps, scalars, gradient, size, batch * size, batch, 2 * l2,
        MOVING=moving, BLOCK=_BLOCK,
    )  # fmt: skip
    return costs.sum(0) + l2 * squares, gradient


@_on_device_of_argument
def upsample_transpose(gradient: Tensor, scale: int) -> Tensor:
    """Turn a gradient by a change into the gradient by a coarser change.

    This is the transpose of bilinear interpolation. torch's own version adds up in
    random order on a GPU.

    Args:
        gradient: gradient by the finer change, (B, 2, H, W), float32.
        scale: pixels of the finer change in one of the coarser, along each axis.

    Returns:
        (B, 2, H / scale, W / scale), rounded up.
    """
    rows, cols = gradient.shape[-2:]
    size = [-(-rows // scale), -(-cols // scale)]
    coarse = gradient.new_empty(*gradient.shape[:2], *size)
    grid = (triton.cdiv(size[0] * size[1], _BLOCK), gradient.shape[0] * 2)
    _upsample_transpose[grid](
        gradient.contiguous(), coarse, rows, cols, *size,
        SCALE=scale, BLOCK=_BLOCK,
    )  # fmt: skip
    return coarse


_SIZES = ["rows", "cols", "size", "step", "sums_step", "batch"]


@triton.jit(do_not_specialize=_SIZES)
def _compare(
    field, table, tgt, tgt_weights, maps, sums,
    rows, cols, step, sums_step,
    FEATURES: tl.constexpr, PAD: tl.constexpr, MOVING: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compare src, warped by the field, with tgt at each pixel of a block.

    Writes into `maps`: half the gradient of similarity (2 maps). If weights move, also:
    squared differences; slopes of the similarity weight along cols and rows; slopes of
    the rigidity weight; a map that `_strain` fills; both weights.
    Writes into `sums`: weighted squared differences, and both weights.
    """
    size = rows * cols
    step = step.to(tl.int64)  # 10 maps of a large section need 64-bit offsets
    sample = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    row, col = at // cols, at % cols
    here = sample.to(tl.int64) * size + at
    to_col = tl.load(field + sample.to(tl.int64) * 2 * size + at, inside, 0.0)
    to_row = tl.load(field + sample.to(tl.int64) * 2 * size + size + at, inside, 0.0)
    height, width = rows + 2 * PAD, cols + 2 * PAD
    x = _clamp_to_table(to_col + (col + PAD).to(tl.float32), width)
    y = _clamp_to_table(to_row + (row + PAD).to(tl.float32), height)
    left, top = tl.floor(x), tl.floor(y)
    x -= left
    y -= top
    page = (height * width).to(tl.int64) * tl.num_programs(1)
    first = sample.to(tl.int64) * height * width
    first += top.to(tl.int32) * width + left.to(tl.int32)

    w0 = tl.load(tgt_weights + here, inside, 0.0)
    w1 = tl.load(tgt_weights + step + here, inside, 0.0)
    if MOVING:
        v0, c0, r0 = _read(table + FEATURES * page + first, width, x, y, inside)
        v1, c1, r1 = _read(table + (FEATURES + 1) * page + first, width, x, y, inside)
        tl.store(maps + 3 * step + here, c0 * w0, inside)
        tl.store(maps + 4 * step + here, r0 * w0, inside)
        tl.store(maps + 5 * step + here, c1 * w1, inside)
        tl.store(maps + 6 * step + here, r1 * w1, inside)
        w0 *= v0
        w1 *= v1
        tl.store(maps + 8 * step + here, w0, inside)
        tl.store(maps + 9 * step + here, w1, inside)
    along_cols = tl.zeros((BLOCK,), tl.float32)
    along_rows = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for feature in tl.static_range(FEATURES):
        value, d_col, d_row = _read(table + feature * page + first, width, x, y, inside)
        value -= tl.load(tgt + feature * step + here, inside, 0.0)
        along_cols += d_col * value
        along_rows += d_row * value
        squares += value * value
    tl.store(maps + here, along_cols * w0, inside)
    tl.store(maps + step + here, along_rows * w0, inside)
    if MOVING:
        tl.store(maps + 2 * step + here, squares, inside)
    out = sums + sample * tl.num_programs(0) + tl.program_id(0)
    tl.store(out, tl.sum(tl.where(inside, squares * w0, 0.0)))
    tl.store(out + sums_step, tl.sum(tl.where(inside, w0, 0.0)))
    tl.store(out + 2 * sums_step, tl.sum(tl.where(inside, w1, 0.0)))


@triton.jit
def _clamp_to_table(location, size):
    """Clamp a location along one axis to the padded map; NaN becomes 0."""
    location = tl.where(location == location, location, 0.0)
    return tl.minimum(tl.maximum(location, 0.0), (size - 2).to(tl.float32))


@triton.jit
def _read(at, width, x, y, inside):
    """Interpolate a map between four pixels: value, slopes along cols and rows."""
    above = tl.load(at, inside, 0.0)
    d_above = tl.load(at + 1, inside, 0.0) - above
    below = tl.load(at + width, inside, 0.0)
    d_below = tl.load(at + width + 1, inside, 0.0) - below
    above += d_above * x
    d_row = below + d_below * x - above
    return above + d_row * y, d_above + (d_below - d_above) * y, d_row


@triton.jit(do_not_specialize=_SIZES)
def _strain(
    field, weights, is_defined, strain, gradient, sums,
    rows, cols, sums_step, MOVING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the springs of each pixel of a block.

    Writes half the gradient of their weighted strain into `gradient`. If weights move,
    writes the strain of each pixel, without its weight, into `strain`. Writes into
    `sums`: weighted strain, and squares of the field.
    """
    size = rows * cols
    sample = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    row, col = at // cols, at % cols
    here = sample.to(tl.int64) * size
    field += sample.to(tl.int64) * 2 * size
    to_col = tl.load(field + at, inside, 0.0)
    to_row = tl.load(field + size + at, inside, 0.0)
    weight = tl.load(weights + here + at, inside, 0.0)
    weight *= tl.load(is_defined + here + at, inside, 0.0)
    pull_col = tl.zeros((BLOCK,), tl.float32)
    pull_row = tl.zeros((BLOCK,), tl.float32)
    cost = tl.zeros((BLOCK,), tl.float32)
    for d_row in tl.static_range(-1, 2):
        for d_col in tl.static_range(-1, 2):
            if d_row != 0 or d_col != 0:
                there = at + d_row * cols + d_col
                exists = inside & (row + d_row >= 0) & (row + d_row < rows)
                exists = exists & (col + d_col >= 0) & (col + d_col < cols)
                x = tl.load(field + there, exists, 0.0) - to_col + d_col
                y = tl.load(field + size + there, exists, 0.0) - to_row + d_row
                other = tl.load(weights + here + there, exists, 0.0)
                other *= tl.load(is_defined + here + there, exists, 0.0)
                square = tl.maximum(x * x + y * y, 1e-12)
                rest = 1.0 if d_row * d_col == 0 else 1.4142135623730951
                change = tl.where(exists, 1 - rest / tl.sqrt(square), 0.0)
                cost += square * change * change
                pull_col -= x * change * (weight + other)
                pull_row -= y * change * (weight + other)
    tl.store(gradient + 2 * here + at, pull_col, inside)
    tl.store(gradient + 2 * here + size + at, pull_row, inside)
    if MOVING:
        defined = tl.load(is_defined + here + at, inside, 0.0)
        tl.store(strain + here + at, cost * defined, inside)
    out = sums + 3 * sums_step + sample * tl.num_programs(0) + tl.program_id(0)
    tl.store(out, tl.sum(tl.where(inside, cost * weight, 0.0)))
    squares = to_col * to_col + to_row * to_row
    tl.store(out + sums_step, tl.sum(tl.where(inside, squares, 0.0)))


@triton.jit(do_not_specialize=_SIZES)
def _combine(
    field, maps, scalars, gradient, size, step, batch, l2,
    MOVING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the terms of the gradient, in place of the springs' half gradient.

    scalars: for each sample, factors of similarity and of rigidity, then both means.
    """
    step = step.to(tl.int64)
    sample = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    here = sample.to(tl.int64) * size + at
    both = sample.to(tl.int64) * 2 * size + at
    factor0 = tl.load(scalars + sample)
    factor1 = tl.load(scalars + batch + sample)
    along_cols = tl.load(maps + here, inside, 0.0) * (2 * factor0)
    along_rows = tl.load(maps + step + here, inside, 0.0) * (2 * factor0)
    along_cols += tl.load(gradient + both, inside, 0.0) * (2 * factor1)
    along_rows += tl.load(gradient + both + size, inside, 0.0) * (2 * factor1)
    if MOVING:
        # A mean changes with a weight by the pixel's value minus the mean.
        above = tl.load(maps + 2 * step + here, inside, 0.0) * factor0
        above -= tl.load(scalars + 2 * batch + sample)
        along_cols += above * tl.load(maps + 3 * step + here, inside, 0.0)
        along_rows += above * tl.load(maps + 4 * step + here, inside, 0.0)
        above = tl.load(maps + 7 * step + here, inside, 0.0) * factor1
        above -= tl.load(scalars + 3 * batch + sample)
        along_cols += above * tl.load(maps + 5 * step + here, inside, 0.0)
        along_rows += above * tl.load(maps + 6 * step + here, inside, 0.0)
    along_cols += l2 * tl.load(field + both, inside, 0.0)
    along_rows += l2 * tl.load(field + both + size, inside, 0.0)
    tl.store(gradient + both, along_cols, inside)
    tl.store(gradient + both + size, along_rows, inside)


@triton.jit(do_not_specialize=["rows", "cols", "coarse_rows", "coarse_cols"])
def _upsample_transpose(
    fine, coarse, rows, cols, coarse_rows, coarse_cols,
    SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the fine pixels that each coarse pixel contributes to, times the scale."""
    plane = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < coarse_rows * coarse_cols
    row, col = at // coarse_cols, at % coarse_cols
    fine += plane * rows * cols
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(2 * SCALE):
        y = row * SCALE - SCALE // 2 + i
        row_sum = tl.zeros((BLOCK,), tl.float32)
        for j in range(2 * SCALE):
            x = col * SCALE - SCALE // 2 + j
            exists = inside & (y >= 0) & (y < rows) & (x >= 0) & (x < cols)
            value = tl.load(fine + y * cols + x, exists, 0.0)
            row_sum += value * _linear_weight(x, col, coarse_cols, SCALE)
        total += row_sum * _linear_weight(y, row, coarse_rows, SCALE)
    tl.store(coarse + plane * coarse_rows * coarse_cols + at, total * SCALE, inside)


@triton.jit
def _linear_weight(fine, coarse, size, SCALE: tl.constexpr):
    """Weight of a coarse pixel at a fine one, along an axis of `size` coarse pixels."""
    location = tl.maximum((fine + 0.5) / SCALE - 0.5, 0.0)
    before = tl.floor(location)
    weight = tl.where(before == coarse, 1 - (location - before), 0.0)
    after = tl.minimum(before + 1, size - 1)
    return weight + tl.where(after == coarse, location - before, 0.0)
