import json
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from metroem.data.sample import Sample, seeded_generator
from metroem.data.sampling import ValidationPairs
from metroem.loss import LossTerms
from metroem.models.options import AlignerOptions
from metroem.models.types import Prediction
from metroem.specs.augmentations import KnownWarp
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase
from metroem.training import step as step_module
from metroem.training.phase_loss import phase_loss
from metroem.training.step import BAD_LOSS, StepMetrics, train_step
from metroem.training.targets import EarlierStages
from metroem.training.validate import validate
from tests.image_sets import pairs_of, write_images

NO_STAGES = EarlierStages(0, (), "ck", torch.device("cpu"))


class Line(nn.Module):
    """A network of one weight, 2.0: its field is that everywhere."""

    options = AlignerOptions()

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, sample, levels):
        return Prediction(self.weight.expand(1, 2, 3, 4), {})


def times(factor):
    """A batch whose loss is a multiple of the weight."""
    image = torch.full((1, 1, 3, 4), factor)
    return Sample(image, torch.ones(1, 1, 3, 4), None, (f"pair {factor}",))


@pytest.fixture(autouse=True)
def loss_by_sample(monkeypatch):
    """The loss is the mean field, times what src holds."""

    def loss(phase, sample, prediction, generator, options):
        total = sample.src.flatten()[0] * prediction.field.mean()
        return LossTerms(total, total, 0 * total, 0 * total, math.nan * total)

    monkeypatch.setattr(step_module, "phase_loss", loss)


def step(net, optimizer, *factors, stop=0, **options):
    phase = Phase(1e-3, 1, 0.0, accumulate=len(factors), **options)
    batches = (times(factor) for factor in factors)
    return train_step(
        net, optimizer, batches, phase, NO_STAGES, loss_seed=(0,), stop=stop
    )


def test_a_good_step_is_applied():
    net = Line()
    done = step(net, torch.optim.SGD(net.parameters(), lr=0.5), 1.0)
    assert done.applied and done.bad_pairs == () and done.stop == 0
    assert net.weight.item() == 1.5
    metrics = StepMetrics(*done.metrics.tolist())
    assert metrics.loss == metrics.similarity == 2 and math.isnan(metrics.epe_px)
    # |(2, 2)|
    assert metrics.field_px == metrics.change_px == pytest.approx(8**0.5)


@pytest.mark.parametrize(
    ("max_grad_norm", "weight"), [(None, -3.0), (20.0, -3.0), (2.0, 1.0)]
)
def test_a_gradient_is_clipped_to_its_largest_norm(max_grad_norm, weight):
    # d(10 * weight) = 10, so a rate of 0.5 moves the weight by 5, or by 1 if clipped.
    net = Line()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    step(net, optimizer, 10.0, max_grad_norm=max_grad_norm)
    assert net.weight.item() == pytest.approx(weight, rel=1e-5)


def test_the_norm_that_is_clipped_is_that_of_all_weights():
    class Two(nn.Module):
        options = AlignerOptions()

        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.tensor(0.0))
            self.second = nn.Parameter(torch.tensor(0.0))

        def forward(self, sample, levels):
            both = 3 * self.first + 4 * self.second
            return Prediction(both.expand(1, 2, 3, 4), {})

    net = Two()
    groups = [{"params": [net.first]}, {"params": [net.second]}]
    step(net, torch.optim.SGD(groups, lr=1.0), 1.0, max_grad_norm=1.0)
    # (3, 4) is 5 long.
    assert net.first.item() == pytest.approx(-0.6, rel=1e-4)
    assert net.second.item() == pytest.approx(-0.8, rel=1e-4)


def test_a_gradient_that_is_not_finite_is_not_clipped_but_skipped():
    net = Line()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    done = step(net, optimizer, float("inf"), max_grad_norm=1.0)
    assert not done.applied and net.weight.item() == 2.0


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), BAD_LOSS, -BAD_LOSS])
def test_a_bad_step_leaves_the_weights_and_the_optimizer(factor):
    net = Line()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.5)
    step(net, optimizer, 1.0)
    before = net.weight.item(), optimizer.state_dict()["state"][0]["step"].item()
    done = step(net, optimizer, factor)
    assert not done.applied and done.bad_pairs == (f"pair {factor}",)
    assert before == (
        net.weight.item(),
        optimizer.state_dict()["state"][0]["step"].item(),
    )


def test_the_gradients_of_batches_are_averaged_into_one_update():
    net = Line()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    done = step(net, optimizer, 1.0, 2.0, 6.0)
    assert net.weight.item() == pytest.approx(2 - 0.5 * 3)
    assert done.applied and done.bad_pairs == ()
    # Each batch saw the weight before the update.
    assert StepMetrics(*done.metrics.tolist()).loss == pytest.approx(2 * 3)


