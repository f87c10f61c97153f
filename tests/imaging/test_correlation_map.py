"""How alike two images are around each pixel, by formula."""

import pytest
import torch

from metroem.imaging.correlation_map import correlation_map
from tests.pairs import white_noise

ROWS, COLS = 96, 144


def test_equal_sections_correlate_fully_whatever_their_contrast():
    one = white_noise(ROWS, COLS, 0)

    alike = correlation_map(one, 0.5 * one + 0.2)

    assert alike.shape == (1, 1, ROWS, COLS)
    assert float(alike.min()) > 0.99 and float(alike.max()) <= 1


def test_noise_lowers_the_correlation_by_its_formula_and_inversion_gives_none():
    one, noise = white_noise(ROWS, COLS, 0), white_noise(ROWS, COLS, 1)
    for part in (0.5, 1.0):
        # Of x and x + n, independent, it is 1 / sqrt(1 + var(n) / var(x)).
        alike = correlation_map(one, one + part * noise)
        assert float(alike.mean()) == pytest.approx((1 + part**2) ** -0.5, abs=0.03)
    assert float(correlation_map(one, -one).max()) == 0


def test_correlation_is_0_where_one_section_has_no_data():
    one, other = white_noise(ROWS, COLS, 0), white_noise(ROWS, COLS, 0)
    other[..., : COLS // 2] = 0

    alike = correlation_map(one, other)

    assert float(alike[..., : COLS // 2 - 40].max()) == 0
    assert float(alike[..., COLS // 2 + 40 :].min()) > 0.99


def test_kernels_are_made_on_the_device_of_the_images(monkeypatch):
    made, arange = [], torch.arange

    def spy(*sizes, **options):
        made.append(options.get("device"))
        return arange(*sizes, **options)

    monkeypatch.setattr(torch, "arange", spy)
    image = torch.ones(1, 1, 40, 56)

    correlation_map(image, image)

    # A kernel of the default device cannot be used with images on a GPU.
    assert made and all(device == image.device for device in made)
