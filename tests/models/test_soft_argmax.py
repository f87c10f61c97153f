"""Means over blocks: what eager torch computes is what compiled networks call."""

import pytest
import torch

from metroem.data.sample import seeded_generator
from metroem.models.soft_argmax import (
    _block_average_backward,
    _block_average_op,
    _block_upsample_backward,
    _block_upsample_op,
    block_average,
    block_upsample,
)

SHAPES = [((1, 1, 7, 10), 3), ((2, 5, 16, 9), 4), ((1, 2, 3, 5), 8), ((2, 1, 6, 4), 1)]
TWINS = [(block_average, _block_average_op), (block_upsample, _block_upsample_op)]


def numbers(*shape):
    return torch.randn(
        shape, dtype=torch.float64, generator=seeded_generator(*shape)
    ).requires_grad_()


def test_each_block_is_averaged_with_those_beside_it():
    x = torch.zeros(1, 1, 4, 5)
    x[0, 0, 0, 0], x[0, 0, 3, 4] = 8.0, 6.0
    # Blocks of 2 px: the means are [[2, 0, 0], [0, 0, 3]], the last column 1 px wide.
    expected = torch.tensor([[2 / 4, 5 / 6, 3 / 4], [2 / 4, 5 / 6, 3 / 4]])
    torch.testing.assert_close(block_average(x, 2)[0, 0], expected)


def test_blocks_are_spread_by_their_middles():
    x = torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]])
    # Pixels lie at 1/4 and 3/4 of the way between middles, and beyond the outer ones.
    cols = torch.tensor([0.0, 1.0, 3.0, 4.0])
    torch.testing.assert_close(block_upsample(x, 2)[0, 0], cols + 2 * cols[:, None])


@pytest.mark.parametrize(("plain", "opaque"), TWINS)
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_what_compiled_networks_call_is_the_same(plain, opaque, shape, size):
    x, twin = numbers(*shape), numbers(*shape)
    results = plain(x, size), opaque(twin, size)
    assert torch.equal(*results)
    weight = numbers(*results[0].shape).detach()
    for result in results:
        (result * weight).sum().backward()
    torch.testing.assert_close(twin.grad, x.grad)


@pytest.mark.parametrize("opaque", [opaque for _, opaque in TWINS])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_the_compiler_is_told_the_truth(opaque, shape, size, order):
    x = numbers(*shape).detach().contiguous(memory_format=order).requires_grad_()
    torch.library.opcheck(opaque, (x, size))


@pytest.mark.parametrize(
    ("backward", "shape", "more"),
    [
        (_block_average_backward, (2, 5, 3, 4), (7, 10)),  # the size of the pixels
        (_block_upsample_backward, (2, 5, 9, 12), ()),
    ],
)
def test_so_it_is_of_slopes(backward, shape, more):
    tests = ("test_schema", "test_faketensor")
    gradient = numbers(*shape).detach()
    torch.library.opcheck(backward, (gradient, 3, *more), test_utils=tests)
