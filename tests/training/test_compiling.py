"""--compile: networks compiled in place, and what is refused."""

import json

import pytest
import torch

import train
from metroem.aligner import Aligner
from metroem.errors import UsageError
from metroem.scaffold import init_pyramid
from metroem.training.activations import checkpoint_activations
from metroem.training.compiling import (
    check_compiler,
    check_compiles,
    compile_network,
)
from tests.nets.specs import scalenet, write_spec
from tests.nets.test_correlation import SMALL
from tests.pairs import write_pairs
from tests.test_train import ORIGINAL_CREATE, arguments

# torch 2.13 says so of what its own compiler does.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def aligner_of(folder, spec, operators="corrected"):
    torch.manual_seed(0)
    write_spec(folder, spec)
    return Aligner(folder, operators=operators)


def test_stock_operators_are_refused(tmp_path):
    aligner = aligner_of(tmp_path, scalenet(4, 6), "stock")
    with pytest.raises(UsageError, match="--compile: here has stock operators"):
        check_compiles(aligner, "here")
    check_compiles(aligner_of(tmp_path, scalenet(4, 6)), "here")


def test_a_machine_without_a_compiler_is_refused_before_any_training(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    with pytest.raises(UsageError, match=r"--compile: .*C\+\+ compiler"):
        check_compiler(torch.device("cpu"))


def test_modules_with_stock_operators_are_refused_before_any_training(
    tmp_path, monkeypatch
):
    write_pairs(tmp_path / "data", mips=(1,), num_pairs=4, shape=(96, 128))
    (module,) = init_pyramid(tmp_path / "pyramid", [1], "scalenet")
    (module / "create.py").write_text(ORIGINAL_CREATE)
    phase = {"lr": 1e-3, "num_epochs": 1, "smoothness": 5, "crop_size": 48}
    (tmp_path / "schedule.json").write_text(json.dumps({"1": [phase]}))
    monkeypatch.setattr("metroem.pipeline.check_compiler", lambda device: None)
    with pytest.raises(UsageError, match="0_mip1in_scalenet has stock operators"):
        train.main(arguments(tmp_path, "--compile"))
    assert not list(tmp_path.glob("pyramid/*/model/ck*"))


def passes(aligner, rows, cols):
    """Field and gradients of a pair."""
    chance = torch.Generator().manual_seed(1)
    src, tgt = torch.randn(2, 2, 1, rows, cols, generator=chance)
    aligner.zero_grad()
    prediction = aligner.predict(src, tgt, None, levels=(0,))
    loss = prediction.field.square().mean() + prediction.embeddings[0].src.abs().mean()
    loss.backward()
    grads = [p.grad.flatten() for p in aligner.parameters() if p.grad is not None]
    return prediction.field.detach(), torch.cat(grads)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("spec", [SMALL, scalenet(4, 6)], ids=["ours", "scalenet"])
def test_a_compiled_network_gives_the_same_fields_and_gradients(
    tmp_path, spec, checkpointed
):
    aligner = aligner_of(tmp_path, spec)
    names = list(aligner.net.state_dict())
    plain = passes(aligner, 24, 32)
    if checkpointed:
        checkpoint_activations(aligner.net)
    compile_network(aligner)
    compiled = passes(aligner, 24, 32)
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert list(aligner.net.state_dict()) == names
