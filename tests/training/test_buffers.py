"""Test that only the passes of updates change BatchNorm's running statistics."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import train
from metroem.aligner import Aligner
from metroem.models.module_folders import init_pyramid
from metroem.training import cuda_graph_model, step
from metroem.training.buffers import buffers_kept, evaluating, restore_buffers
from metroem.training.compile import compile_network
from metroem.training.cuda_graph_model import CudaGraphModel
from metroem.training.model import TrainingModel, checkpoint_activations
from tests.models.specs import scalenet, write_spec
from tests.pairs import write_pairs

ROWS, COLS = 24, 40
SLOW = pytest.mark.slow


def with_batchnorm(spec):
    """The spec, whose blocks have BatchNorm."""
    for part in spec["upmodules"].values():
        block = part["module"]["processors"][1]["module"]
        block["arch_desc"]["flags"] = {"batchnorm": True}
    return spec


def make_aligner(folder):
    write_spec(folder, with_batchnorm(scalenet(4, 6)))
    torch.manual_seed(0)
    return Aligner(folder, operators="corrected")


def statistics(net):
    return [buffer.clone() for buffer in net.buffers()]


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 2, 1, ROWS, COLS, generator=generator) + 1)


def assert_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_block_leaves_buffers_as_they_were(tmp_path):
    net = make_aligner(tmp_path).net
    net(x=torch.cat(images(), 1))
    before = statistics(net)
    assert len(before) and before[0].abs().max() > 0.01

    with pytest.raises(ZeroDivisionError), buffers_kept(net):
        net(x=torch.cat(images(1), 1))
        assert not torch.equal(statistics(net)[0], before[0])
        raise ZeroDivisionError
    assert_equal(statistics(net), before)

    with evaluating(net):
        assert not any(m.training for m in net.modules())
        net(x=torch.cat(images(1), 1))
    assert net.training
    assert_equal(statistics(net), before)


def test_recording_a_pass_leaves_statistics_and_chance_as_they_were(
    tmp_path, monkeypatch
):
    aligner = make_aligner(tmp_path)
    # What is recorded on a GPU is not done; here it is, once, and what comes first not.
    stub = SimpleNamespace(recording=lambda graph: nullcontext())
    monkeypatch.setattr(cuda_graph_model, "_Passes", lambda device: stub)
    monkeypatch.setattr(cuda_graph_model.torch.cuda, "CUDAGraph", object)
    predict = TrainingModel(aligner, "fp32")._pass
    before = statistics(aligner.net)
    predict(*images(), None, ())
    once = statistics(aligner.net)
    restore_buffers(list(zip(aligner.net.buffers(), before, strict=True)))

    def draw_and_predict(*given):  # as a network with dropout
        return predict(*given)._replace(confidence=torch.rand(3))

    torch.manual_seed(5)
    recorded = CudaGraphModel(draw_and_predict, aligner.net)._record(images(), ())

    assert_equal(statistics(aligner.net), once)
    torch.manual_seed(5)
    assert torch.equal(recorded.prediction.confidence, torch.rand(3))


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=SLOW)])
def test_a_pass_computed_again_counts_once(tmp_path, compiles):
    found = []
    for again in (False, True):
        aligner = make_aligner(tmp_path)
        net = aligner.net
        if again:
            checkpoint_activations(net)
        if compiles:
            compile_network(aligner, backend="aot_eager")
        net(x=torch.cat(images(), 1)).square().sum().backward()
        found.append(statistics(net))
    assert_equal(*found)


PHASE = {
    **{"lr": 1e-3, "num_epochs": 2, "num_samples": 3, "smoothness": 0, "crop_size": 32},
    "loss_spec": {"type": "known_warp"},
    "augmentations": [
        {"type": "known_warp", "peak_px": 2, "shift_px": 2, "tear": 0, "same": 0}
    ],
}


def train_one_stage(folder, *flags):
    """Passes that the statistics of a trained network have seen."""
    write_pairs(folder / "data", mips=(0,), num_pairs=4, shape=(48, 64))
    (module,) = init_pyramid(folder / "pyramid", [0], "scalenet")
    write_spec(module / "model", with_batchnorm(scalenet(4, 6)))
    (folder / "schedule.json").write_text(json.dumps({"0": [PHASE]}))
    train.main(
        [
            *("--pyramid_path", str(folder / "pyramid")),
            *("--dataset_path", str(folder / "data"), "--train_mode", "custom"),
            *("--train_params_path", str(folder / "schedule.json")),
            *("--device", "cpu", "--num_workers", "0", "--val_pairs", "1"),
            *flags,
        ]
    )
    last = folder / "pyramid/.train/checkpoint/stage_0_last.state.pth.tar"
    state = torch.load(last, weights_only=True)
    return {int(v) for name, v in state.items() if name.endswith("batches_tracked")}


@pytest.fixture
def third_is_bad(monkeypatch):
    """The third step of a training has a loss of NaN, and is skipped."""
    steps, real = [], step.phase_loss

    def loss(*args):
        steps.append(len(steps))
        terms = real(*args)
        if len(steps) == 3:
            terms = terms._replace(total=terms.total * float("nan"))
        return terms

    monkeypatch.setattr(step, "phase_loss", loss)


# Passes that make pseudo-labels do not count either, nor passes of held-out pairs.
@pytest.mark.parametrize("flags", [(), ("--checkpoint_activations",)])
def test_a_training_counts_the_passes_of_its_updates_alone(
    tmp_path, third_is_bad, flags
):
    assert train_one_stage(tmp_path, *flags) == {5}
