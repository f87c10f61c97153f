"""Compare recorded passes of a network with passes that are not recorded."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from metroem.aligner import Aligner
from metroem.data.sample import Sample
from metroem.errors import ResourceError
from metroem.models.module_folders import init_pyramid
from metroem.models.types import Prediction
from metroem.training import cuda_graph_model
from metroem.training.compile import compile_network
from metroem.training.cuda_graph_model import CudaGraphModel
from metroem.training.model import TrainingModel
from tests.training.test_buffers import make_aligner as with_statistics

ROWS, COLS = 64, 96

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


class Scales(torch.nn.Module):
    """A network of one weight, whose field is the two images times that."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def predict(self, src, tgt, prior, levels):
        return Prediction(self.weight * torch.cat((src, tgt), 1), {})


class Noted:
    """Stands for a recorded pass: it notes what it was made for and is called with."""

    made: list["Noted"] = []

    def __init__(self, predict, net, given, passes):
        self.predict, self.calls = predict, 0
        Noted.made.append(self)

    def __call__(self, given):
        self.calls += 1
        return self.predict(*given)


def images(batch=1, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, batch, 1, ROWS, COLS, generator=generator))


def test_on_a_cpu_each_pass_is_made_as_it_is():
    net = Scales()
    passes = CudaGraphModel(net.predict, net)
    for _ in range(5):
        field = passes(*images(), None, ()).field
        assert torch.equal(field, 2 * torch.cat(images(), 1))
    field.sum().backward()
    torch.testing.assert_close(net.weight.grad, torch.cat(images(), 1).sum())


def test_each_kind_of_pass_is_recorded_when_it_comes_the_fourth_time(monkeypatch):
    monkeypatch.setattr(cuda_graph_model, "_is_worth_recording", lambda given: True)
    monkeypatch.setattr(cuda_graph_model, "_Recorded", Noted)
    monkeypatch.setattr(cuda_graph_model, "_Passes", lambda device: None)
    monkeypatch.setattr(Noted, "made", [])
    net = Scales()
    passes = CudaGraphModel(net.predict, net)
    prior = torch.zeros(1, 2, ROWS, COLS)
    kinds = [(1, None, ()), (2, None, ()), (1, prior, ()), (1, None, (1,))]
    for count in range(1, 6):
        for number, (batch, *rest) in enumerate(kinds, start=1):
            passes(*images(batch), *rest)
            assert len(Noted.made) == (0 if count < 4 else number if count == 4 else 4)
        with torch.no_grad():  # one more kind, seldom seen
            if count < 4:
                passes(*images(), None, ())
    assert [one.calls for one in Noted.made] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("said", "raised"),
    [
        ("CUDA error: operation not permitted when stream is capturing", ResourceError),
        ("mat1 and mat2 have other shapes", RuntimeError),
    ],
)
def test_a_network_that_cannot_be_recorded_is_an_error_that_says_what_to_do(
    monkeypatch, said, raised
):
    def fails(*_):
        raise RuntimeError(f"{said}\nand more")

    monkeypatch.setattr(cuda_graph_model, "_is_worth_recording", lambda given: True)
    monkeypatch.setattr(cuda_graph_model, "_Recorded", fails)
    monkeypatch.setattr(cuda_graph_model, "_Passes", lambda device: None)
    net = Scales()
    passes = CudaGraphModel(net.predict, net)
    for _ in range(3):
        passes(*images(), None, ())
    with pytest.raises(raised, match=said) as found:
        passes(*images(), None, ())
    is_ours = raised is ResourceError
    assert ("--checkpoint_activations" in str(found.value)) == is_ours


def test_weights_are_replaced_wherever_a_network_has_them(tmp_path):
    """Networks of artificery have modules in two places, with the same weights."""
    aligner = aligner_of(tmp_path / "p", "scalenet", device="cpu")
    own = list(aligner.net.parameters())
    src, tgt = images()
    wanted = aligner.predict(src, tgt).field
    others = [torch.nn.Parameter(p.detach() * 1.1) for p in own]
    with cuda_graph_model._replaced(aligner.net, dict(zip(own, others, strict=True))):
        field = aligner.predict(src, tgt).field
        assert not torch.allclose(field, wanted)
        assert all(
            p is other
            for p, other in zip(aligner.net.parameters(), others, strict=True)
        )
    assert all(p is ours for p, ours in zip(aligner.net.parameters(), own, strict=True))
    assert torch.equal(aligner.predict(src, tgt).field, wanted)
    found = torch.autograd.grad(field.sum(), [*own, *others], allow_unused=True)
    assert all(gradient is None for gradient in found[: len(own)])
    assert all(gradient is not None for gradient in found[len(own) :])


def aligner_of(folder, template, *, device="cuda"):
    """A network whose weights have moved."""
    (path,) = init_pyramid(folder, [0], template)
    torch.manual_seed(0)
    aligner = Aligner(path / "model", operators="corrected").to(device)
    with torch.no_grad():
        for parameter in aligner.net.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return aligner


