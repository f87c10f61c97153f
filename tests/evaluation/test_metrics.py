import math

import torch

from metroem.evaluation.metrics import (
    chunked_correlation,
    chunked_mean,
    cycle_error,
    endpoint_error,
    fold_fraction,
    jacobian,
    ring,
    swap_error,
)
from metroem.geometry.field import jacobian_determinant


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
    assert error.p99 == 5.0 and error.above_two == error.above_one
    assert error.above_eight == 0.0


def test_displacements_of_more_than_8_px_are_counted():
    field = torch.zeros(1, 2, 2, 5)
    field[0, 1, 1, :3] = torch.tensor([7.9, 8.1, -20.0])
    valid = torch.ones(1, 1, 2, 5, dtype=torch.bool)
    assert endpoint_error(field, 0 * field, valid).above_eight == 0.2


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


def test_a_ring_of_correlation_needs_less_of_a_chunk():
    a = torch.rand(1, 1, 4, 8, generator=torch.Generator().manual_seed(1))
    valid = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    valid[..., :2, :2], valid[..., 0, 4:7] = True, True  # 4 and 3 of 16 pixels
    whole = chunked_correlation(a, a, valid, chunk_px=4)
    some = chunked_correlation(a, a, valid, chunk_px=4, min_fraction=0.25)[0, 0, 0]
    assert whole.isnan().all()
    assert math.isclose(float(some[0]), 1) and math.isnan(some[1])


def test_the_mean_of_a_chunk_is_over_its_valid_pixels():
    values = torch.arange(16.0).view(1, 1, 2, 8)
    values[..., 0, 0] = float("nan")
    valid = torch.ones(1, 1, 2, 8, dtype=torch.bool)
    valid[..., 0, 0] = False  # leaves 1, 8 and 9 of the first chunk
    valid[..., :, 6:] = False
    valid[..., 0, 4:] = False  # leaves 12 and 13 of the third
    means = chunked_mean(values, valid, chunk_px=2)[0, 0, 0].tolist()
    assert means[:3] == [6.0, (2 + 3 + 10 + 11) / 4, 12.5] and math.isnan(means[3])


def test_cycle_and_swap_errors_by_hand():
    # 3 px one way; the way back is 2 px short up to col 3, then 4 px aside.
    forward, backward = torch.zeros(1, 2, 5, 9), torch.zeros(1, 2, 5, 9)
    forward[:, 0] = 3.0
    backward[:, 0, :, :4] = -1.0
    backward[:, 0, :, 4:], backward[:, 1, :, 4:] = -3.0, 4.0
    valid = torch.zeros(1, 1, 5, 9, dtype=torch.bool)
    valid[..., 0:4] = True  # these come out at cols 3 to 6
    cycle = cycle_error(forward, backward, valid)
    assert cycle.mean == (2 + 3 * 4) / 4 and cycle.p95 == 4.0
    # The inverse is -3 px everywhere, and what counts are the pixels of src.
    swap = swap_error(forward, backward, valid.roll(1, dims=-1))
    assert swap.mean == (3 * 2 + 4) / 4 and swap.p95 == 4.0


def test_agreement_without_a_valid_pixel_is_unknown():
    field = torch.zeros(1, 2, 5, 9)
    nothing = torch.zeros(1, 1, 5, 9, dtype=torch.bool)
    assert math.isnan(cycle_error(field, field, nothing).mean)
    assert math.isnan(swap_error(field, field, nothing).p95)


def test_a_ring_goes_around_a_defect_in_all_directions():
    defects = torch.zeros(1, 1, 7, 9, dtype=torch.bool)
    defects[..., 3, 4:6] = True
    expected = torch.zeros_like(defects)
    expected[..., 1:6, 2:8] = True
    expected[..., 3, 4:6] = False
    torch.testing.assert_close(ring(defects, 2), expected)
    assert not ring(torch.zeros_like(defects), 2).any()


def test_determinant_of_a_linear_field_by_hand():
    rows, cols = torch.meshgrid(torch.arange(6.0), torch.arange(9.0), indexing="ij")
    field = torch.stack([0.5 * cols + 0.1 * rows, 0.2 * cols - 0.25 * rows])[None]
    expected = torch.full((1, 1, 4, 7), 1.5 * 0.75 - 0.1 * 0.2)
    torch.testing.assert_close(jacobian_determinant(field), expected)


def test_a_field_that_turns_back_is_a_fold():
    cols = torch.arange(10.0).expand(6, 10)
    field = torch.stack([-1.5 * cols, torch.zeros(6, 10)])[None]
    assert (
        fold_fraction(field) == 1.0 and fold_fraction(torch.zeros(1, 2, 6, 10)) == 0.0
    )


def test_percentiles_of_the_determinant_by_hand():
    # Along cols the field grows by 0.5 a pixel, but in a band it falls by 2.
    steps = torch.full((103,), 0.5)
    steps[50:60] = -2.0
    cols = torch.cumsum(steps, 0).expand(6, 103)
    field = torch.stack([cols, torch.zeros(6, 103)])[None]
    valid = torch.ones(1, 1, 6, 103, dtype=torch.bool)
    valid[..., 90:] = False  # leaves cols 1 to 89

    found = jacobian(field, valid)

    # Central differences: -1 in 9 cols, 1 + (0.5 - 2) / 2 at both ends of the band.
    assert math.isclose(found.folds, 9 / 89)
    assert (found.p01, found.p50, found.p99) == (-1.0, 1.5, 1.5)
    assert math.isnan(jacobian(field, ~torch.ones_like(valid)).p50)
