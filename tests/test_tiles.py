"""Large sections cut into tiles, and their fields put together again."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metroem.align import Pyramid
from metroem.aligner import Alignment
from metroem.errors import MetroEMError
from metroem.field_search import Finetuned
from metroem.nets.options import AlignerOptions
from metroem.scaffold import init_pyramid
from metroem.tiles import TilePair, Tiling, align_by_tiles
from tests.pairs import texture

CPU = torch.device("cpu")
TILING = Tiling(512, 256)


def summed(tiling, shape):
    """How much all tiles together count at each pixel."""
    total = torch.zeros(shape)
    for window in tiling.windows(shape):
        total[window.place] += window.weight
    return total


@pytest.mark.parametrize("shape", [(1281, 769), (513, 3), (7, 1999), (512, 512)])
def test_tiles_cover_every_pixel_and_their_weights_sum_to_one(shape):
    torch.testing.assert_close(
        summed(TILING, shape), torch.ones(shape), atol=2e-7, rtol=0
    )


def test_tiles_begin_at_blocks_and_are_never_larger_than_asked_for():
    windows = Tiling(1024, 256).windows((2800, 1793))
    rows, cols = ({one[side].place.start for one in windows} for side in (0, 1))
    assert rows == {0, 768, 1536, 2304} and cols == {0, 768, 1536}
    longest = max(p.stop - p.start for one in windows for p in one.place)
    assert longest == 1024
    assert max(one.cols.place.stop for one in windows) == 1793


def test_a_weight_rises_over_the_middle_half_of_an_overlap():
    first, second = Tiling(512, 256).windows((700, 90))
    # The overlap is rows 256..511, its middle half 320..447: the two are equal at
    # its middle, between rows 383 and 384, and a quarter in, t = 1/4, the second
    # counts 3 t^2 - 2 t^3 = 5 / 32.
    np.testing.assert_allclose(first.rows.weight[[0, 319]], 1)
    assert not second.rows.weight[:64].any()
    assert not first.rows.weight[448:].any()
    np.testing.assert_allclose(second.rows.weight[192:], 1)
    between = (second.rows.weight[127] + second.rows.weight[128]) / 2
    assert between == pytest.approx(0.5)
    quarter = (second.rows.weight[95] + second.rows.weight[96]) / 2
    assert quarter == pytest.approx(5 / 32, abs=1e-4)


@pytest.mark.parametrize("sizes", [(500, 256), (512, 100), (512, 512), (512, 0)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(MetroEMError, match="multiples of 256"):
        Tiling(*sizes)


def test_a_section_is_cut_if_one_side_is_longer_than_a_tile():
    assert not TILING.cuts((512, 512))
    assert TILING.cuts((20, 513)) and TILING.cuts((513, 20))
    assert len(TILING.windows((512, 40))) == 1


class Analytic:
    """Stands in for an aligner: of each pixel of tgt a value that src has there.

    Its "images" hold the coordinates of the section: the field that it returns is
    smooth in those, so that it is the same however the section is cut.
    """

    options = AlignerOptions()

    def __init__(self):
        self.shapes = []

    def align_pair(self, src, tgt, prior=None, *, options=None, defects=(None, None)):
        self.shapes.append(tuple(tgt.shape[-2:]))
        own = torch.cat((torch.sin(tgt / 70), torch.cos(tgt / 90)), 1)
        field = own if prior is None else own + prior
        loss = torch.tensor([2.0])
        return Alignment(field, Finetuned(field, loss, loss / 2, len(self.shapes)))


def coordinates(rows, cols):
    return (1 + torch.arange(rows)[:, None] + torch.arange(cols) / 3)[None, None]


def test_fields_of_tiles_join_to_the_field_of_the_whole():
    image, aligner = coordinates(1100, 650), Analytic()
    slope = torch.cat((image / 1000, image / 2000), 1)  # at most 1.3 px: no shift
    pair = TilePair(image, image, lambda rows, cols: slope[..., rows, cols])

    found = align_by_tiles(aligner, pair, TILING, CPU)

    whole = Analytic().align_pair(image, image, slope).field
    torch.testing.assert_close(found.field, whole, atol=1e-6, rtol=0)
    assert max(rows * cols for rows, cols in aligner.shapes) <= 512**2
    assert len(aligner.shapes) == 4 * 2
    assert found.finetuned is not None
    assert (found.finetuned.loss_before, found.finetuned.loss_after) == (2.0, 1.0)


def test_src_is_cut_from_where_the_prior_points():
    """Far displacements read their tile of src, and its border is the section's."""
    image = coordinates(700, 600)
    prior = torch.zeros(1, 2, 700, 600)
    prior[:, 0], prior[:, 1] = 130.0, -200.0  # 2 and 3 steps of 64 px

    class Reads(Analytic):
        def align_pair(self, src, tgt, prior=None, **_):
            torch.testing.assert_close(prior.mean((0, 2, 3)), torch.tensor([2.0, -8.0]))
            return Alignment(torch.cat((src, tgt), 1) + prior, None)

    pair = TilePair(image, image, lambda rows, cols: prior[..., rows, cols])
    found = align_by_tiles(Reads(), pair, TILING, CPU)

    read = torch.zeros(1, 1, 700, 600)
    read[..., 192:, :472] = image[..., :508, 128:]
    torch.testing.assert_close(found.field[:, :1], read + 130, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.field[:, 1:], image - 200, atol=1e-3, rtol=0)
    assert found.finetuned is None


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiles") / "pyramid"
    init_pyramid(path, [2, 0], "correlation")
    return Pyramid.load(path)


def pair(rows, cols):
    src = texture(rows, cols, seed=3)[0, 0].round().byte().numpy()
    return src, np.roll(src, 1, axis=1)


def test_a_section_smaller_than_a_tile_keeps_its_bits(pyramid):
    src, tgt = pair(140, 180)
    whole = replace(pyramid, tiling=Tiling(4096, 256)).align(src, tgt)
    np.testing.assert_array_equal(pyramid.align(src, tgt), whole)


def test_the_prior_is_kept_in_tiles_without_tissue(pyramid):
    src, tgt = pair(80, 1100)
    tgt = tgt.copy()
    tgt[:, 384:] = 0  # tiles begin at 0, 256, 512 and 768: the last two are blank
    src, tgt = (
        torch.from_numpy(i / 60.0 - 2.0 * (i > 0)).float()[None, None]
        for i in (src, tgt)
    )
    prior = torch.full((1, 2, 80, 1100), 1.5)
    given = TilePair(src, tgt, lambda rows, cols: prior[..., rows, cols])
    aligner = pyramid.aligners[1]
    options = replace(aligner.options, finetune_iter=3)

    found = align_by_tiles(aligner, given, TILING, CPU, options).field

    # Over cols 576 to 703 the last tile with tissue gives way to the first blank one.
    torch.testing.assert_close(found[..., 704:], prior[..., 704:])
    assert (found[..., :384] - 1.5).abs().max() > 0.1  # tissue has been aligned
    steps = (found[..., 1:] - found[..., :-1]).abs()
    assert steps[..., 512:].max() < 0.05
