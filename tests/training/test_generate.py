"""Test the fields of a stage; tests/test_train.py tests the run around them."""

import logging
from types import SimpleNamespace

import pytest
import torch

from metroem.data.sample import Sample
from metroem.geometry.grid import Grid
from metroem.io.h5 import FieldSet, ImageSet
from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from metroem.models.options import AlignerOptions
from metroem.models.tiling import Tiling
from metroem.models.types import Alignment
from metroem.specs.modules import ModuleSpec
from metroem.training.write_fields import (
    WriteFieldsConfig,
    _field_of,
    _meta,
    _Sources,
    write_fields,
)
from metroem.utils.stop_request import StopRequest
from tests.models.specs import without_features, write_spec
from tests.pairs import write_pairs


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


@pytest.mark.parametrize("prior", [None, 2.0])
def test_where_no_field_could_be_made_the_prior_field_is_kept(prior, caplog):
    class Lost:
        options = AlignerOptions()

        def align_pair(self, src, tgt, prior, *, options, defects):
            field = torch.ones(1, 2, 3, 5)
            field[0, 1, 2, 4] = torch.nan
            return Alignment(field, None)

    images = SimpleNamespace(grid=lambda index: Grid(0, 0, 0, 3, 5))
    sources = SimpleNamespace(images=images, target=images)
    given = None if prior is None else torch.full((1, 2, 3, 5), prior)
    image = torch.ones(1, 1, 3, 5)
    sample = Sample(image, image, given, ("the pair",))
    field, _ = _field_of(Lost(), sources, sample, 0)  # type: ignore[arg-type]
    assert (field == (prior or 0)).all()
    assert "the pair: no finite field" in caplog.text


def test_fields_state_the_resolution_of_their_images():
    grid = Grid(0, 0, 0, 3, 5)
    target = SimpleNamespace(
        grid=lambda index: grid,
        sections=lambda index: (2, 1),
        offset=lambda index, side: (0, 0),
        num_pairs=1,
        resolution=(4.0, 6.0, 40.0),
    )
    module = SimpleNamespace(stage=0)
    job = SimpleNamespace(weights="weights", module=module, checkpoint_name="a")
    sources = _Sources(target, None, target)  # type: ignore[arg-type]
    meta = _meta(job, sources, {"weights_sha256": ""})  # type: ignore[arg-type]
    assert meta.attributes()["resolution"] == [4, 6, 40]


def test_fields_of_a_network_without_features_are_those_that_it_gives(tmp_path, caplog):
    write_pairs(tmp_path, mips=(0,), num_pairs=1, shape=(32, 48))
    (path,) = init_pyramid(tmp_path / "pyramid", [0], "scalenet")
    write_spec(path / "model", without_features())
    options = path / "create.py"  # finetuned as by the original, on level 0
    options.write_text(options.read_text().replace("OPTIONS | params", "params"))
    torch.manual_seed(0)
    module = load_module(path, finetune=False)
    with torch.no_grad():  # fresh ones move nothing
        for parameter in module.aligner.net.parameters():
            parameter.mul_(3)
    module.aligner.save_checkpoint(path / "model")
    spec = ModuleSpec.from_path(path)
    job = WriteFieldsConfig(
        spec, 0, tmp_path, tmp_path, "checkpoint", torch.device("cpu")
    )

    with caplog.at_level(logging.INFO, "metroem"):
        write_fields(job, StopRequest(None))

    (pair,) = [ImageSet(tmp_path / "x0_y0_z1_MIP0.h5").read(0)]
    images = [torch.from_numpy(image)[None, None] for image in pair[:2]]
    field = FieldSet(tmp_path / "field_0_x0_y0_z1_MIP0_checkpoint.h5").read(0)
    expected = module.aligner.align(*images)[0]
    assert expected.abs().mean() > 0.1
    # Stored to 0.01 px.
    torch.testing.assert_close(torch.from_numpy(field), expected, atol=0.011, rtol=0)
    assert "0_mip0in_scalenet: level 0 of its network gives the image" in caplog.text
    assert "nan" not in caplog.text
