"""Accumulated gradients and recomputed activations on the templates' networks."""

import json
from importlib import resources

import pytest
import torch

from metroem.aligner import Aligner
from metroem.data.sample import Sample, seeded_generator, stack_samples
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase
from metroem.training.activations import checkpoint_activations
from metroem.training.checkpoint import TrainingState
from metroem.training.model import TrainingModel
from metroem.training.objectives import levels_wanted, phase_loss
from metroem.training.optimising import PhaseOptimizer
from metroem.training.step import scores_of, train_step
from tests.nets.specs import write_spec

TEMPLATES = resources.files("metroem") / "nets" / "templates"
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
        chance = seeded_generator(7, index)
        src, tgt = torch.randn(2, 1, 1, 32, 48, generator=chance)
        truth = torch.randn(1, 2, 1, 1, generator=chance).expand(1, 2, 32, 48)
        valid = torch.ones(1, 1, 32, 48, dtype=torch.bool)
        sample = Sample(src, tgt, None, (str(index),), truth=truth, truth_valid=valid)
        made.append(sample)
    return made


def gradients_of(model, batches):
    """What an update from these batches leaves in the gradients, and its scores."""

    def batch(sample):
        prediction = model(sample, levels_wanted(PHASE, model.options))
        chance = seeded_generator(0)
        terms = phase_loss(PHASE, sample, prediction, chance, model.options)
        return terms, scores_of(prediction, terms, None)

    nothing = torch.optim.SGD(model.parameters(), lr=0.0)
    calls = (lambda sample=sample: batch(sample) for sample in batches)
    done = train_step(calls, nothing, num_batches=len(batches), stop=0)
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads), done.scores


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


def test_the_optimizer_goes_on_with_rate_and_averages(tmp_path):
    net = torch.nn.Linear(2, 1)
    phase = Phase(1e-2, 1, 0.0, ema=0.5, warmup_steps=3, lr_schedule="cosine")
    state = TrainingState({})

    def update(optimizer, done):
        optimizer.set_rate(done)
        net(torch.ones(3, 2)).square().mean().backward()
        optimizer.adam.step()
        optimizer.note_update()
        return optimizer

    optimizer = update(PhaseOptimizer(net, phase, 10, state), 0)
    assert optimizer.adam.param_groups[0]["lr"] == phase.rate(0, 10) == 0.0025
    optimizer.note_state(state)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    torch.save((state.optimizer, state.averages), tmp_path / "s.pt")
    ends = []
    for _ in range(2):
        net.load_state_dict(weights)
        net.zero_grad()
        state.optimizer, state.averages = torch.load(tmp_path / "s.pt")
        optimizer = update(PhaseOptimizer(net, phase, 10, state), 1)
        with optimizer.best_weights():
            ends.append(net.weight.detach().clone())
        assert not torch.equal(net.weight, ends[-1])
    optimizer.finish()
    assert torch.equal(ends[0], ends[1]) and torch.equal(net.weight, ends[0])
