"""Affine maps, against maps written down by hand."""

import numpy as np
import pytest
import torch

from metroem.errors import FieldError
from metroem.geometry import affine
from metroem.geometry.field import resample_field
from metroem.geometry.grid import Grid

QUARTER = np.array([[0.0, -1.0, 7.0], [1.0, 0.0, -2.0]])  # a turn by 90 degrees
SHEAR = np.array([[1.0, 0.5, 3.0], [0.0, 2.0, -1.0]])
POINTS = np.array([[0.0, 0], [10, 0], [0, 4], [3, 8], [12, 5]])


def test_compose_applies_the_first_map_first():
    # (1, 2) -> (-2 + 7, 1 - 2) = (5, -1) -> (5 - 0.5 + 3, -2 - 1) = (7.5, -3)
    both = affine.compose(QUARTER, SHEAR)

    np.testing.assert_allclose(affine.apply(both, np.array([[1.0, 2]])), [[7.5, -3]])


def test_a_map_and_its_inverse_cancel():
    for matrix in (QUARTER, SHEAR):
        around = affine.compose(matrix, affine.invert(matrix))
        np.testing.assert_allclose(around, affine.identity(), atol=1e-12)
    with pytest.raises(FieldError, match="has no inverse"):
        affine.invert(np.array([[1.0, 2, 0], [2, 4, 0]]))


def test_determinant_and_scale():
    assert affine.determinant(SHEAR) == pytest.approx(2)
    assert affine.scale(SHEAR) == pytest.approx(2**0.5)
    assert affine.determinant(SHEAR[::-1]) == pytest.approx(-2)


@pytest.mark.parametrize(
    ("model", "matrix"),
    [("rigid", QUARTER), ("similarity", 1.5 * QUARTER), ("affine", SHEAR)],
)
def test_fit_finds_the_map_that_made_the_points(model, matrix):
    found = affine.fit(POINTS, affine.apply(matrix, POINTS), model)

    np.testing.assert_allclose(found, matrix, atol=1e-12)


def test_fit_heeds_weights():
    images = affine.apply(QUARTER, POINTS)
    images[2] += 100
    weights = np.array([1.0, 2, 0, 1, 3])

    found = affine.fit(POINTS, images, "similarity", weights)

    np.testing.assert_allclose(found, QUARTER, atol=1e-12)


def test_rigid_and_similar_fits_never_mirror_or_shear():
    mirror = np.array([[-1.0, 0, 0], [0, 1, 0]])
    for model, size in (("rigid", 1.0), ("similarity", None)):
        found = affine.fit(POINTS, affine.apply(mirror, POINTS), model)
        assert affine.determinant(found) >= 0
        linear = found[:, :2]
        size = affine.determinant(found) if size is None else size
        np.testing.assert_allclose(linear @ linear.T, size * np.eye(2), atol=1e-9)


def test_fit_refuses_too_few_points_and_unknown_models():
    with pytest.raises(FieldError, match="2 points: a map of model affine needs 3"):
        affine.fit(POINTS[:2], POINTS[:2], "affine")
    with pytest.raises(FieldError, match="1 points"):
        affine.fit(POINTS, POINTS, "rigid", np.array([1.0, 0, 0, 0, 0]))
    with pytest.raises(FieldError, match="model 'elastic': expected one of rigid"):
        affine.fit(POINTS, POINTS, "elastic")


def test_the_nearest_similarity_keeps_one_point_and_the_mirror():
    center = np.array([5.0, 3.0])
    for matrix in (
        np.array([[3.0, 0, 1], [0, 1, 2]]),
        np.array([[-3.0, 0, 1], [0, 1, 2]]),
    ):
        found = affine.nearest_similarity(matrix, center)
        np.testing.assert_allclose(
            affine.apply(found, center[None]), affine.apply(matrix, center[None])
        )
        # Stretches of 3 and 1: their mean.
        np.testing.assert_allclose(np.abs(found[:, :2]), [[2, 0], [0, 2]], atol=1e-12)
        assert np.sign(affine.determinant(found)) == np.sign(affine.determinant(matrix))


def test_mips_change_about_pixel_centres():
    coarse = affine.change_mip(SHEAR, 0, 2)

    # Pixel (3, 1) of mip 2 has its centre at 4 * 3.5 - 0.5, 4 * 1.5 - 0.5.
    at = affine.apply(SHEAR, np.array([[13.5, 5.5]]))
    expected = (at + 0.5) / 4 - 0.5
    np.testing.assert_allclose(affine.apply(coarse, np.array([[3.0, 1]])), expected)
    np.testing.assert_allclose(affine.change_mip(coarse, 2, 0), SHEAR, atol=1e-12)


def test_swapped_axes_map_swapped_points():
    swapped = affine.apply(affine.swap_axes(SHEAR), POINTS[:, ::-1])

    np.testing.assert_allclose(swapped[:, ::-1], affine.apply(SHEAR, POINTS))


def test_a_field_leads_from_its_pixels_to_where_the_map_says():
    grid = Grid(mip=2, x=64, y=-32, rows=5, cols=7)

    field = affine.as_field(SHEAR, grid)

    assert field.shape == (1, 2, 5, 7) and field.dtype == torch.float32
    # Row 4, col 6: mip-0 row 64 + 4 * 4.5 - 0.5, col -32 + 4 * 6.5 - 0.5.
    col, row = -6.5, 81.5
    to_col, to_row = col + 0.5 * row + 3, 2 * row - 1
    expected = [(to_col - col) / 4, (to_row - row) / 4]
    np.testing.assert_allclose(field[0, :, 4, 6].numpy(), expected, rtol=1e-6)


def test_fields_of_two_mips_say_the_same():
    fine, coarse = Grid(1, 64, 32, 12, 8), Grid(3, 64, 32, 3, 2)

    resampled = resample_field(affine.as_field(SHEAR, fine), fine, coarse)

    torch.testing.assert_close(resampled, affine.as_field(SHEAR, coarse))


def test_long_displacements_are_rounded_only_at_the_end():
    shift = np.array([[1.0, 0.0, 200_000.013], [0.0, 1.0, -150_000.257]])

    field = affine.as_field(shift, Grid(0, 10**7, 10**7, 2, 3)).double()

    # float32 has steps of 1/64 px there.
    assert (field[0, 0] - 200_000.013).abs().max() < 0.01
    assert (field[0, 1] + 150_000.257).abs().max() < 0.01
