"""What of a field is smooth, against fields of which it is known."""

import math

import pytest
import torch

from metroem.geometry.field import pixel_positions
from metroem.geometry.regularize import smooth_field

ROWS, COLS, DEVIATION_PX = 90, 137, 16.0


def grid(rows=ROWS, cols=COLS):
    col, row = pixel_positions(torch.zeros(1, 2, rows, cols)).split(1, 1)
    return row, col


def affine():
    row, col = grid()
    return torch.cat((0.03 * row - 0.02 * col + 4, 0.01 * row + 0.05 * col - 2), 1)


EVERYWHERE = torch.ones(1, 1, ROWS, COLS)


def test_an_affine_field_stays_what_it_is_up_to_the_borders():
    found = smooth_field(affine(), EVERYWHERE, DEVIATION_PX)
    torch.testing.assert_close(found, affine(), atol=1e-3, rtol=0)


def test_an_affine_field_goes_on_where_nothing_counts():
    weight = EVERYWHERE.clone()
    weight[..., 100:] = 0
    spoiled = torch.where(weight > 0, affine(), 1e4)
    found = smooth_field(spoiled, weight, DEVIATION_PX)
    torch.testing.assert_close(found[..., :110], affine()[..., :110], atol=0.05, rtol=0)
    assert found.isfinite().all()


def test_nothing_counts():
    found = smooth_field(affine(), 0 * EVERYWHERE, DEVIATION_PX)
    assert torch.equal(found, torch.zeros_like(found))


def test_waves_are_damped_by_the_gaussian():
    row, _ = grid(400, 44)
    middle = slice(150, 250)
    for wavelength in (40.0, 100.0, 300.0):
        phase = 2 * math.pi / wavelength
        wave = torch.sin(phase * row).repeat(1, 2, 1, 1)
        weight = torch.ones_like(wave[:, :1])
        found = smooth_field(wave, weight, DEVIATION_PX)[..., middle, :]
        # Far from borders the plane's value is the Gaussian mean.
        expected = math.exp(-0.5 * (phase * DEVIATION_PX) ** 2) * wave[..., middle, :]
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_pixels_count_by_their_weight():
    # Two fields interleaved by cols, of which the second counts a third.
    field = torch.zeros(1, 2, ROWS, COLS)
    field[..., ::2] = 4
    weight = torch.where(torch.arange(COLS) % 2 == 0, 1.0, 1 / 3).expand(
        1, 1, ROWS, COLS
    )
    found = smooth_field(field, weight, DEVIATION_PX)[..., 32:-32]
    torch.testing.assert_close(found, torch.full_like(found, 3.0), atol=0.01, rtol=0)


@pytest.mark.parametrize("deviation_px", [0.5, 2.0, 500.0])
def test_any_deviation_fits(deviation_px):
    found = smooth_field(affine(), EVERYWHERE, deviation_px)
    torch.testing.assert_close(found, affine(), atol=0.05, rtol=0)


def test_each_pair_of_a_batch_is_smoothed_by_itself():
    fields = torch.cat((affine(), torch.zeros_like(affine()), affine().flip(1)))
    weight = EVERYWHERE.repeat(3, 1, 1, 1)
    weight[2, ..., :40] = 0
    found = smooth_field(fields, weight, DEVIATION_PX)
    for i in range(3):
        alone = smooth_field(fields[i : i + 1], weight[i : i + 1], DEVIATION_PX)
        torch.testing.assert_close(found[i : i + 1], alone)
