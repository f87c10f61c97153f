import math

import torch

from metroem.metrics import (
    chunked_correlation,
    endpoint_error,
    fold_share,
    jacobian_determinant,
)


def test_endpoint_error_by_hand():
    field = torch.zeros(1, 2, 2, 5)
    truth = torch.zeros(1, 2, 2, 5)
    truth[0, 0, 0], truth[0, 1, 0] = 3.0, 4.0  # 5 px in the first row
    truth[0, 0, 1] = 0.75  # in the second
    valid = torch.ones(1, 1, 2, 5, dtype=torch.bool)
    valid[..., 0, 4] = False  # four of 5 px, five of 0.75 px

    error = endpoint_error(field, truth, valid)

    assert math.isclose(error.mean, (4 * 5 + 5 * 0.75) / 9, rel_tol=1e-6)
    assert error.median == 0.75 and error.p95 == 5.0
    assert error.above_half == 1.0
    assert math.isclose(error.above_one, 4 / 9, rel_tol=1e-6)


def test_endpoint_error_without_a_valid_pixel_is_nan():
    nothing = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    field = torch.zeros(1, 2, 3, 4)
    assert math.isnan(endpoint_error(field, field, nothing).mean)


def test_correlation_of_a_chunk_leaves_blank_pixels_out():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1, 1, 8, 16, generator=generator)
    b = -3 * a + 2
    valid = torch.ones(1, 1, 8, 16, dtype=torch.bool)
    valid[..., :3, :8] = False
    b[~valid] = 100.0

    correlation = chunked_correlation(a, b, valid, chunk_px=8)

    torch.testing.assert_close(
        correlation, torch.full((1, 1, 1, 2), -1.0, dtype=torch.float64)
    )


def test_correlation_is_nan_where_most_is_blank_and_0_without_contrast():
    a = torch.ones(1, 1, 4, 8)
    valid = torch.ones(1, 1, 4, 8, dtype=torch.bool)
    valid[..., :, 4:] = False
    left, right = chunked_correlation(a, a, valid, chunk_px=4)[0, 0, 0].tolist()
    assert left == 0 and math.isnan(right)


def test_determinant_of_a_linear_field_by_hand():
    rows, cols = torch.meshgrid(torch.arange(6.0), torch.arange(9.0), indexing="ij")
    field = torch.stack([0.5 * cols + 0.1 * rows, 0.2 * cols - 0.25 * rows])[None]
    expected = torch.full((1, 1, 4, 7), 1.5 * 0.75 - 0.1 * 0.2)
    torch.testing.assert_close(jacobian_determinant(field), expected)


def test_a_field_that_turns_back_is_a_fold():
    cols = torch.arange(10.0).expand(6, 10)
    field = torch.stack([-1.5 * cols, torch.zeros(6, 10)])[None]
    assert fold_share(field) == 1.0 and fold_share(torch.zeros(1, 2, 6, 10)) == 0.0
