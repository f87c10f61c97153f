"""Image sets with fields and masks that tests of the data make."""

import numpy as np

from metroem.data.dataset import find_pairs
from metroem.geometry.grid import Grid
from metroem.io.h5 import (
    FieldSetMeta,
    ImageSetMeta,
    Pair,
    PairLocation,
    write_field_set,
    write_image_set,
)

ROWS, COLS = 40, 56


def write_images(
    folder,
    name,
    *,
    num_pairs=8,
    z=1,
    x=0,
    mip=1,
    change=None,
    defects=None,
    shape=(ROWS, COLS),
):
    """Pixel (i, j) of section z is about z + i / 100 + j / 10000, normalised."""

    def section(number):
        rows, cols = np.meshgrid(*map(np.arange, shape), indexing="ij")
        image = (rows / ROWS + cols / 100 + number / 1000 - 0.7).astype(np.float32)
        return image * 3

    pairs = [Pair(section(z + i), section(z + i - 1)) for i in range(num_pairs)]
    if change:
        pairs = [change(i, pair) for i, pair in enumerate(pairs)]
    frames = [
        PairLocation(Grid(mip, x, 0, *shape), (z + i, z + i - 1))
        for i in range(num_pairs)
    ]
    meta = ImageSetMeta(frames, "test", "", {}, normalization={"kind": "tissue"})
    write_image_set(folder / name, pairs, meta, defects=defects)
    return frames


def one_mask(*area):
    mask = np.zeros((ROWS, COLS), bool)
    mask[area] = True
    return mask


def write_fields(folder, name, frames, *, num_sides=1, value=(0.0, 0.0)):
    """Fields of one vector everywhere, (along cols, along rows)."""
    field = np.zeros((num_sides, 2, ROWS, COLS), np.float32)
    field[:, 0], field[:, 1] = value
    fields = [field[0] if num_sides == 1 else field for _ in frames]
    meta = FieldSetMeta(frames, "test", "", {}, stage=0, tag="ck", num_sides=num_sides)
    write_field_set(folder / name, fields, meta)


def pairs_of(folder, stage=0):
    return find_pairs(folder, 1, stage=stage, checkpoint_name="ck")
