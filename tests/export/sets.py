"""Make field sets and their images for tests to export."""

import numpy as np

from metroem.__main__ import main
from metroem.geometry.grid import Grid
from metroem.io.h5 import (
    FieldSet,
    FieldSetMeta,
    ImageSetMeta,
    Pair,
    PairLocation,
    write_field_set,
    write_image_set,
)

# x and y differ, so that swapped axes cannot pass.
RESOLUTION = (4, 6, 40)
ROWS, COLS = 40, 56
MIP = 1


def make_sets(
    folder,
    *,
    x=64,
    y=-32,
    z=5,
    num_pairs=3,
    downloaded=False,
    offsets=None,
    resolution=RESOLUTION,
    tag="checkpoint",
    mip=MIP,
    vectors=None,
):
    """Write an image set and its field set at a location; return the field set.

    Args:
        folder: for the files.
        x: corner, mip-0 pixels.
        y: corner, mip-0 pixels.
        z: src section of the first pair.
        num_pairs: how many.
        downloaded: whether tgt has a field too; a section has the same field as
            src and as tgt.
        offsets: by z, (x, y) that its images were moved by.
        resolution: stated by the files, or None.
        tag: checkpoint or suffix.
        mip: of both.
        vectors: the field by z; None: `random_vectors` makes them.
    """
    vectors = vectors or random_vectors
    grid = Grid(mip, x, y, ROWS, COLS)
    moved = offsets or dict.fromkeys(range(z - 1, z + num_pairs), (0, 0))
    pairs = [(at, at - 1) for at in range(z, z + num_pairs)]
    frames = [PairLocation(grid, (a, b), (moved[a], moved[b])) for a, b in pairs]
    name = f"x{x}_y{y}_z{z}"
    write_image_set(
        folder / f"{name}_MIP{mip}.h5",
        [Pair(image(a), image(b)) for a, b in pairs],
        ImageSetMeta(frames, "test", "", {}, resolution),
    )
    if downloaded:
        fields = [np.stack([vectors(a), vectors(b)]) for a, b in pairs]
    else:
        fields = [vectors(a) for a, _ in pairs]
        frames = [PairLocation(grid, pair) for pair in pairs]
    path = folder / f"field_0_{name}_MIP{mip}_{tag}.h5"
    sides = 2 if downloaded else 1
    # Fields that training writes do not say their resolution.
    stated = resolution if downloaded else None
    meta = FieldSetMeta(frames, "test", "", {}, stated, tag=tag, num_sides=sides)
    write_field_set(path, fields, meta)
    return FieldSet(path)


def image(z):
    """Make an image of a section: (ROWS, COLS), nowhere 0."""
    random = np.random.default_rng(1000 + z)
    return random.uniform(0.5, 2, (ROWS, COLS)).astype(np.float32)


def random_vectors(z):
    """Make a field of a section: (2, ROWS, COLS), px, larger along rows than cols."""
    random = np.random.default_rng(z)
    sizes = np.array([3, 7])[:, None, None]
    return (random.uniform(-1, 1, (2, ROWS, COLS)) * sizes).astype(np.float32)


def export(folder, dst, *flags):
    main(
        ["export-fields", "--dataset_path", str(folder), "--dst_path", str(dst)]
        + [str(flag) for flag in flags]
    )
