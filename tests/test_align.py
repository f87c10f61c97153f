import numpy as np
import pytest
import torch

from metroem import Pyramid
from metroem.errors import MetroEMError
from metroem.field import warp
from metroem.scaffold import init_pyramid
from tests.pairs import texture

ROWS, COLS = 101, 147  # divisible by nothing


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    path = tmp_path_factory.mktemp("align") / "pyramid"
    init_pyramid(path, [2, 1, 0])
    return Pyramid.load(path)


def pair(d_cols, d_rows):
    """uint8 src and tgt: tgt(p) = src(p + (d_rows, d_cols))."""
    src = texture(ROWS + 3, COLS + 1, seed=3)
    field = torch.zeros(1, 2, *src.shape[-2:])
    field[:, 0], field[:, 1] = d_cols, d_rows
    tgt = warp(src, field, padding="border")
    return (i[0, 0, :ROWS, :COLS].round().byte().numpy() for i in (src, tgt))


def test_a_known_shift_is_found_at_any_size(pyramid):
    src, tgt = pair(d_cols=4.0, d_rows=-2.5)
    field = pyramid.align(src, tgt)
    assert field.shape == (2, ROWS, COLS) and field.dtype == np.float32
    inner = field[:, 20:-20, 20:-20]
    assert np.median(inner[0]) == pytest.approx(4.0, abs=0.5)
    assert np.median(inner[1]) == pytest.approx(-2.5, abs=0.5)


def test_there_is_a_field_of_each_stage_at_the_mip_of_the_images(pyramid):
    fields = pyramid.fields(*pair(2.0, 1.0), finetune=False)
    assert [f.shape for f in fields] == 3 * [(2, ROWS, COLS)]


def test_a_blank_image_gives_no_displacement(pyramid):
    src, tgt = pair(2.0, 1.0)
    assert not pyramid.align(src, 0 * tgt).any()


def test_what_cannot_be_aligned_is_refused(pyramid):
    src, tgt = pair(2.0, 1.0)
    with pytest.raises(MetroEMError, match="of the same shape"):
        pyramid.align(src, tgt[:-1])
    with pytest.raises(MetroEMError, match="images at mip 0 or finer"):
        pyramid.align(src, tgt, mip=1)
