import pytest
import torch

from metroem.finetune.control_points import BendingEnergy, ControlPoints
from metroem.geometry.field import upsample_field

ROWS, COLS = 44, 70


def control_points(spacing, shape=(ROWS, COLS)):
    return ControlPoints(shape, spacing, like=torch.zeros(1))


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_control_points_lie_as_the_pixels_of_a_coarser_field_do():
    grid = control_points(8)
    assert grid.shape == (6, 9)
    values = random(2, 2, 6, 9)
    # A field's vectors are 8 times as long on pixels of an eighth of the size.
    expected = upsample_field(values, 3)[..., :ROWS, :COLS] / 8
    torch.testing.assert_close(grid.interpolate(values), expected)


def test_any_spacing_reaches_each_pixel():
    grid = control_points(6)
    assert grid.shape == (8, 12)
    torch.testing.assert_close(
        grid.interpolate(torch.ones(1, 1, 8, 12)), torch.ones(1, 1, ROWS, COLS)
    )


def test_the_transpose_is_that_of_interpolation():
    grid, values, pixels = (
        control_points(8),
        random(2, 2, 6, 9),
        random(2, 2, ROWS, COLS),
    )
    torch.testing.assert_close(
        (grid.interpolate(values) * pixels).sum(),
        (values * grid.interpolate_transpose(pixels)).sum(),
    )


def test_the_weighted_diagonal_is_that_of_the_product():
    grid, weight = control_points(8, (13, 22)), random(1, 1, 13, 22).square()
    diagonal = torch.stack(
        [
            (unit * grid.interpolate_transpose(weight * grid.interpolate(unit))).sum()
            for unit in torch.eye(6).reshape(6, 1, 1, 2, 3)
        ]
    )
    found = grid.weighted_diagonal(weight).flatten()
    torch.testing.assert_close(found, diagonal)


def test_means_and_least_values_are_those_around_a_control_point():
    grid, values = control_points(8), torch.full((1, 1, ROWS, COLS), 3.0)
    torch.testing.assert_close(grid.mean(values), torch.full((1, 1, 6, 9), 3.0))
    values[..., 9, 20] = 1.0
    assert torch.argwhere(grid.minimum(values) == 1).tolist() == [[0, 0, 1, 2]]


def at_control_points(formula, shape=(5, 8), spacing=16):
    """(1, 2, h, w): a field by a formula of rows and cols, px, twice."""
    row, col = torch.meshgrid(
        *(spacing * torch.arange(float(size)) for size in shape), indexing="ij"
    )
    return formula(row, col).expand(1, 2, *shape)


def bending(shape=(5, 8), spacing=16, weight=1.0):
    return BendingEnergy(torch.full((1, 1, *shape), weight), spacing)


def test_affine_maps_cost_nothing():
    field = at_control_points(lambda row, col: 5 + 0.2 * row - 0.1 * col)
    assert float(bending().value(field)) < 1e-8


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        # f_rr = 0.002 at 3 of 5 rows, times 32: of two components.
        (lambda row, col: 0.001 * row**2 + 0 * col, 2 * 0.064**2 * 3 / 5),
        (lambda row, col: 0.001 * col**2 + 0 * row, 2 * 0.064**2 * 6 / 8),
        # f_rc = 0.002, counted twice, between 4 x 7 pairs of 5 x 8 control points.
        (lambda row, col: 0.002 * row * col, 4 * 0.064**2 * 4 * 7 / 40),
    ],
)
def test_bending_is_the_mean_squared_second_derivative(formula, expected):
    value = bending().value(at_control_points(formula))
    torch.testing.assert_close(value, torch.tensor([expected]))


def test_bending_does_not_depend_on_the_spacing_of_control_points():
    # Second derivatives of a wave of 400 px, far from the border's share.
    def wave(row, col):
        return torch.sin(row / 64) + torch.cos(col / 64)

    coarse = bending((80, 120), 16).value(at_control_points(wave, (80, 120), 16))
    fine = bending((160, 240), 8).value(at_control_points(wave, (160, 240), 8))
    torch.testing.assert_close(coarse, fine, rtol=0.05, atol=0)


@pytest.mark.parametrize("shape", [(5, 8), (1, 4), (2, 2), (1, 1)])
def test_the_gradient_and_its_diagonal_are_those_of_the_value(shape):
    weight = 0.1 + random(1, 1, *shape).square()
    bent = BendingEnergy(weight, 16)
    leaf = random(1, 2, *shape).requires_grad_()

    (slope,) = torch.autograd.grad(bent.value(leaf), leaf)

    torch.testing.assert_close(2 * bent.half_gradient(leaf.detach()), slope)
    count = shape[0] * shape[1]
    diagonal = [
        (unit * bent.half_gradient(unit)).sum()
        for unit in torch.eye(count).reshape(count, 1, 1, *shape)
    ]
    torch.testing.assert_close(bent.diagonal().flatten(), torch.stack(diagonal))


def test_what_weighs_nothing_may_bend():
    weight = torch.ones(1, 1, 5, 8)
    weight[..., 3:5] = 0
    # A step between cols 3 and 4: every difference over it has a knot of no weight.
    field = at_control_points(lambda row, col: 9.0 * (col > 60) + 0 * row)
    assert float(BendingEnergy(weight, 16).value(field)) == 0
    assert float(bending().value(field)) > 0
