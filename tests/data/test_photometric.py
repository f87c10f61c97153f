import math

import pytest
import torch
from msgspec.structs import replace

from metroem.data.photometric import (
    add_noise,
    add_shading,
    adjust_gamma,
    augment_photometric,
    blur,
    change_contrast,
    defocus,
)
from metroem.data.sample import seeded_generator
from metroem.imaging.normalize import normalize
from metroem.specs.augmentations import Defocus, Photometric

ROWS, COLS = 120, 168
NOTHING = Photometric(
    contrast=0, brightness=0, gamma=0, shading=0, noise=0, blur=0, prob=1
)


@pytest.fixture
def image():
    """Normalised noise within 3, with no data in a corner."""
    noise = torch.randn(1, 1, ROWS, COLS, generator=seeded_generator(0, 0))
    noise = noise.clamp(-2.9, 2.9)
    noise[..., :30, :40] = 0
    return normalize(noise)


@pytest.mark.parametrize(
    ("change", "options"), [(augment_photometric, Photometric()), (defocus, Defocus())]
)
@pytest.mark.parametrize("seed", range(3))
def test_an_image_stays_normalised_and_its_no_data_too(image, change, options, seed):
    before, random_state = image.clone(), torch.get_rng_state()
    changed = change(image, options, seeded_generator(seed))
    assert torch.equal(image, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(changed == 0, image == 0)
    tissue = changed[changed != 0]
    # Clamping at -4 shifts them a little.
    assert abs(tissue.mean()) < 0.02 and abs(tissue.std() - 1) < 0.02
    assert not torch.equal(changed, image)
    assert torch.equal(changed, change(image, options, seeded_generator(seed)))
    other = change(image, options, seeded_generator(seed + 10))
    assert not torch.equal(changed, other)


def test_strengths_of_0_leave_an_image_as_it_was(image):
    changed = augment_photometric(image, NOTHING, seeded_generator(1))
    torch.testing.assert_close(changed, image, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("gamma", 0.5), ("shading", 1), ("noise", 1), ("blur", 2)],
)
def test_each_strength_changes_an_image_on_its_own(image, key, value):
    options = replace(NOTHING, **{key: value})
    changed = augment_photometric(image, options, seeded_generator(1))
    assert (changed - image).abs().max() > 0.1


@pytest.mark.parametrize("key", ["contrast", "brightness"])
def test_contrast_and_brightness_tell_before_the_curve_and_the_noise(image, key):
    # On their own they are normalised away.
    others = replace(NOTHING, gamma=0.5, noise=0.5)
    both = replace(others, **{key: 0.5})
    without, changed = (
        augment_photometric(image, o, seeded_generator(1)) for o in (others, both)
    )
    assert (changed - without).abs().max() > 0.05


def test_contrast_is_a_factor_up_to_the_ends_of_the_range():
    greys = torch.tensor([-3.0, -1.0, 0.5, 2.0, 3.5])
    expected = torch.tensor([-4.0, -1.5, 0.75, 3.0, 4.0])
    torch.testing.assert_close(change_contrast(greys, 1.5), expected)


def test_gamma_bends_greys_between_fixed_ends():
    greys = torch.tensor([-5.0, -4.0, 0.0, 4.0])
    # Half of the range to the power of 2 is a quarter of it: -4 + 8 / 4.
    expected = torch.tensor([-4.0, -4.0, -2.0, 4.0])
    torch.testing.assert_close(adjust_gamma(greys, 2.0), expected)
    within = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(adjust_gamma(within, 1.0), within)


def test_noise_has_the_deviation_asked_for():
    noise = add_noise(torch.zeros(1, 1, 300, 400), 0.4, seeded_generator(3))
    # The deviation of n samples is off by 1 / sqrt(2 n): 0.2 %; five of these.
    assert abs(noise.std() - 0.4) < 0.4 * 5 / math.sqrt(2 * noise.numel())
    assert abs(noise.mean()) < 5 * 0.4 / math.sqrt(noise.numel())


def test_shading_is_slow():
    shading = add_shading(torch.zeros(1, 1, ROWS, COLS), 0.5, seeded_generator(3))
    assert 0.1 < shading.std() < 1
    # Knots are 56 px apart and differ by a few deviations.
    steps = (shading[..., 1:] - shading[..., :-1]).abs().max()
    assert steps < 8 * 0.5 / 56


def test_blur_of_a_point_is_a_gaussian():
    point = torch.full((1, 1, 41, 61), 1e-9)
    point[..., 20, 30] = 1
    blurred = blur(point, 2.0)[0, 0]
    rows, cols = torch.meshgrid(
        torch.arange(41) - 20, torch.arange(61) - 30, indexing="ij"
    )
    expected = torch.exp(-(rows**2 + cols**2) / 8) / (8 * math.pi)
    # Cut at 3 deviations, so 0.3 % are missing on each axis.
    torch.testing.assert_close(blurred, expected, atol=0.01 * 0.04, rtol=0)


def test_blur_does_not_mix_tissue_with_no_data():
    image = torch.full((1, 1, 40, 60), 2.0)
    image[..., :17] = 0
    blurred = blur(image, 3.0)
    torch.testing.assert_close(blurred[..., 17:], image[..., 17:])


@pytest.mark.parametrize("seed", range(3))
def test_defocus_blurs_a_band_alone(image, seed):
    options = Defocus(sigma_px=4, width_px=40)
    changed = defocus(image, options, seeded_generator(seed))

    def sharpness(of):
        steps = (of[..., 1:] - of[..., :-1]).square()
        return torch.nn.functional.avg_pool2d(steps, 9, stride=1)

    share = sharpness(changed) / sharpness(image).clamp(min=0.1)
    assert share.min() < 0.2  # in the band
    assert share.max() > 0.95  # off it, and normalised again
    # What is blurred much is not more than the widest band could be.
    assert (share < 0.5).float().mean() < 1.3 * math.hypot(
        ROWS, COLS
    ) * 40 / ROWS / COLS
