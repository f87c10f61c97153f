"""Modules loaded through modelhouse, which leaves no trace."""

import os
import sys

import pytest
import torch

from metroem.errors import PyramidError, UsageError
from metroem.imaging.normalize import normalize
from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from tests.models.specs import scalenet, write_spec

# As published modules have it.
OLD_CREATE = """
import os
import metroem
import torch

class Model(torch.nn.Module):
    def __init__(self, folder, **kwargs):
        super().__init__()
        self.aligner = metroem.aligner.Aligner(model_folder=folder, **kwargs)

    def forward(self, **kwargs):
        return self.aligner.forward(**kwargs)

def create(**kwargs):
    here = os.path.dirname(os.path.realpath(__file__))
    return Model(os.path.join(here, "model"), **kwargs)
"""


def write_module(folder, create):
    (folder / "model").mkdir(parents=True)
    write_spec(folder / "model", scalenet(4, 6))
    (folder / "create.py").write_text(create)
    return folder


def temporary_files():
    import modelhouse

    return os.listdir(modelhouse.MODELHOUSE_TMP_FILES_DIR)


def test_a_fresh_module_loads(tmp_path):
    (path,) = init_pyramid(tmp_path / "pyramid", [1])

    module = load_module(path, checkpoint_name="first", finetune=False)

    assert module.aligner.operators == "corrected"
    assert module.aligner.checkpoint_name == "first"
    assert module.aligner.options.finetune_knots == (32, 16, 8)
    assert module.aligner.options.finetune_sm == 8.0
    assert not module.training
    field = module(src_img=torch.rand(40, 56), tgt_img=torch.rand(40, 56))
    assert field.shape == (1, 2, 40, 56)


def test_a_published_module_loads_with_stock_operators(tmp_path):
    path = write_module(tmp_path / "0_mip8in_old", OLD_CREATE)

    module = load_module(path, finetune=False, pass_field=True)

    assert module.aligner.operators == "stock"
    field = module(src_img=torch.rand(40, 56), tgt_img=torch.rand(40, 56))
    assert field.shape == (1, 2, 40, 56)


def raw_pair(dtype):
    """Grey levels 30..70 of two sections, (24, 40), 2 px apart."""
    rows, cols = torch.meshgrid(torch.arange(24.0), torch.arange(40.0), indexing="ij")
    src, tgt = (
        50 + 10 * (torch.sin((rows + shift) / 3) + torch.cos(cols / 4))
        for shift in (0, 2)
    )
    return {"src_img": src.to(dtype), "tgt_img": tgt.to(dtype)}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_module_of_ours_normalises_raw_images_once(tmp_path, dtype):
    (path,) = init_pyramid(tmp_path / "pyramid", [3])
    module, raw = load_module(path), raw_pair(dtype)

    field = module(**raw)

    normalised = {name: normalize(image) for name, image in raw.items()}
    assert torch.equal(field, module(**normalised))
    assert not torch.equal(field, module(**raw, normalize=False))


def test_a_published_module_never_normalises(tmp_path):
    module = load_module(write_module(tmp_path / "0_mip8in_old", OLD_CREATE))

    field = module(**raw_pair(torch.uint8))

    as_floats = {k: v.float() for k, v in raw_pair(torch.uint8).items()}
    assert torch.equal(field, module(**as_floats))


def test_an_unknown_way_to_normalise_is_refused(tmp_path):
    (path,) = init_pyramid(tmp_path / "pyramid", [3])

    with pytest.raises(UsageError, match="normalize 'always'"):
        load_module(path, normalize="always")


def test_weights_saved_are_those_loaded_next(tmp_path):
    path = write_module(tmp_path / "0_mip8in_old", OLD_CREATE)
    trained = load_module(path, checkpoint_name="first")
    trained.aligner.save_checkpoint(checkpoint_folder=path / "model")
    pair = torch.rand(2, 1, 1, 32, 48)

    again = load_module(path, checkpoint_name="first")

    with torch.no_grad():
        before, after = (m.aligner.predict(*pair).field for m in (trained, again))
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("create", "says"),
    [
        ("raise RuntimeError('broken on import')", "broken on import"),
        ("def create(**_): raise KeyError('broken later')", "broken later"),
        ("import no_such_package", "no_such_package"),
        ("", "create"),
        ("def create(**_): return 3", "int without an `aligner`"),
    ],
)
def test_a_broken_module_is_refused_and_leaves_no_trace(tmp_path, create, says):
    path = write_module(tmp_path / "0_mip8in_broken", create)
    before = os.getcwd(), list(sys.path), set(sys.modules), temporary_files()

    with pytest.raises(PyramidError, match=says) as refusal:
        load_module(path)

    assert str(path) in str(refusal.value)
    assert (os.getcwd(), sys.path) == before[:2]
    assert set(sys.modules) - before[2] <= {"metroem.aligner", "metroem.loss"}
    assert temporary_files() == before[3]


def test_helpers_of_the_same_name_are_each_modules_own(tmp_path):
    create = "from helper import KIND\n" + OLD_CREATE.replace(
        "super().__init__()", "super().__init__(); self.kind = KIND"
    )
    kinds = []
    for kind in ("first", "second"):
        path = write_module(tmp_path / f"0_mip8in_{kind}", create)
        (path / "helper.py").write_text(f"KIND = {kind!r}")
        kinds.append(load_module(path).kind)

    assert kinds == ["first", "second"]
    assert "helper" not in sys.modules


def test_a_folder_without_create_is_refused(tmp_path):
    with pytest.raises(PyramidError, match=r"no create\.py"):
        load_module(tmp_path)


def test_a_module_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(PyramidError, match="0_mip3in_none"):
        load_module(tmp_path / "0_mip3in_none")
