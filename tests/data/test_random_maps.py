import pytest
import torch

from metroem.data.random_maps import (
    bernoulli,
    pixel_grid,
    smooth_noise,
    texture_noise,
    uniform,
)
from metroem.data.sample import seeded_generator


def test_numbers_lie_within_their_range():
    generator = seeded_generator(0)
    drawn = [uniform(-2, 3, generator) for _ in range(300)]
    assert -2 <= min(drawn) < -1.9 and 2.9 < max(drawn) <= 3


def test_what_is_sure_happens_and_what_is_impossible_does_not():
    generator = seeded_generator(0)
    assert all(bernoulli(1, generator) for _ in range(100))
    assert not any(bernoulli(0, generator) for _ in range(100))


@pytest.mark.parametrize("make", [smooth_noise, texture_noise])
def test_noise_varies_over_its_knots(make):
    noise = make((200, 330), 20, seeded_generator(1))
    assert noise.shape == (1, 1, 200, 330)
    assert abs(noise.mean()) < 0.2 and 0.5 < noise.std() < 1
    shifted = [noise[..., d:] - noise[..., : 330 - d] for d in (1, 60)]
    # Neighbours hardly differ; three knots apart, values are independent.
    assert shifted[0].std() < 0.1 * shifted[1].std()


def test_the_grid_says_the_row_and_col_of_each_pixel():
    rows, cols = torch.broadcast_tensors(*pixel_grid((3, 5)))
    assert rows.shape == (3, 5)
    assert (rows[2, 4], cols[2, 4], rows[0, 1], cols[0, 1]) == (2, 4, 0, 1)
