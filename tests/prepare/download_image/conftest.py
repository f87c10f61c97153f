"""Make a volume of known sections, and run download_image.py on it."""

import numpy as np
import pytest

import download_image
from tests.volumes import make_volume

# (Z, C, X, Y) of sections 10...17, x from 64 on and y from -32 on.
SHAPE = (8, 1, 256, 192)
OFFSET = (64, -32, 10)
AREA = ["--x_offset", "96", "--y_offset", "0", "--z_start", "12", "--z_end", "15"]


@pytest.fixture
def sections():
    return np.random.default_rng(0).integers(1, 255, SHAPE, dtype=np.uint8)


@pytest.fixture
def volume(tmp_path, sections):
    coarse = sections[:, :, ::2, ::2]
    return make_volume(tmp_path / "em", [sections, coarse], offset=OFFSET)


@pytest.fixture
def download(tmp_path, volume):
    def run(*flags, cv_path=volume, area=AREA):
        folder = tmp_path / "data"
        common = ["--cv_path", cv_path, "--dst_folder", str(folder), *area]
        download_image.main([*common, *(str(flag) for flag in flags)])
        return sorted(folder.glob("*.h5"))

    return run


def patch(sections, z, rows, cols, x=96, y=0):
    """Stored values of section z at mip 0, in the network's order of axes."""
    row, col = x - OFFSET[0], y - OFFSET[1]
    window = sections[z - OFFSET[2], 0, row : row + rows, col : col + cols]
    return window.astype(np.float32)
