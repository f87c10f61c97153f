"""Test --compile: compiled networks, and the networks that are refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import train
from metroem.aligner import Aligner
from metroem.errors import ResourceError, UsageError
from metroem.models.module_folders import init_pyramid
from metroem.training.compile import (
    check_compiler,
    check_compiles,
    compile_network,
    compiler_failures_named,
)
from metroem.training.model import checkpoint_activations
from tests.models.specs import scalenet, write_spec
from tests.models.test_correlation_net import SMALL
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


def test_a_machine_without_a_compiler_is_refused(tmp_path, zygote):
    # In a process of its own: torch remembers which compiler it found.
    script = tmp_path / "check.py"
    script.write_text(
        "import torch\n"
        "from torch._inductor import config\n"
        "from metroem.training.compile import check_compiler\n"
        "config.cpp.cxx = ('no-such-compiler',)\n"
        "check_compiler(torch.device('cpu'))\n"
    )
    done = zygote.run(tmp_path, [script])
    last = done["errors"].splitlines()[-1]
    assert done["status"] == 1 and "UsageError: --compile: " in last
    assert "C++ compiler" in last


def test_modules_with_stock_operators_are_refused_before_any_training(
    tmp_path, monkeypatch
):
    write_pairs(tmp_path / "data", mips=(1,), num_pairs=4, shape=(96, 128))
    (module,) = init_pyramid(tmp_path / "pyramid", [1], "scalenet")
    (module / "create.py").write_text(ORIGINAL_CREATE)
    phase = {"lr": 1e-3, "num_epochs": 1, "smoothness": 5, "crop_size": 48}
    (tmp_path / "schedule.json").write_text(json.dumps({"1": [phase]}))
    monkeypatch.setattr("metroem.training.run.check_compiler", lambda device: None)
    with pytest.raises(UsageError, match="0_mip1in_scalenet has stock operators"):
        train.main(arguments(tmp_path, "--compile"))
    assert not list(tmp_path.glob("pyramid/*/model/ck*"))


def failing(graph, inputs):
    raise AssertionError("index.is_vec")


def test_a_network_that_torch_cannot_compile_is_named(tmp_path):
    aligner = aligner_of(tmp_path, SMALL)
    compile_network(aligner, failing)
    with (
        pytest.raises(
            ResourceError, match="(?s)--compile: .*is_vec.* without the flag"
        ),
        compiler_failures_named(),
    ):
        passes(aligner, 24, 32)
    with pytest.raises(RuntimeError, match="of its own"), compiler_failures_named():
        raise RuntimeError("of its own")


def passes(aligner, rows, cols):
    """Field and gradients of a pair."""
    generator = torch.Generator().manual_seed(1)
    src, tgt = torch.randn(2, 2, 1, rows, cols, generator=generator)
    aligner.zero_grad()
    prediction = aligner.predict(src, tgt, None, levels=(0,))
    loss = prediction.field.square().mean() + prediction.embeddings[0].src.abs().mean()
    loss.backward()
    grads = [p.grad.flatten() for p in aligner.parameters() if p.grad is not None]
    return prediction.field.detach(), torch.cat(grads)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("spec", [SMALL, scalenet(4, 6)], ids=["ours", "scalenet"])
def test_a_compiled_network_gives_the_same_fields_and_gradients(
    tmp_path, spec, checkpointed
):
    check_same(aligner_of(tmp_path, spec), "eager", checkpointed=checkpointed)


@pytest.mark.long  # a minute of compiling, where nothing was compiled before
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_so_it_does_with_the_compiler_that_people_get(tmp_path):
    check_compiler(torch.device("cpu"))  # refuses no machine that has one
    check_same(aligner_of(tmp_path, scalenet(4)), "inductor", checkpointed=False)


def check_same(aligner, backend, *, checkpointed):
    names = list(aligner.net.state_dict())
    plain = passes(aligner, 24, 32)
    if checkpointed:
        checkpoint_activations(aligner.net)
    compile_network(aligner, backend)
    compiled = passes(aligner, 24, 32)
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert list(aligner.net.state_dict()) == names


class Scaled(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.weight


def test_each_network_of_a_process_is_compiled():
    num_compiled = 0

    def counting(graph, inputs):
        nonlocal num_compiled
        num_compiled += 1
        return graph.forward

    for width in range(1, 11):  # torch compiles 8 kinds of calls
        before = num_compiled
        net = Scaled(width)
        compile_network(SimpleNamespace(net=net), counting)
        net(torch.zeros(3, width))
        assert num_compiled == before + 1
