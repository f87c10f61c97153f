"""Test optimizer, averages, accumulated gradients and checkpointed activations."""

import json
from importlib import resources

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from metroem.aligner import Aligner
from metroem.data.sample import Sample, seeded_generator, stack_samples
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase
from metroem.training.checkpoint import TrainingState
from metroem.training.model import TrainingModel, checkpoint_activations
from metroem.training.optimizer import (
    averaged_weights,
    copy_weights,
    make_average,
    make_optimizer,
    set_learning_rate,
)
from metroem.training.step import train_step
from metroem.training.targets import EarlierStages
from tests.models.specs import write_spec

TEMPLATES = resources.files("metroem") / "models" / "templates"
PHASE = Phase(
    lr=1e-3,
    num_epochs=1,
    smoothness=2.0,
    losses=(
        LossSpec("known_warp"),
        LossSpec("metric", levels=(0, 1), pre_align_sample=4, weight=0.5),
    ),
)


def model_of(folder, template, dtype=torch.float64):
    torch.manual_seed(0)
    write_spec(folder, json.loads((TEMPLATES / f"{template}.json").read_text()))
    return TrainingModel(Aligner(folder, operators="corrected").to(dtype), "fp32")


def samples_of(count):
    """Samples of known warps, none like another; (1, 1, 32, 48)."""
    made = []
    for index in range(count):
        generator = seeded_generator(7, index)
        src, tgt = torch.randn(2, 1, 1, 32, 48, generator=generator)
        truth = torch.randn(1, 2, 1, 1, generator=generator).expand(1, 2, 32, 48)
        valid = torch.ones(1, 1, 32, 48, dtype=torch.bool)
        sample = Sample(src, tgt, None, (str(index),), truth=truth, truth_valid=valid)
        made.append(sample)
    return made


def gradients_of(model, batches):
    """What an update from these batches leaves in the gradients, and its metrics."""
    nothing = torch.optim.SGD(model.parameters(), lr=0.0)
    phase = replace(PHASE, accumulate=len(batches))
    none = EarlierStages(0, (), "ck", torch.device("cpu"))
    done = train_step(model, nothing, batches, phase, none, loss_seed=(0,), stop=0)
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads), done.metrics


@pytest.mark.parametrize("template", ["correlation", "scalenet"])
@pytest.mark.parametrize("share", [1, 2])
def test_accumulated_batches_are_one_batch(tmp_path, template, share):
    model = model_of(tmp_path, template, torch.float32)
    samples = samples_of(4)
    whole, scores = gradients_of(model, [stack_samples(samples)])
    parts = [stack_samples(samples[i : i + share]) for i in range(0, 4, share)]
    shared, shared_scores = gradients_of(model, parts)
    # Sums of some 1e3 px in another order: float32 rounds each to 6e-8, and errors
    # that add up at random make 30 times that of the largest gradient.
    assert (whole - shared).norm() < 1e-4 * whole.norm()
    assert whole.norm() > 1e-3
    torch.testing.assert_close(
        scores, shared_scores, rtol=1e-4, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("template", ["correlation", "scalenet"])
def test_activations_computed_again_give_the_same_gradients_from_less(
    tmp_path, template
):
    model = model_of(tmp_path, template, torch.float32)
    names = list(model.state_dict())
    batch = stack_samples(samples_of(2))
    kept, bytes_kept = counted(model, batch)
    checkpoint_activations(model.net)
    again, bytes_again = counted(model, batch)
    assert torch.equal(kept, again)
    assert bytes_again < 0.5 * bytes_kept
    assert list(model.state_dict()) == names


def counted(model, batch):
    """Gradients of one update, and the bytes kept for its backward pass."""
    seen = {}

    def keep(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)  # else its storage may be given to another
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = model(batch, ())
    kept = sum(seen.values())
    model.zero_grad()
    prediction.field.square().sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads), kept


