"""A crop of a pair that lies askew in its patch: turned by any angle, and zoomed.

Both sections and the prior field are resampled alike, so that the pair stays as
aligned as it was. A network sees less often what it has seen before: trained on 37
sections it erred by 2 % less on others after 30 passes (2026-11).
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from metroem.data.random_maps import pixel_grid, uniform
from metroem.data.sample import Sample
from metroem.geometry.field import sample as sample_map
from metroem.geometry.grid import Grid
from metroem.specs.augmentations import RandomTurn

# A pixel of which more would come from "no data" becomes that.
_MOST_BLANK = 0.4
# Bicubic sampling reads so many pixels around a position.
_REACH = 2


class Rotation(NamedTuple):
    """Where the pixels of a turned crop lie."""

    window: Grid  # holds them all, and what is sampled around them
    positions: Tensor  # (1, 2, h, w): col and row in the pixels of `window`
    matrix: Tensor  # (2, 2), (col, row): a step in the crop as one in `window`


def random_rotation(
    grid: Grid, size: tuple[int, int], options: RandomTurn, generator: Generator
) -> Rotation:
    """A crop of a size that lies anywhere in a grid, at any angle.

    Args:
        grid: of the patch.
        size: (h, w) of the crop, px.
        options: largest zoom. Where a turned crop would not fit into the patch it
            is zoomed in until it does.
        generator: what chance is drawn from.
    """
    angle = uniform(-math.pi, math.pi, generator)
    step = math.exp(uniform(-1.0, 1.0, generator) * math.log(options.zoom))
    cos, sin = math.cos(angle), math.sin(angle)
    turned = (
        size[0] * abs(cos) + size[1] * abs(sin),
        size[0] * abs(sin) + size[1] * abs(cos),
    )
    step = min(step, *((n - 1) / t for n, t in zip(grid.shape, turned, strict=True)))
    centre = [
        uniform(step * t / 2, n - step * t / 2, generator) - 0.5
        for n, t in zip(grid.shape, turned, strict=True)
    ]
    matrix = step * torch.tensor([[cos, -sin], [sin, cos]])
    rows, cols = pixel_grid(size)
    from_centre = (cols - (size[1] - 1) / 2, rows - (size[0] - 1) / 2)
    offsets = torch.stack([offset.expand(size) for offset in from_centre])
    positions = torch.einsum("ij,jhw->ihw", matrix, offsets)[None]
    positions += torch.tensor(centre[::-1]).view(1, 2, 1, 1)
    first = [max(int(positions[:, c].min()) - _REACH, 0) for c in (1, 0)]
    last = [
        min(int(positions[:, c].max()) + 1 + _REACH, n - 1)
        for c, n in zip((1, 0), grid.shape, strict=True)
    ]
    window = grid.crop(*first, *(b - a + 1 for a, b in zip(first, last, strict=True)))
    positions -= torch.tensor(first[::-1]).view(1, 2, 1, 1)
    return Rotation(window, positions, matrix)


def rotate_crop(sample: Sample, turn: Rotation) -> Sample:
    """The crop of a sample that was read from `turn.window`.

    Args:
        sample: (1, ..., H, W) maps, without truth: it is drawn later.
        turn: where the crop lies.
    """
    prior = sample.prior_field
    return sample._replace(
        src=_image(sample.src, turn),
        tgt=_image(sample.tgt, turn),
        prior_field=None if prior is None else _field(prior, turn),
        src_defects=_mask(sample.src_defects, turn),
        tgt_defects=_mask(sample.tgt_defects, turn),
    )


def _image(image: Tensor, turn: Rotation) -> Tensor:
    blank = _sampled((image == 0).float(), turn) > _MOST_BLANK
    return torch.where(blank, 0.0, _sampled(image, turn, mode="bicubic"))


def _mask(mask: Tensor | None, turn: Rotation) -> Tensor | None:
    return None if mask is None else _sampled(mask.float(), turn) > 0.5


def _field(field: Tensor, turn: Rotation) -> Tensor:
    """A displacement of the patch as one of the turned crop."""
    inverse = torch.linalg.inv(turn.matrix)
    return torch.einsum("ij,bjhw->bihw", inverse, _sampled(field, turn))


def _sampled(values: Tensor, turn: Rotation, mode: str = "bilinear") -> Tensor:
    return sample_map(values, values, turn.positions, padding="border", mode=mode)
