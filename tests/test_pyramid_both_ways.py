"""Both fields of a pair at once, and the rows of a section one band at a time."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from metroem.data.augment import swap_src_tgt
from metroem.data.sample import Sample
from metroem.evaluation.metrics import chunked_correlation
from metroem.evaluation.scores import BAND_PX, CHUNK_PX, correlation, warp_rows
from metroem.geometry.field import compose, warp
from metroem.geometry.grid import Grid
from metroem.imaging.normalize import normalize
from metroem.models.module_folders import init_pyramid
from metroem.pyramid import Pyramid, StageInput
from tests.pairs import shifted_pair

ROWS, COLS = 72, 104


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    path = tmp_path_factory.mktemp("both") / "pyramid"
    torch.manual_seed(0)
    init_pyramid(path, [1, 0])
    return Pyramid.load(path, checkpoint_name=None)


@pytest.fixture
def inputs():
    return [
        StageInput(
            Sample(
                *map(normalize, shifted_pair(ROWS >> mip, COLS >> mip, seed=3)),
                None,
                (),
            ),
            Grid(mip, 0, 0, ROWS >> mip, COLS >> mip),
        )
        for mip in (1, 0)
    ]


def swapped(inputs):
    return [StageInput(swap_src_tgt(sample), grid) for sample, grid in inputs]


def test_the_forward_fields_are_those_of_the_pair_alone(pyramid, inputs):
    there, back = pyramid.run_both_ways(inputs)
    for one, other in zip(there, pyramid.run(inputs), strict=True):
        assert torch.equal(one, other)
    # The first stage has no prior, and its search is that of the swapped pair.
    alone = pyramid.run(swapped(inputs))
    assert torch.equal(back[0], alone[0])
    # The second starts from another prior, the inverse of the pair's own, and ends
    # within what a search leaves open: 0.016 px of 3 px here, and up to 0.16 px with
    # other fresh weights. Only what was searched once undoes itself: to 0.009 px here,
    # where the field of a search of its own comes to 0.022 px.
    assert (back[1] - alone[1])[..., 8:-8, 8:-8].norm(dim=1).mean() < 0.03
    assert compose(there[1], back[1])[..., 8:-8, 8:-8].norm(dim=1).mean() < 0.015


def test_each_direction_is_searched_once(pyramid, inputs, monkeypatch):
    calls = []
    aligner = pyramid.aligners[0]
    search = type(aligner)._search_one_way

    def counted(self, *given):
        calls.append(self)
        return search(self, *given)

    monkeypatch.setattr(type(aligner), "_search_one_way", counted)
    pyramid.run_both_ways(inputs)
    assert len(calls) == 2 * len(pyramid.aligners)


def test_networks_alone_are_run_on_the_pair_and_on_the_swapped_one(pyramid, inputs):
    there, back = pyramid.run_both_ways(inputs, finetune=False)
    assert torch.equal(there[1], pyramid.run(inputs, finetune=False)[1])
    assert torch.equal(back[1], pyramid.run(swapped(inputs), finetune=False)[1])


def test_a_pair_with_a_blank_side_keeps_both_priors(pyramid, inputs):
    src = inputs[1].sample.src
    priors = [torch.full((1, 2, ROWS, COLS), px) for px in (2.0, -3.0)]
    aligner = pyramid.aligners[1]
    options = replace(aligner.options, finetune_iter=2)
    found = aligner.align_both_ways(src, 0 * src, tuple(priors), options=options)
    assert all(torch.equal(a, b) for a, b in zip(found, priors, strict=True))


def test_bands_of_rows_give_what_the_whole_gives():
    rows, cols = BAND_PX + 3 * CHUNK_PX // 2, 2 * CHUNK_PX + 9
    src, tgt = shifted_pair(rows, cols, seed=3)
    field = 5 * torch.cat([torch.sin(tgt / 90), torch.cos(src / 70)], 1)
    whole = warp(src, field)
    part = slice(100, 200)
    assert torch.equal(warp_rows(src, field, part), whole[..., part, :])
    valid = src > src.median()
    kept = valid & (warp((src != 0).float(), field) > 0.999)
    alike = chunked_correlation(whole, tgt, kept, chunk_px=CHUNK_PX, min_fraction=0.0)
    share, due = (F.avg_pool2d(m.double(), CHUNK_PX) for m in (kept, valid))
    # What the field has moved out of the tissue counts as unlike.
    expected = torch.minimum(alike, alike * share / due)
    expected = torch.where(due >= 0.2, expected, float("nan"))
    found = correlation(Sample(src, tgt, None, ()), field, valid, min_fraction=0.2)
    assert found.shape == (1, 1, 9, 2)
    torch.testing.assert_close(found, expected, equal_nan=True)
