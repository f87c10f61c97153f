import math

import pytest
import torch

from metroem.errors import FieldError
from metroem.geometry.field import (
    compose,
    downsample_field,
    invert,
    resample_field,
    upsample_field,
    warp,
)
from metroem.geometry.grid import Grid

# The image is a formula, so a warp has an exact answer at every coordinate.
# Bilinear error is at most (1/7**2 + 1/5**2) / 8 = 0.008 grey levels.
BILINEAR_ERROR = 0.008
ROWS, COLS = 64, 96
INSIDE = (..., slice(10, -10), slice(10, -10))


def texture(rows, cols):
    return (torch.sin(rows / 7) + torch.cos(cols / 5))[None, None]


@pytest.fixture
def grid():
    # Not square, so that swapped axes cannot pass.
    rows, cols = torch.arange(float(ROWS)), torch.arange(float(COLS))
    return torch.meshgrid(rows, cols, indexing="ij")


def smooth_field(rows, cols, size=4.0):
    """Derivatives are at most size / 20."""
    d_cols = size * torch.sin(rows / 20) * torch.cos(cols / 25)
    d_rows = size * torch.cos(rows / 22 + cols / 30)
    return torch.stack([d_cols, d_rows])[None]


def test_warp_pulls_the_image_from_where_the_field_points(grid):
    rows, cols = grid
    field = smooth_field(rows, cols)

    warped = warp(texture(rows, cols), field)

    expected = texture(rows + field[0, 1], cols + field[0, 0])
    torch.testing.assert_close(
        warped[INSIDE], expected[INSIDE], atol=BILINEAR_ERROR, rtol=0
    )


@pytest.mark.parametrize("shape", [(1, 7), (16, 5), (31, 64)])
def test_warp_by_whole_pixels_is_exact_at_any_size(shape):
    image = torch.rand(2, 3, *shape)
    field = torch.zeros(2, 2, *shape)
    field[:, 0] = 2

    warped = warp(image, field)

    torch.testing.assert_close(warped[..., :-2], image[..., 2:], atol=1e-5, rtol=0)
    assert not warped[..., -1].any()


def test_warp_keeps_bf16_and_serves_a_batch_with_one_image(grid):
    rows, cols = grid
    field = smooth_field(rows, cols).repeat(3, 1, 1, 1)
    warped = warp(texture(rows, cols).bfloat16(), field.bfloat16())
    assert warped.dtype == torch.bfloat16 and warped.shape == (3, 1, ROWS, COLS)


def test_composing_equals_warping_twice(grid):
    rows, cols = grid
    image = texture(rows, cols)
    f, g = smooth_field(rows, cols, 3.0), smooth_field(cols, rows, 2.0)

    once = warp(image, compose(f, g))

    # Each side interpolates the image at most twice.
    twice = warp(warp(image, g), f)
    torch.testing.assert_close(
        once[INSIDE], twice[INSIDE], atol=3 * BILINEAR_ERROR, rtol=0
    )


def test_composing_two_translations_adds_them():
    f, g = torch.zeros(2, 1, 2, 8, 11)
    f[:, 0], g[:, 1] = 1.5, -2.0
    assert torch.equal(compose(f, g), f + g)


def test_inverting_leads_back(grid):
    field = smooth_field(*grid)
    back = compose(invert(field), field)
    assert back[INSIDE].abs().max() < 1e-3


def test_upsampling_doubles_the_vectors_of_a_linear_field(grid):
    rows, cols = grid
    field = torch.stack([0.1 * cols, 0.2 * rows])[None]

    fine = upsample_field(field, 2)

    # Fine pixel i has its centre at (i + 0.5) / 4 - 0.5 coarse pixels.
    centre = (torch.arange(4.0 * COLS) + 0.5) / 4 - 0.5
    expected = 4 * 0.1 * centre
    torch.testing.assert_close(
        fine[0, 0, 7, 4:-4], expected[4:-4], atol=1e-4, rtol=1e-5
    )
    assert fine.shape == (1, 2, 4 * ROWS, 4 * COLS)


def test_down_after_up_gives_the_field_back(grid):
    field = smooth_field(*grid)
    again = downsample_field(upsample_field(field, 1), 1)
    # Averaging what was interpolated adds 1/8 of the second difference of each
    # axis: 4 * (1/20**2 + 1/25**2) / 8 = 0.00205 px at most.
    torch.testing.assert_close(again[INSIDE], field[INSIDE], atol=2.1e-3, rtol=0)


def test_downsampling_keeps_odd_borders():
    field = torch.full((1, 2, 5, 7), 6.0)
    assert torch.equal(downsample_field(field, 1), torch.full((1, 2, 3, 4), 3.0))


@pytest.mark.parametrize("target_mip", [1, 2, 3, 4])
def test_a_moved_field_keeps_its_physical_displacement(target_mip):
    # A field linear in the place: 0.01 of the mip-0 distance from (40, 16).
    source = Grid(2, 8, -16, 64, 80)

    def physical(grid):
        scale = 2.0**grid.mip
        x = grid.x + scale * (torch.arange(grid.rows) + 0.5)
        y = grid.y + scale * (torch.arange(grid.cols) + 0.5)
        d_rows, d_cols = torch.meshgrid(x - 40, y - 16, indexing="ij")
        return 0.01 * torch.stack([d_cols, d_rows])[None] / scale

    target = Grid(target_mip, 72, 16, 96 >> target_mip, 160 >> target_mip)
    moved = resample_field(physical(source), source, target)

    torch.testing.assert_close(moved, physical(target), atol=1e-4, rtol=0)


def test_moving_beyond_the_source_continues_its_border():
    source, target = Grid(0, 0, 0, 4, 6), Grid(0, -8, 0, 4, 6)
    field = torch.arange(48.0).view(1, 2, 4, 6)
    moved = resample_field(field, source, target)
    border = field[..., :1, :].expand(-1, -1, 4, -1)
    torch.testing.assert_close(moved, border, atol=1e-4, rtol=0)


def test_what_is_no_field_is_refused():
    with pytest.raises(FieldError, match=r"\(1, 3, 4, 5\)"):
        warp(torch.zeros(1, 1, 4, 5), torch.zeros(1, 3, 4, 5))
    with pytest.raises(FieldError, match="differ in size"):
        warp(torch.zeros(1, 1, 4, 6), torch.zeros(1, 2, 4, 5))
    with pytest.raises(FieldError, match="int64"):
        upsample_field(torch.zeros(1, 2, 4, 5, dtype=torch.int64), 1)
    with pytest.raises(FieldError, match="by -1"):
        upsample_field(torch.zeros(1, 2, 4, 5), -1)
    with pytest.raises(FieldError, match="its grid says"):
        resample_field(
            torch.zeros(1, 2, 4, 5), Grid(0, 0, 0, 5, 4), Grid(0, 0, 0, 5, 4)
        )


def test_warp_is_differentiable_in_image_and_field():
    image = torch.rand(1, 1, 5, 7, dtype=torch.float32, requires_grad=True)
    field = torch.rand(1, 2, 5, 7, requires_grad=True)
    warp(image, field).sum().backward()
    assert image.grad is not None and field.grad is not None
    assert math.isfinite(float(field.grad.sum()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_a_field_gone_wild_is_survived(value, padding):
    # torch's own sampler ends the process in the backward pass of such a field.
    image = torch.rand(2, 3, 64, 48, requires_grad=True)
    field = torch.full((2, 2, 64, 48), value, requires_grad=True)
    warped = warp(image, field, padding=padding)
    warped.sum().backward()
    assert torch.isfinite(warped).all()
