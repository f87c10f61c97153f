"""Make volumes of known values and specs of pairs, and run make-dataset on them."""

import json
import sys

import numpy as np
import pytest

from metroem.__main__ import main
from metroem.geometry.grid import Grid
from tests.volumes import make_volume

# (Z, C, X, Y) of sections 10...15, x from 64 on and y from -32 on.
SHAPE = (6, 1, 160, 128)
OFFSET = (64, -32, 10)
ROWS, COLS = 48, 32
# Two places, distances of 1 and 2; the last pair has its sides at two places.
PAIRS = [
    [(144, 32, 12), (144, 32, 11)],
    [(144, 32, 12), (144, 32, 10)],
    [(176, 40, 14), (160, 44, 15)],
]
NUM_CUTOUTS = 5


def grid_of(x, y):
    """Centred: 24 px along x and 16 px along y to each side."""
    return Grid(0, x - ROWS // 2, y - COLS // 2, ROWS, COLS)


def stored(sections, z, grid, moved=(0, 0)):
    row, col = grid.x + moved[0] - OFFSET[0], grid.y + moved[1] - OFFSET[1]
    return sections[z - 10, 0, row : row + grid.rows, col : col + grid.cols]


@pytest.fixture
def sections():
    return np.random.default_rng(0).integers(1, 255, SHAPE, dtype=np.uint8)


@pytest.fixture
def volume(tmp_path, sections):
    return make_volume(
        tmp_path / "em", [sections, sections[..., ::2, ::2]], offset=OFFSET
    )


@pytest.fixture
def spec(volume):
    return {
        "image": {"path": volume, "src_mip": 0},
        "masks": [],
        "max_mip": 2,
        "dst_mip": 0,
        "x_size": ROWS,
        "y_size": COLS,
        "pairs": [[dict(zip("xyz", side, strict=True)) for side in p] for p in PAIRS],
    }


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["metroem"])

    def run(spec, *flags, dst="data"):
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        path = dst if "://" in dst else str(tmp_path / dst)
        paths = ["--spec_path", str(tmp_path / "spec.json"), "--dst_path", path]
        main(["make-dataset", *paths, *map(str, flags)])
        return sorted((tmp_path / dst).glob("*.h5"))

    return run


def with_reference(spec, volume):
    spec["image"]["reference"] = {
        "path": volume,
        "src_mip": 0,
        "dst_mip": 1,
        "x_size": 32,
        "y_size": 28,
    }
    return spec


def with_field(spec, tmp_path, *, changed=(2, slice(20, 21), slice(20, 21), np.nan)):
    """Displacements at mip 1, constant over a section: 10 + z along x, -6.5 along y,
    but for those of one area.
    """
    fields = np.zeros((6, 2, 80, 64), np.float32)
    for index in range(6):
        fields[index, 0], fields[index, 1] = -6.5, 20 + index
    index, rows, cols, value = changed
    fields[index, :, rows, cols] = value
    finer = np.zeros((6, 2, 160, 128), np.float32)
    path = make_volume(tmp_path / "field", [finer, fields], offset=OFFSET)
    spec["field"] = {"path": path, "src_mip": 1}
    return spec


def with_mask(spec, tmp_path):
    """Mark one pixel of mip 1 in each section: 2 x 2 px of mip 0 from x 144, y 32."""
    mask = np.zeros((6, 1, 80, 64), np.uint8)
    mask[:, :, 40, 32] = 3
    mask[:, :, 0, 0] = 2
    finer = np.zeros((6, 1, 160, 128), np.uint8)
    path = make_volume(tmp_path / "mask", [finer, mask], offset=OFFSET)
    spec["masks"] = [{"path": path, "src_mip": 1, "threshold": 3}]
    return spec
