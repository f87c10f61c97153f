import json
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from metroem.aligner import Prediction
from metroem.data.epoch import ValidationPairs
from metroem.data.sample import Sample, seeded_generator
from metroem.loss import LossTerms
from metroem.nets.options import AlignerOptions
from metroem.specs.augmentations import KnownWarp
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase
from metroem.training.objectives import phase_loss
from metroem.training.priors import StagesBefore
from metroem.training.step import BAD_LOSS, Scores, scores_of, train_step, validate
from tests.image_sets import pairs_of, write_images


class Line(nn.Module):
    """A network of one weight, 2.0: its field is that everywhere."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self):
        return Prediction(self.weight.expand(1, 2, 3, 4), {})


def batch_of(predict, loss_of):
    def batch():
        prediction = predict()
        terms = loss_of(prediction)
        return terms, scores_of(prediction, terms, None)

    return batch


def step(net, optimizer, factor, stop=0, **options):
    def loss_of(prediction):
        total = factor * prediction.field.mean()
        return LossTerms(total, total, 0 * total, 0 * total, math.nan * total)

    return train_step([batch_of(net, loss_of)], optimizer, stop=stop, **options)


def test_a_good_step_is_taken():
    net = Line()
    done = step(net, torch.optim.SGD(net.parameters(), lr=0.5), 1.0)
    assert done.taken and done.suspects == (False,) and done.stop == 0
    assert net.weight.item() == 1.5
    scores = Scores(*done.scores.tolist())
    assert scores.loss == scores.similarity == 2 and math.isnan(scores.epe_px)
    assert scores.field_px == scores.change_px == pytest.approx(8**0.5)  # |(2, 2)|


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
    first, second = (nn.Parameter(torch.tensor(0.0)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=1.0)

    def predict():
        return Prediction((3 * first + 4 * second).expand(1, 2, 3, 4), {})

    def loss_of(prediction):
        return LossTerms(*[prediction.field.mean()] * 5)

    batch = batch_of(predict, loss_of)
    train_step([batch], optimizer, stop=0, max_grad_norm=1.0)
    # (3, 4) is 5 long.
    assert first.item() == pytest.approx(-0.6, rel=1e-4)
    assert second.item() == pytest.approx(-0.8, rel=1e-4)


def test_a_gradient_that_is_not_finite_is_not_clipped_but_skipped():
    net = Line()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    done = step(net, optimizer, float("inf"), max_grad_norm=1.0)
    assert not done.taken and net.weight.item() == 2.0


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), BAD_LOSS, -BAD_LOSS])
def test_a_bad_step_leaves_the_weights_and_the_optimizer(factor):
    net = Line()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.5)
    step(net, optimizer, 1.0)
    before = net.weight.item(), optimizer.state_dict()["state"][0]["step"].item()
    done = step(net, optimizer, factor)
    assert not done.taken and done.suspects == (True,)
    assert before == (
        net.weight.item(),
        optimizer.state_dict()["state"][0]["step"].item(),
    )


def times(net, factor):
    """A batch whose loss is the weight, so many times."""

    def loss_of(prediction):
        return LossTerms(*[factor * prediction.field.mean()] * 5)

    return batch_of(net, loss_of)


def test_the_gradients_of_batches_are_averaged_into_one_update():
    net = Line()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    batches = (times(net, factor) for factor in (1.0, 2.0, 6.0))
    done = train_step(batches, optimizer, num_batches=3, stop=0)
    assert net.weight.item() == pytest.approx(2 - 0.5 * 3)
    assert done.taken and done.suspects == (False, False, False)
    # Each batch saw the weight before the update.
    assert Scores(*done.scores.tolist()).loss == pytest.approx(2 * 3)


def test_only_the_last_batch_of_an_update_is_synchronised():
    net, noted = Line(), []

    @contextmanager
    def unsynced():
        noted.append("in")
        yield
        noted.append("out")

    def batch():
        noted.append("batch")
        return times(net, 1.0)()

    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    train_step([batch] * 3, optimizer, num_batches=3, stop=0, unsynced=unsynced)
    assert noted == ["in", "batch", "out"] * 2 + ["batch"]


def test_a_bad_batch_skips_the_update_and_is_the_one_suspected():
    net = Line()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    batches = [times(net, factor) for factor in (1.0, math.nan, 1.0)]
    done = train_step(batches, optimizer, num_batches=3, stop=0)
    assert not done.taken and net.weight.item() == 2.0
    assert done.suspects == (False, True, False)


def test_the_stop_code_is_handed_on():
    net = Line()
    assert step(net, torch.optim.SGD(net.parameters(), lr=0.1), 1.0, stop=143).stop


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
    scores = Scores(1.5, math.nan, 0.25, math.nan, 0.1234, 3.0, 2.0)
    assert scores.as_text() == "1.5 (epe 0.123 px, rigidity 0.25, field 3.00 px)"
    decoded = json.loads(json.dumps(scores.as_json(), allow_nan=False))
    assert decoded["similarity"] is None and decoded["before"] is None
    assert (decoded["loss"], decoded["epe_px"]) == (1.5, 0.1234)
    assert list(decoded) == list(Scores._fields)


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
    before = StagesBefore(1, (), "ck", cpu)
    model = OffBy()
    samples = ValidationPairs(pairs_of(tmp_path), phase, 0)
    scores = validate(model, samples, before, seed=0, device=cpu)
    assert scores.epe_px == scores.loss == pytest.approx(5, rel=1e-4)
    assert model.training
    none = ValidationPairs([], phase, 0)
    assert validate(model, none, before, seed=0, device=cpu) is None
