import pytest
import torch

from metroem.springs import rigidity_map

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
