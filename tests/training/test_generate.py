"""Fields of a stage; what comes before and after them is in tests/test_train.py."""

from types import SimpleNamespace

import torch

from metroem.grid import Grid
from metroem.nets.options import AlignerOptions
from metroem.prediction import Alignment
from metroem.tiles import Tiling
from metroem.training.generate import _field_of


def test_large_sections_are_shown_to_the_network_tile_by_tile():
    grid, shape = Grid(0, 0, 0, 3, 5), (1, 1, 3, 5)

    class Recorder:
        options = AlignerOptions(finetune_iter=7)

        def align_pair(self, src, tgt, prior, *, options, defects):
            assert options.finetune_iter == 7 and options.tiling == Tiling()
            return Alignment(torch.full((1, 2, 3, 5), 1.5), None)

    images = SimpleNamespace(grid=lambda index: grid)
    sources = SimpleNamespace(images=images, target=images)
    sample = SimpleNamespace(
        src=torch.ones(shape),
        tgt=torch.ones(shape),
        prior_field=None,
        src_defects=None,
        tgt_defects=None,
    )
    field, _ = _field_of(Recorder(), sources, sample, 0)  # type: ignore[arg-type]
    assert (field == 1.5).all() and field.shape == (2, 3, 5)
