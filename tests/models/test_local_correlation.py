"""Local correlation against the sums it stands for, written out in float64."""

import pytest
import torch
import torch.nn.functional as F

from metroem.data.sample import seeded_generator
from metroem.models.local_correlation import (
    TILE,
    _correlation,
    _correlation_backward,
    local_correlation,
    window_offsets,
)


def maps(batch, channels, rows, cols, dtype=torch.float32):
    shape = (2, batch, channels, rows, cols)
    generator = seeded_generator(rows, cols, channels)
    a, b = torch.randn(shape, dtype=torch.float64, generator=generator)
    return a.to(dtype), b.to(dtype)


def by_formula(a, b, radius):
    """found[n, k, i, j] = sum over c of a[n, c, i, j] * b[n, c, i + r, j + s]."""
    rows, cols = a.shape[-2:]
    side = 2 * radius + 1
    around = F.pad(b, (radius, radius, radius, radius))
    return torch.stack(
        [
            (a * around[..., r : r + rows, s : s + cols]).sum(1)
            for r in range(side)
            for s in range(side)
        ],
        1,
    )


SHAPES = [
    # batch, channels, rows, cols, radius
    (1, 1, 5, TILE - 1, 2),
    (2, 3, 4, TILE, 1),
    (2, 7, 3, TILE + 1, 4),
    (1, 4, 6, 2 * TILE + 9, 3),
    (2, 2, 3, 2 * TILE, 2),
    (1, 5, 7, 2, 1),
    (2, 3, 2, 3, 4),  # the window is larger than the map
    (1, 6, 4, 5, 0),
]


@pytest.mark.parametrize(("batch", "channels", "rows", "cols", "radius"), SHAPES)
def test_each_value_is_the_sum_it_stands_for(batch, channels, rows, cols, radius):
    a, b = maps(batch, channels, rows, cols, torch.float64)
    found = local_correlation(a, b, radius)
    assert found.shape == (batch, (2 * radius + 1) ** 2, rows, cols)
    # The same sums of at most 7 terms in another order.
    torch.testing.assert_close(found, by_formula(a, b, radius), atol=1e-13, rtol=0)


@pytest.mark.parametrize(("batch", "channels", "rows", "cols", "radius"), SHAPES)
def test_gradients_are_those_of_the_formula(batch, channels, rows, cols, radius):
    a, b = maps(batch, channels, rows, cols, torch.float64)
    weight = torch.randn(
        batch,
        (2 * radius + 1) ** 2,
        rows,
        cols,
        dtype=torch.float64,
        generator=seeded_generator(9),
    )
    gradients = []
    for correlate in (local_correlation, by_formula):
        leaves = [m.clone().requires_grad_() for m in (a, b)]
        (correlate(*leaves, radius) * weight).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    # Gradients are summed in float32: up to 81 * 7 terms, rounded by 6e-8 of about 30.
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cols", [5, TILE + 2])
def test_gradients_agree_with_differences(cols):
    a, b = (m.requires_grad_() for m in maps(1, 2, 2, cols, torch.float64))
    # Sums of gradients are kept in float32, so 1e-5 is what can be asked for.
    assert torch.autograd.gradcheck(
        lambda a, b: local_correlation(a, b, 1),
        (a, b),
        atol=1e-5,
        rtol=1e-4,
        nondet_tol=1e-6,
    )


def test_the_window_runs_over_rows_then_cols():
    offsets = window_offsets(1, torch.device("cpu"))
    assert offsets.tolist() == [
        *([-1, -1], [0, -1], [1, -1]),
        *([-1, 0], [0, 0], [1, 0]),
        *([-1, 1], [0, 1], [1, 1]),
    ]


@pytest.mark.parametrize(("d_rows", "d_cols"), [(0, 0), (2, -1), (-2, 3), (3, 3)])
def test_a_peak_lies_at_the_offset_that_says_where_it_went(d_rows, d_cols):
    tgt, src = torch.zeros(2, 1, 1, 12, TILE + 8)
    tgt[..., 6, 33] = 1
    src[..., 6 + d_rows, 33 + d_cols] = 1
    found = local_correlation(tgt, src, 3)[0, :, 6, 33]
    (index,) = found.nonzero().flatten().tolist()
    assert window_offsets(3, src.device)[index].tolist() == [d_cols, d_rows]


def test_bfloat16_is_right_within_its_rounding():
    a, b = (m.requires_grad_() for m in maps(2, 16, 9, TILE + 5, torch.bfloat16))
    found = local_correlation(a, b, 2)
    exact = by_formula(a.detach().double(), b.detach().double(), 2)
    assert found.dtype == torch.bfloat16
    # Summed in float32, then rounded once: by 2**-9 of the value.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)

    found.float().square().sum().backward()
    leaves = [m.detach().double().requires_grad_() for m in (a, b)]
    # The gradient reaches the function in bfloat16 and leaves it so.
    (by_formula(*leaves, 2) * 2 * found.detach().double()).sum().backward()
    for ours, leaf in zip((a, b), leaves, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        # Five sums of a row of the window each are rounded by 2**-9, and their sum.
        largest = float(leaf.grad.abs().max())
        torch.testing.assert_close(
            ours.grad.double(), leaf.grad, atol=6 * 2**-9 * largest, rtol=0
        )


def test_only_what_needs_a_gradient_has_to():
    a, b = maps(1, 3, 4, 7)
    a.requires_grad_()
    local_correlation(a, b, 1).sum().backward()
    assert a.grad is not None and b.grad is None


def test_nothing_given_is_written_to():
    a, b = maps(1, 3, 4, 7)
    before = a.clone(), b.clone()
    local_correlation(a, b, 2)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@pytest.mark.parametrize(("batch", "channels", "rows", "cols", "radius"), SHAPES[1:4])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_the_compiler_is_told_the_truth(batch, channels, rows, cols, radius, order):
    pair = maps(batch, channels, rows, cols)
    a, b = (x.contiguous(memory_format=order).requires_grad_() for x in pair)
    leaves = (a, b, radius)
    torch.library.opcheck(_correlation, leaves)
    gradient = torch.randn_like(_correlation(*leaves))
    torch.library.opcheck(
        _correlation_backward,
        (gradient, *leaves),
        test_utils=("test_schema", "test_faketensor"),
    )
