"""Fields of a stage; what comes before and after them is in tests/test_train.py."""

from types import SimpleNamespace

import torch

from metroem.grid import Grid
from metroem.nets.options import AlignerOptions
from metroem.prediction import Alignment
from metroem.tiles import Tiling
from metroem.training.generate import _field_of, _meta


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


def test_fields_state_the_resolution_of_their_images():
    grid = Grid(0, 0, 0, 3, 5)
    target = SimpleNamespace(
        grid=lambda index: grid,
        sections=lambda index: (2, 1),
        num_pairs=1,
        resolution=(4.0, 6.0, 40.0),
    )
    module = SimpleNamespace(stage=0)
    job = SimpleNamespace(weights="weights", module=module, checkpoint_name="a")
    meta = _meta(job, target, {"weights_sha256": ""})  # type: ignore[arg-type]
    assert meta.attributes()["resolution"] == [4, 6, 40]
