from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metroem import Pyramid
from metroem.data.sample import Sample
from metroem.errors import MetroEMError
from metroem.geometry.field import warp
from metroem.geometry.grid import Grid
from metroem.models.module_folders import init_pyramid
from metroem.models.options import AlignerOptions
from metroem.pyramid import StageInput
from metroem.synthetic.distortion import Distortion, random_field
from metroem.synthetic.tissue import TissueRecipe, make_tissue
from tests.pairs import texture

ROWS, COLS = 101, 147  # divisible by nothing


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    path = tmp_path_factory.mktemp("align") / "pyramid"
    # Untrained, it leaves all to the finetuner.
    init_pyramid(path, [2, 1, 0], "scalenet")
    torch.manual_seed(0)
    return Pyramid.load(path, checkpoint_name=None)


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


@pytest.mark.parametrize("mips", [(2, 0), (1,), (2, 1, 0)])
def test_pretrained_networks_find_a_known_warp_of_tissue_never_seen(mips):
    rows, cols = 256, 320
    (tissue,) = make_tissue(TissueRecipe(1, rows, cols, seed=11))
    distortion = Distortion(peak_px=(8.0, 8.0), shift_px=5.0)
    field = random_field(np.random.default_rng(0), (rows, cols), distortion)
    tgt = warp(torch.from_numpy(tissue).float()[None, None], field)[0, 0].numpy()
    pyramid = Pyramid.pretrained(mips)

    found = pyramid.align(tissue, tgt, finetune=False)

    assert pyramid.mips == mips
    off = np.hypot(*(found - field[0].numpy()))[24:-24, 24:-24]
    moved = np.hypot(*field[0].numpy())[24:-24, 24:-24]
    assert moved.mean() > 4  # as far off as untrained networks are
    assert off.mean() < 0.5


def test_there_is_a_field_of_each_stage_at_the_mip_of_the_images(pyramid):
    fields = pyramid.fields(*pair(2.0, 1.0), finetune=False)
    assert [f.shape for f in fields] == 3 * [(2, ROWS, COLS)]


def test_confidence_is_high_where_tissue_agrees_and_0_where_there_is_none(pyramid):
    src, tgt = pair(d_cols=2.0, d_rows=1.0)
    other = texture(ROWS, COLS, seed=8)[0, 0].round().byte().numpy()
    tgt[:, 90:] = other[:, 90:]
    tgt[:30] = 0

    field, sure = pyramid.align(src, tgt, confidence=True)

    np.testing.assert_array_equal(field, pyramid.align(src, tgt))
    assert sure.shape == (ROWS, COLS) and sure.dtype == np.float32
    assert 0 <= sure.min() and sure.max() <= 1
    # The untrained networks are 2.2 px off. Of this correction of images that are alike
    # in their half only, 1.6 px or more are kept: it is at most exp(-1.6 / 3) = 0.59.
    assert 0.4 < sure[50:-15, 15:60].mean() < 0.59
    assert sure[50:-15, 110:].mean() < 0.1
    assert not sure[:15].any()


def test_confidence_is_1_for_networks_that_leave_equal_images_alone(pyramid):
    src, _ = pair(0.0, 0.0)
    still = replace(pyramid, aligners=tuple(map(_Still, pyramid.aligners)))

    _, sure = still.align(src, src, finetune=False, confidence=True)
    _, half = still.align(src, src, confidence=True)

    assert sure.min() > 0.99
    # The finetuned field is 3 px from the networks' own: 1 / e. Src is moved by that,
    # so the correlation is less than 1, too.
    assert 0 < half.max() < np.exp(-1)


class _Still:
    """An aligner whose networks find no displacement; its finetuner finds 3 px."""

    def __init__(self, aligner):
        self.options = aligner.options

    def align(self, src, tgt, prior, *, options, defects):
        field = torch.zeros(1, 2, *src.shape[-2:])
        field[:, 0] = 3.0 * options.finetune
        return field


def test_a_blank_image_gives_no_displacement(pyramid):
    src, tgt = pair(2.0, 1.0)
    assert not pyramid.align(src, 0 * tgt).any()


def test_what_cannot_be_aligned_is_refused(pyramid):
    src, tgt = pair(2.0, 1.0)
    with pytest.raises(MetroEMError, match="of the same shape"):
        pyramid.align(src, tgt[:-1])
    with pytest.raises(MetroEMError, match="images at mip 0 or finer"):
        pyramid.align(src, tgt, mip=1)


def test_a_field_goes_from_stage_to_stage_through_where_their_images_lie():
    def stage(align):
        return SimpleNamespace(options=AlignerOptions(), align=align)

    def slope(src, tgt, prior, **_):
        # Grows by 0.25 px a col, and by 0.125 px a row.
        rows, cols = torch.meshgrid(
            *(torch.arange(float(size)) for size in src.shape[-2:]), indexing="ij"
        )
        return torch.stack([cols / 4, rows / 8])[None]

    coarse, fine = Grid(1, -16, 8, 24, 40), Grid(0, 0, 16, 20, 30)
    images = [torch.ones(1, 1, *grid.shape) for grid in (coarse, fine)]
    inputs = [
        StageInput(Sample(image, image, None, ("",)), grid)
        for image, grid in zip(images, (coarse, fine), strict=True)
    ]
    stages = stage(slope), stage(lambda src, tgt, prior, **_: prior)
    pyramid = Pyramid((1, 0), stages, torch.device("cpu"))

    found = pyramid.run(inputs)

    assert [field.shape[-2:] for field in found] == [(24, 40), (20, 30)]
    # Fine pixel (i, j) has its middle at ((i + 0.5 + 16) / 2 - 0.5, (j + 0.5 + 8) /
    # 2 - 0.5) of the coarse ones, and twice their displacement.
    row = (torch.arange(20.0) + 16.5) / 2 - 0.5
    col = (torch.arange(30.0) + 8.5) / 2 - 0.5
    torch.testing.assert_close(found[1][0, 0], (col / 2).expand(20, 30))
    torch.testing.assert_close(found[1][0, 1], (row / 4)[:, None].expand(20, 30))
