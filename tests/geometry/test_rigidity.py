import pytest
import torch

from metroem.geometry.rigidity import (
    BORDER_PX,
    NUM_NEIGHBOURS,
    rigidity_map,
    weighted_rigidity,
)

# Not square, so that swapped axes cannot pass.
ROWS, COLS = 9, 11


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("diagonal_mult", [1.0, 0.5])
def test_the_gradient_of_rigidity_is_that_of_small_changes(power, diagonal_mult):
    chance = torch.Generator().manual_seed(0)
    field = torch.randn(2, 2, ROWS, COLS, generator=chance, dtype=torch.float64)

    def strain(moved):
        return rigidity_map(moved, power=power, diagonal_mult=diagonal_mult)

    assert torch.autograd.gradcheck(strain, (field.requires_grad_(),))


def test_a_spring_without_length_pulls_nowhere_and_stays_finite():
    # Each pixel at its right neighbour's place: springs along cols have no length.
    cols = torch.arange(float(COLS)).expand(ROWS, COLS)
    field = torch.stack([-cols, torch.zeros(ROWS, COLS)])[None].requires_grad_()
    rigidity_map(field).sum().backward()
    assert torch.isfinite(field.grad).all()


def test_the_weighted_sum_and_its_gradient_are_those_of_the_map():
    chance = torch.Generator().manual_seed(1)
    shape = (2, 2, 300, 259)  # in several blocks
    field = torch.randn(shape, generator=chance, dtype=torch.float64)
    inner = (..., slice(BORDER_PX, -BORDER_PX), slice(BORDER_PX, -BORDER_PX))
    weight, strain = torch.zeros(2, 2, 1, *shape[2:], dtype=torch.float64)
    weight[inner] = torch.rand(weight[inner].shape, generator=chance).double()

    value, half_gradient = weighted_rigidity(field, weight, strain)

    means = rigidity_map(field.requires_grad_())
    total = NUM_NEIGHBOURS * (means * weight).sum((1, 2, 3))
    (gradient,) = torch.autograd.grad(total.sum(), field)
    torch.testing.assert_close(strain[inner], NUM_NEIGHBOURS * means[inner])
    torch.testing.assert_close(value, total)
    torch.testing.assert_close(2 * half_gradient, gradient)