def test_only_the_last_batch_of_an_update_is_synchronised():
    noted = []

    class Noting(Line):
        @contextmanager
        def no_sync(self):
            noted.append("in")
            yield
            noted.append("out")

        def forward(self, sample, levels):
            noted.append("batch")
            return super().forward(sample, levels)

    net = Noting()
    step(net, torch.optim.SGD(net.parameters(), lr=0.5), 1.0, 1.0, 1.0)
    assert noted == ["in", "batch", "out"] * 2 + ["batch"]


def test_a_bad_batch_skips_the_update_and_is_the_one_suspected():
    net = Line()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    done = step(net, optimizer, 1.0, math.nan, 3.0)
    assert not done.applied and net.weight.item() == 2.0
    assert done.bad_pairs == ("pair nan",)


def test_with_a_bad_gradient_of_good_losses_all_pairs_are_suspected():
    class Steep(Line):
        def forward(self, sample, levels):
            # The value is 0; the slope of a square root there is not finite.
            return Prediction((self.weight - 2).sqrt().expand(1, 2, 3, 4), {})

    net = Steep()
    done = step(net, torch.optim.SGD(net.parameters(), lr=0.5), 1.0, 3.0)
    assert not done.applied and net.weight.item() == 2.0
    assert done.bad_pairs == ("pair 1.0", "pair 3.0")


def test_the_stop_code_is_handed_on():
    net = Line()
    assert step(net, torch.optim.SGD(net.parameters(), lr=0.1), 1.0, stop=143).stop


def test_labels_are_made_in_any_orientation_and_in_the_same_ones_again(monkeypatch):
    seen = []

    def note(sample, predict, options, orientation):
        seen.append(orientation)
        return sample

    monkeypatch.setattr(step_module, "add_pseudo_label", note)
    for _ in range(2):
        net = Line()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        step(net, optimizer, *[1.0] * 64)

    assert set(seen) == set(range(8)) and seen[:64] == seen[64:]


def test_generators_differ_by_their_key():
    draws = {
        torch.rand((), generator=seeded_generator(*key)).item()
        for key in [(0, 0), (0, 1), (1, 0), (0, 0, 0)]
    }
    assert len(draws) == 4


def test_the_loss_of_a_phase_leaves_out_the_defects_of_a_sample():
    generator = seeded_generator(5)
    src, tgt = torch.randn(2, 1, 1, 24, 40, generator=generator) + 5
    defects = torch.zeros(1, 1, 24, 40, dtype=torch.bool)
    defects[..., :20] = True
    # src is far off on its defects, and nowhere else.
    src = torch.where(defects, 50.0, tgt)
    phase = Phase(lr=1e-3, num_epochs=1, smoothness=0.0)

    def similarity(sample):
        prediction = Prediction(torch.zeros(1, 2, 24, 40), {})
        return float(phase_loss(phase, sample, prediction, generator).similarity)

    sample = Sample(src, tgt, None, ("a",))
    assert similarity(sample) > 100
    assert similarity(sample._replace(src_defects=defects)) < 1e-9


def test_what_is_not_known_is_left_out_of_the_text_and_null_in_json():
    metrics = StepMetrics(1.5, math.nan, 0.25, math.nan, 0.1234, 3.0, 2.0)
    assert metrics.as_text() == "1.5 (epe 0.123 px, rigidity 0.25, field 3.00 px)"
    decoded = json.loads(json.dumps(metrics.as_json(), allow_nan=False))
    assert decoded["similarity"] is None and decoded["before"] is None
    assert (decoded["loss"], decoded["epe_px"]) == (1.5, 0.1234)
    assert list(decoded) == list(StepMetrics._fields)


class OffBy(nn.Module):
    """A network that knows the truth and misses it by 5 px; by 1 in training."""

    options = AlignerOptions()

    def forward(self, sample, levels):
        assert not torch.is_grad_enabled()
        missed = torch.tensor([0.6, 0.8]) * (1 if self.training else 5)
        return Prediction(sample.truth + missed.view(1, 2, 1, 1), {})


def test_validation_averages_over_the_held_out_pairs(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=2)
    warp = KnownWarp(aligned=True, tear=0, peak_px=3, shift_px=2)
    phase = Phase(1e-3, 1, 0.0, losses=(LossSpec("known_warp"),), augmentations=(warp,))
    cpu = torch.device("cpu")
    earlier = EarlierStages(1, (), "ck", cpu)
    model = OffBy()
    samples = ValidationPairs(pairs_of(tmp_path), phase, 0)
    metrics = validate(model, samples, earlier, seed=0, device=cpu)
    assert metrics is not None
    assert metrics.epe_px == metrics.loss == pytest.approx(5, rel=1e-4)
    assert model.training
    none = ValidationPairs([], phase, 0)
    assert validate(model, none, earlier, seed=0, device=cpu) is None