def gradients_of(run, net, given, levels):
    """A loss of all that a pass gives, and the gradients of the weights."""
    net.zero_grad(set_to_none=True)
    made = run(*given, levels)
    loss = made.field.square().mean()
    for pair in made.embeddings.values():
        loss = loss + (pair.src * pair.tgt).mean()
    loss.backward()
    return made, [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def assert_same(found, wanted, *, share=1e-3):
    """The same bits for fields; gradients are sums in no fixed order (grid_sample).

    That of a single number, a sum over all pixels most of which cancels, was 1.8e-4 off
    once (H100, 2026-11).
    """
    assert torch.equal(found[0].field, wanted[0].field)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            off = float((ours - theirs).norm() / (theirs.norm() + 1e-12))
            assert off < share, f"{off} of {tuple(theirs.shape)}"


@pytest.fixture
def without_tf32(monkeypatch):
    """TF32 rounds sums whose order has changed to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("template", ["correlation", "scalenet"])
@pytest.mark.parametrize("add_prior", [False, True])
def test_recorded_passes_are_those_that_torch_makes(
    tmp_path, template, add_prior, precision, without_tf32
):
    aligner = aligner_of(tmp_path / "p", template)
    model = TrainingModel(aligner, precision, is_recorded=True)
    prior = torch.randn(2, 2, ROWS, COLS, device="cuda") if add_prior else None
    for seed in range(7):
        given = (*(x.cuda() for x in images(2, seed=seed)), prior)
        # What it was made from is kept, as by a loss that was not yet let go.
        wanted = gradients_of(model._pass, aligner.net, given, (1,))
        found = gradients_of(model._passes, aligner.net, given, (1,))
        assert_same(found, wanted, share=1e-3 if precision == "fp32" else 0.05)
        with torch.no_grad():  # an optimizer's step, then a pass of another kind
            for parameter in aligner.net.parameters():
                parameter.mul_(1.01)
            one = [None if x is None else x[:1] for x in given]
            assert torch.equal(
                model._passes(*one, ()).field, model._pass(*one, ()).field
            )
    assert len(model._passes._recorded) == 2


@pytest.mark.gpu
@needs_gpu
def test_gradients_of_recorded_passes_add_up(tmp_path, without_tf32):
    aligner = aligner_of(tmp_path / "p", "correlation")
    passes = TrainingModel(aligner, "fp32", is_recorded=True)._passes
    weight = next(aligner.net.parameters())
    grads = []
    for seed in range(6):
        src, tgt = (x.cuda() for x in images(seed=seed))
        passes(src, tgt, None, ()).field.square().mean().backward()
        grads.append(weight.grad.clone())
    single = []
    for seed in range(6):
        weight.grad = None
        src, tgt = (x.cuda() for x in images(seed=seed))
        passes(src, tgt, None, ()).field.square().mean().backward()
        single.append(weight.grad.clone())
    for count in range(6):
        total = torch.stack(single[: count + 1]).sum(0)
        scale = float(total.abs().max())
        torch.testing.assert_close(grads[count], total, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.gpu
@needs_gpu
def test_a_backward_pass_that_comes_too_late_is_refused(tmp_path):
    aligner = aligner_of(tmp_path / "p", "correlation")
    passes = TrainingModel(aligner, "fp32", is_recorded=True)._passes
    src, tgt = (x.cuda() for x in images())
    for _ in range(3):
        passes(src, tgt, None, ())
    first = passes(src, tgt, None, ()).field
    kept = first.clone()
    second = passes(tgt, src, None, ()).field
    assert torch.equal(first, kept)  # the caller's own
    with pytest.raises(RuntimeError, match="came after another pass"):
        first.sum().backward()
    second.sum().backward()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_is_recorded(tmp_path, without_tf32):
    aligner = aligner_of(tmp_path / "p", "scalenet")
    compile_network(aligner)
    model = TrainingModel(aligner, "fp32", is_recorded=True)
    given = (*(x.cuda() for x in images()), None)
    for _ in range(5):
        found = gradients_of(model._passes, aligner.net, given, ())
    assert_same(found, gradients_of(model._pass, aligner.net, given, ()))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore")
def test_ranks_train_on_recorded_passes(tmp_path, without_tf32):
    aligner = aligner_of(tmp_path / "p", "correlation")
    model = TrainingModel(aligner, "fp32", is_recorded=True)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        ranks = DistributedDataParallel(
            model, device_ids=[0], find_unused_parameters=True
        )
        for seed in range(6):
            given = (*(x.cuda() for x in images(seed=seed)), None)
            wanted = gradients_of(model._pass, aligner.net, given, (1,))
            found = gradients_of(
                lambda *pair: ranks(Sample(*pair[:3], ("pair",)), pair[3]),
                aligner.net,
                given,
                (1,),
            )
            assert_same(found, wanted)
    finally:
        torch.distributed.destroy_process_group()
    assert len(model._passes._recorded) == 1


@pytest.mark.gpu
@needs_gpu
def test_statistics_see_each_recorded_pass_once(tmp_path, without_tf32):
    aligner = with_statistics(tmp_path).to("cuda")
    model = TrainingModel(aligner, "fp32", is_recorded=True)
    found = []
    for run in (model._passes, model._pass):
        for buffer in aligner.net.buffers():
            buffer.zero_()
        for seed in range(7):
            given = (*(x.cuda() for x in images(2, seed=seed)), None)
            gradients_of(run, aligner.net, given, ())
        found.append([buffer.clone() for buffer in aligner.net.buffers()])
    assert len(model._passes._recorded) == 1
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
