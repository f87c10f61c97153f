"""Mips made band by band against those of whole sections."""

import numpy as np
import pytest
import torch

from metroem.geometry.grid import Grid
from metroem.imaging.normalize import coarsen_image, round_greys
from metroem.io.mip_bands import MipBands


def sections(n, rows, cols, dtype=np.uint8):
    """Sections with holes of 0."""
    rng = np.random.default_rng(3)
    made = rng.integers(1, 255, (n, rows, cols)).astype(dtype)
    made[:, rows // 3 : rows // 2, cols // 4 : cols // 2] = 0
    return made


def collect(bands, whole, widths, area):
    """The mips that come of bands of some widths, by mip; blocks put together."""
    made, start = {}, 0
    for width in widths:
        for block, grid in bands.add(whole[..., start : start + width]):
            made.setdefault(grid.mip, []).append((grid, block[:, 0]))
        start += width
    assert start == whole.shape[-1]
    for blocks in made.values():
        for (before, _), (after, _) in zip(blocks, blocks[1:], strict=False):
            assert before.end[1] == after.y and before.x == after.x
    return {m: np.concatenate([b for _, b in bs], -1) for m, bs in made.items()}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("widths", [[61], [20, 20, 21], [7] * 8 + [5], [1] * 61])
def test_bands_of_any_width_give_the_mips_of_whole_sections(widths, dtype):
    whole = sections(2, 45, 61, dtype)
    area = Grid(0, 0, 0, 45, 61)
    made = collect(MipBands(area, range(4), 16), whole, widths, area)
    images = torch.from_numpy(whole.astype(np.float32))[:, None]
    for mip in range(4):
        truth = round_greys(coarsen_image(images, mip), np.dtype(dtype))[:, 0]
        assert made[mip].dtype == dtype
        np.testing.assert_array_equal(made[mip], truth)


def test_blocks_are_whole_chunks_but_for_the_last():
    bands = MipBands(Grid(0, 0, 0, 10, 50), range(2), 16)
    widths = {0: [], 1: []}
    for start in range(0, 50, 10):
        for block, grid in bands.add(sections(1, 10, 50)[..., start : start + 10]):
            widths[grid.mip].append(block.shape[-1])
    assert sum(widths[0]) == 50 and sum(widths[1]) == 25
    for sizes in widths.values():
        assert all(size % 16 == 0 for size in sizes[:-1])


def test_an_area_that_begins_at_an_odd_pixel_keeps_the_grid_of_the_volume():
    # Pixels 3...8 along x and 5...9 along y: mip 1 has 1...4 and 2...4.
    whole = np.arange(1, 31, dtype=np.float32).reshape(1, 6, 5)
    bands = MipBands(Grid(0, 3, 5, 6, 5), range(1, 2), 64)
    ((block, grid),) = bands.add(whole)
    assert (grid.x >> 1, grid.y >> 1, grid.shape) == (1, 2, (4, 3))
    assert block[0, 0, 0, 0] == whole[0, 0, 0]  # alone in its pixel
    assert block[0, 0, 1, 1] == whole[0, 1:3, 1:3].mean()
    assert block[0, 0, 0, 1] == whole[0, 0, 1:3].mean()
    assert block[0, 0, 3, 2] == whole[0, 5, 3:5].mean()


def test_no_data_stays_0_in_all_mips_and_darkens_nothing():
    whole = np.full((1, 32, 48), 200, np.uint8)
    whole[0, :16, :16] = 0
    whole[0, 20, 20] = 0
    for block, grid in MipBands(Grid(0, 0, 0, 32, 48), range(4), 64).add(whole):
        end = 16 >> grid.mip
        assert (block[0, 0, :end, :end] == 0).all()
        assert set(np.unique(block)) == {0, 200}


def test_nan_is_no_data_in_coarser_mips():
    whole = np.full((1, 4, 4), 7.0, np.float32)
    whole[0, 0, 0] = np.nan
    ((block, _),) = MipBands(Grid(0, 0, 0, 4, 4), range(1, 2), 64).add(whole)
    np.testing.assert_array_equal(block, np.full((1, 1, 2, 2), 7.0))
