"""Sections whose displacement is known exactly, and volumes of them."""

import numpy as np

from metroem.io.volume_write import write_volume

_NUM_WAVES = 120


def waves(rows, cols, shift=(0.0, 0.0), seed=0):
    """A sum of waves in all directions, moved by `shift` px along rows and cols.

    Returns:
        (rows, cols) float32, 1 to 255: what lies at p without a shift lies at p +
        shift.
    """
    generator = np.random.default_rng(seed)
    angle = generator.uniform(0, np.pi, _NUM_WAVES)
    pace = 2 * np.pi / generator.uniform(5, 40, _NUM_WAVES)
    phase = generator.uniform(0, 2 * np.pi, _NUM_WAVES)
    along_rows = np.arange(rows)[:, None] - shift[0]
    along_cols = np.arange(cols)[:, None] - shift[1]
    # cos(a + b), as a product of matrices.
    a = along_rows * (pace * np.cos(angle)) + phase
    b = along_cols * (pace * np.sin(angle))
    total = np.cos(a) @ np.cos(b).T - np.sin(a) @ np.sin(b).T
    return np.clip(128 + 5 * total, 1, 255).astype(np.float32)


def write_sections(folder, sections, *, mips=1, **more):
    """Write sections (n, H, W) as uint8, and return the path of the volume."""
    array = np.rint(np.stack(list(sections))).astype(np.uint8)
    write_volume(folder, array, mips, chunk_px=64, **more)
    return str(folder)
