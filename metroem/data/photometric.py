"""Change how a section was imaged: contrast, shading, noise, blur.

Pure functions on one normalised image (1, 1, H, W), 0 = no data. Only
`augment_photometric` and `defocus` keep "no data" at 0; the steps that they call do
not.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from metroem.data.paint_defects import CurvedLine
from metroem.data.random_maps import pixel_grid, texture_noise, uniform
from metroem.imaging.normalize import DARKEST, keep_no_data, normalize
from metroem.specs.augmentations import Defocus, Photometric

# A defocused band fades over this fraction of its width.
_FADE = 0.15


def augment_photometric(
    image: Tensor, options: Photometric, generator: Generator
) -> Tensor:
    """Show the same tissue as another microscope would, or as on another day.

    The image is blurred, then its grey levels are changed, then shading and noise are
    added. The grey curves clip to -4...4. The image is normalised again over its
    tissue, and is 0 exactly where it was 0 before. Normalising undoes contrast and
    brightness, except that they change what is clipped, how far gamma bends the greys,
    and how strong the noise is.

    Args:
        image: (1, 1, H, W), normalised, 0 = no data.
        options: largest strengths.
        generator: random number generator.

    Returns:
        (1, 1, H, W).
    """

    def strength(largest: float, lowest: float = 0.0) -> float:
        return largest * uniform(lowest, 1, generator)

    changed = blur(image, strength(options.blur))
    changed = change_contrast(changed, math.exp(strength(options.contrast, -1)))
    changed = changed + strength(options.brightness, -1)
    changed = adjust_gamma(changed, math.exp(strength(options.gamma, -1)))
    changed = add_shading(changed, strength(options.shading), generator)
    changed = add_noise(changed, strength(options.noise), generator)
    return normalize(keep_no_data(changed, image))


def defocus(image: Tensor, options: Defocus, generator: Generator) -> Tensor:
    """Blur a band along a curved line, then normalise again.

    Args:
        image: (1, 1, H, W), normalised, 0 = no data.
        options: largest blur and width.
        generator: random number generator.

    Returns:
        (1, 1, H, W), 0 exactly where it was 0 before.
    """
    shape = (image.shape[-2], image.shape[-1])
    line = CurvedLine.random(shape, generator)
    width = options.width_px * uniform(0.3, 1, generator)
    inside = width / 2 - line.distance(*pixel_grid(shape)).abs()
    band = torch.sigmoid(inside / (_FADE * width / 2))
    blurred = blur(image, options.sigma_px * uniform(0.3, 1, generator))
    return normalize(keep_no_data(torch.lerp(image, blurred, band), image))


def change_contrast(image: Tensor, factor: float) -> Tensor:
    """Scale grey levels about their mean, and clip them to DARKEST...-DARKEST."""
    return (factor * image).clamp(DARKEST, -DARKEST)


def adjust_gamma(image: Tensor, gamma: float) -> Tensor:
    """Raise grey levels to a power, as a fraction of the range DARKEST...-DARKEST."""
    fraction = (image / -DARKEST + 1) / 2
    return (2 * fraction.clamp(0, 1) ** gamma - 1) * -DARKEST


def add_shading(image: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Brighten and darken areas of a third of the image and more."""
    shape = (image.shape[-2], image.shape[-1])
    return image + deviation * texture_noise(shape, max(shape) / 3, generator)


def add_noise(image: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Add independent Gaussian noise to each pixel."""
    return image + deviation * torch.randn(image.shape, generator=generator)


def blur(image: Tensor, sigma_px: float) -> Tensor:
    """Blur by a Gaussian that averages tissue only.

    Args:
        image: (1, 1, H, W), 0 = no data.
        sigma_px: deviation of the Gaussian, px; below 0.1 the image is unchanged.
    """
    if sigma_px < 0.1:
        return image
    tissue = image != 0
    blurred = _smooth(image, sigma_px)
    if bool(tissue.all()):
        return blurred
    # "No data" counted as 0 above: divide by the weight of the tissue.
    return blurred / _smooth(tissue.float(), sigma_px).clamp(min=1e-3)


def _smooth(image: Tensor, sigma_px: float) -> Tensor:
    radius = math.ceil(3 * sigma_px)
    offsets = torch.arange(-radius, radius + 1.0)
    kernel = torch.exp(-0.5 * (offsets / sigma_px) ** 2)
    weights = (kernel / kernel.sum()).tolist()
    padded = F.pad(image, (radius,) * 4, mode="replicate")
    return _convolve(_convolve(padded, weights, -1), weights, -2)


def _convolve(image: Tensor, weights: list[float], dim: int) -> Tensor:
    """Convolve along one axis, without its border.

    The taps are added one by one: conv2d takes five times as long for one channel and
    a blur of 1 px (256 px, one thread, 2026-11).
    """
    size = image.shape[dim] - len(weights) + 1
    total = image.narrow(dim, 0, size) * weights[0]
    for start, weight in enumerate(weights[1:], 1):
        total.add_(image.narrow(dim, start, size), alpha=weight)
    return total
