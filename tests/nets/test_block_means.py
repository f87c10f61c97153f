"""Means over blocks: what eager torch computes is what compiled networks call."""

import pytest
import torch

from metroem.data.sample import seeded_generator
from metroem.nets.block_means import _opaque, _opaque_backward, block_means

SHAPES = [((1, 1, 7, 10), 3), ((2, 5, 16, 9), 4), ((1, 2, 3, 5), 8), ((2, 1, 6, 4), 1)]


def numbers(*shape):
    return torch.randn(
        shape, dtype=torch.float64, generator=seeded_generator(*shape)
    ).requires_grad_()


def test_each_block_is_averaged_with_those_beside_it():
    x = torch.zeros(1, 1, 4, 5)
    x[0, 0, 0, 0], x[0, 0, 3, 4] = 8.0, 6.0
    # Blocks of 2 px: the means are [[2, 0, 0], [0, 0, 3]], the last column 1 px wide.
    expected = torch.tensor([[2 / 4, 5 / 6, 3 / 4], [2 / 4, 5 / 6, 3 / 4]])
    torch.testing.assert_close(block_means(x, 2)[0, 0], expected)


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_what_compiled_networks_call_is_the_same(shape, size):
    x, twin = numbers(*shape), numbers(*shape)
    plain, opaque = block_means(x, size), _opaque(twin, size)
    assert torch.equal(plain, opaque)
    weight = numbers(*plain.shape).detach()
    for result in (plain, opaque):
        (result * weight).sum().backward()
    torch.testing.assert_close(twin.grad, x.grad)


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_the_compiler_is_told_the_truth(shape, size):
    x = numbers(*shape)
    torch.library.opcheck(_opaque, (x, size))
    torch.library.opcheck(
        _opaque_backward,
        (torch.randn_like(_opaque(x, size)), size, *shape[-2:]),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_memory_in_another_order():
    x = numbers(2, 5, 8, 12).detach().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(_opaque(x, 4), block_means(x, 4))
    torch.library.opcheck(_opaque, (x.requires_grad_(), 4))
