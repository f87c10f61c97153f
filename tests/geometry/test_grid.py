import pytest

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid


def test_rows_run_along_x_and_cols_along_y():
    grid = Grid(2, 100, -40, 8, 5)
    assert grid.shape == (8, 5)
    assert grid.end == (132, -20)
    assert grid.center == (116, -30)


def test_a_crop_lies_where_its_pixels_lie():
    assert Grid(1, 10, 20, 30, 40).crop(3, 4, 5, 6) == Grid(1, 16, 28, 5, 6)


def test_a_grid_at_another_mip_covers_the_same_area():
    grid = Grid(1, 4, 8, 7, 6)
    assert grid.at_mip(0) == Grid(0, 4, 8, 14, 12)
    assert grid.at_mip(3) == Grid(3, 4, 8, 2, 2)
    assert grid.at_mip(3).covers(grid) and not grid.covers(grid.at_mip(3))


def test_a_grid_without_pixels_is_refused():
    with pytest.raises(DatasetError, match="rows=0"):
        Grid(0, 0, 0, 0, 4)


def test_a_cover_lies_on_whole_pixels_of_its_mip():
    # Mip-0 pixels -6...10 and 8...20 lie within -8...12 and 8...20 of mip 2.
    grid = Grid(1, -6, 8, 8, 6)
    assert grid.cover(2) == Grid(2, -8, 8, 5, 3)
    assert grid.cover(2, margin_px=1) == Grid(2, -12, 4, 7, 5)
    assert grid.cover(0) == Grid(0, -6, 8, 16, 12)