class TwoNames(nn.Module):
    """A weight of two names and a buffer, as networks of artificery have them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 1, bias=False)])
        self.seq = nn.Sequential(*self.layers)
        self.register_buffer("seen", torch.tensor(0.0))


def set_to(net, value):
    with torch.no_grad():
        net.layers[0].weight.fill_(value)
        net.seen.fill_(value)


def test_averages_are_those_of_the_formula():
    net = TwoNames()
    set_to(net, 1.0)
    average = make_average(net, 0.25)
    expected = 1.0
    # Decays of the first three updates: 1/10, 2/11, then 3/12 = 0.25.
    for value, decay in ((5.0, 1 / 10), (7.0, 2 / 11), (-3.0, 0.25), (2.0, 0.25)):
        set_to(net, value)
        average.update_parameters(net)
        expected = decay * expected + (1 - decay) * value
    (found,) = average.module.parameters()  # once, though state_dict names it twice
    assert len(net.state_dict()) == 3
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert net.layers[0].weight.item() == 2.0


def test_averages_are_to_the_bit_those_of_lerp():
    # What was written before torch's AveragedModel was used.
    torch.manual_seed(0)
    net = nn.Linear(7, 5)
    average = make_average(net, 0.9)
    expected = [p.detach().clone() for p in net.parameters()]
    for count in range(20):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        average.update_parameters(net)
        decay = min(0.9, (1 + count) / (10 + count))
        for value, p in zip(expected, net.parameters(), strict=True):
            value.lerp_(p.detach(), 1 - decay)
    for value, found in zip(expected, average.module.parameters(), strict=True):
        assert torch.equal(value, found)


def test_averages_take_the_place_of_the_weights_for_a_while():
    net = TwoNames()
    set_to(net, 1.0)
    average = make_average(net, 0.5)
    set_to(net, 2.0)
    weight = net.layers[0].weight
    with averaged_weights(net, average):
        assert {v.item() for k, v in net.state_dict().items() if k != "seen"} == {1.0}
        assert net.seen == 2.0 and net.layers[0].weight is weight
    assert weight.item() == 2.0
    with pytest.raises(RuntimeError), averaged_weights(net, average):
        raise RuntimeError
    assert weight.item() == 2.0
    with averaged_weights(net, None):
        assert weight.item() == 2.0
    copy_weights(net, list(average.module.parameters()))
    assert weight.item() == 1.0


@pytest.mark.parametrize("template", ["correlation", "scalenet"])
def test_the_networks_of_templates_are_averaged_as_they_are_trained(tmp_path, template):
    net = model_of(tmp_path, template).net
    checkpoint_activations(net)
    average = make_average(net, 0.5)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(1.0)
    average.update_parameters(net)
    pairs = zip(net.parameters(), average.module.parameters(), strict=True)
    # The first decay is 1/10.
    for weight, averaged in pairs:
        torch.testing.assert_close(averaged, weight - 0.1)


def test_the_optimizer_resumes_with_its_state_and_the_averages(tmp_path):
    net = torch.nn.Linear(2, 1)
    phase = Phase(1e-2, 1, 0.0, ema=0.5, warmup_steps=3, lr_schedule="cosine")
    state = TrainingState({})

    def update(state, done):
        optimizer, average = make_optimizer(net, phase, state)
        set_learning_rate(optimizer, phase.rate(done, 10))
        net(torch.ones(3, 2)).square().mean().backward()
        optimizer.step()
        average.update_parameters(net)
        return optimizer, average

    optimizer, average = update(state, 0)
    assert optimizer.param_groups[0]["lr"] == phase.rate(0, 10) == 0.0025
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    torch.save((optimizer.state_dict(), average.state_dict()), tmp_path / "s.pt")
    ends = []
    for _ in range(2):
        net.load_state_dict(weights)
        net.zero_grad()
        state.optimizer, state.average = torch.load(tmp_path / "s.pt")
        optimizer, average = update(state, 1)
        assert (
            average.n_averaged == 3
        )  # the weights that it began with, and two updates
        with averaged_weights(net, average):
            ends.append(net.weight.detach().clone())
        assert not torch.equal(net.weight, ends[-1])
    assert torch.equal(ends[0], ends[1])
    copy_weights(net, list(average.module.parameters()))
    assert torch.equal(net.weight, ends[0])
