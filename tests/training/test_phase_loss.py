"""Test the losses of a phase on fields whose errors are known."""

import math

import pytest
import torch

from metroem.data.sample import Sample, seeded_generator
from metroem.geometry.rigidity import rigidity_map
from metroem.imaging.loss_weights import PairMasks, pair_weights
from metroem.loss import PairLoss, plain_loss
from metroem.models.options import AlignerOptions
from metroem.models.types import Embedding, Prediction
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase
from metroem.training.phase_loss import levels_wanted, phase_loss

ROWS, COLS = 48, 72
KNOWN, PLAIN = LossSpec("known_warp"), LossSpec("plain")


def phase_of(*losses, smoothness=0.0):
    return Phase(lr=1e-3, num_epochs=1, smoothness=smoothness, losses=losses)


def constant(d_cols, d_rows, rows=ROWS, cols=COLS):
    field = torch.tensor([d_cols, d_rows], dtype=torch.float32).view(1, 2, 1, 1)
    return field.repeat(1, 1, rows, cols)


def texture(rows=ROWS, cols=COLS, *, d_rows=0.0, d_cols=0.0):
    row, col = torch.meshgrid(
        torch.arange(float(rows)) + d_rows,
        torch.arange(float(cols)) + d_cols,
        indexing="ij",
    )
    return (torch.sin(row / 7) + torch.cos(col / 9) + 3)[None, None]


@pytest.fixture
def sample():
    """The truth is (2, -1) px everywhere."""
    return Sample(
        texture(),
        texture(d_cols=2, d_rows=-1),
        None,
        ("a",),
        truth=constant(2, -1),
        truth_valid=torch.ones(1, 1, ROWS, COLS, dtype=torch.bool),
    )


def loss_of(phase, sample, prediction):
    return phase_loss(phase, sample, prediction, seeded_generator(3))


def test_a_constant_error_is_the_endpoint_error(sample):
    terms = loss_of(phase_of(KNOWN), sample, Prediction(constant(5, 3), {}))
    assert float(terms.total) == pytest.approx(5, rel=1e-5)  # (3, 4) off
    assert float(terms.epe) == pytest.approx(5, rel=1e-5)
    for unknown in (terms.similarity, terms.rigidity, terms.before):
        assert math.isnan(unknown)


def test_the_truth_itself_costs_next_to_nothing(sample):
    terms = loss_of(phase_of(KNOWN), sample, Prediction(sample.truth.clone(), {}))
    assert float(terms.total) < 0.02


def test_where_the_truth_is_not_valid_nothing_counts(sample):
    valid = sample.truth_valid.clone()
    valid[..., :30] = False
    field = sample.truth.clone()
    field[..., :30] += 100
    known = sample._replace(truth_valid=valid)
    assert float(loss_of(phase_of(KNOWN), known, Prediction(field, {})).epe) < 0.02


@pytest.mark.parametrize("side", ["src", "tgt"])
def test_what_one_image_does_not_show_counts_less(sample, side):
    # Half of the image is blank on one side; its field is 100 px off there.
    image = getattr(sample, side).clone()
    image[..., : COLS // 2] = 0
    field = sample.truth.clone()
    field[..., : COLS // 2] += 100 / 2**0.5
    shown = loss_of(phase_of(KNOWN), sample, Prediction(field, {}))
    blank = loss_of(
        phase_of(KNOWN), sample._replace(**{side: image}), Prediction(field, {})
    )
    assert float(shown.epe) == pytest.approx(50, rel=0.05)
    assert 1 < float(blank.epe) < 25


def test_rigidity_counts_only_with_smoothness(sample):
    stretched = sample.truth.clone()
    stretched[:, 0] += 0.1 * torch.arange(float(COLS))
    prediction = Prediction(stretched, {})
    without, with_some = (
        loss_of(phase_of(KNOWN, smoothness=s), sample, prediction) for s in (0.0, 7.0)
    )
    strain = rigidity_map(stretched).mean()
    assert math.isnan(without.rigidity)
    torch.testing.assert_close(with_some.rigidity, strain)
    torch.testing.assert_close(with_some.total, without.total + 7 * strain)


def test_losses_are_added_with_their_weights(sample):
    mixed = phase_of(
        LossSpec("known_warp", weight=0.5), LossSpec("plain", weight=3), smoothness=2.0
    )
    prediction = Prediction(constant(2, 3), {})
    known, plain = (
        loss_of(phase_of(spec, smoothness=2.0), sample, prediction)
        for spec in (KNOWN, PLAIN)
    )
    terms = loss_of(mixed, sample, prediction)
    torch.testing.assert_close(terms.total, 0.5 * known.total + 3 * plain.total)
    torch.testing.assert_close(terms.epe, known.epe)
    torch.testing.assert_close(terms.similarity, plain.similarity)


def test_a_metric_loss_looks_at_the_embeddings_of_its_levels(sample):
    def features(image, level):
        both = torch.cat((image, image**2, 1 / image), 1)
        return torch.nn.functional.avg_pool2d(both, 2**level)

    embeddings = {
        level: Embedding(features(sample.src, level), features(sample.tgt, level))
        for level in (0, 1)
    }
    prediction = Prediction(sample.truth, embeddings)
    one, two, both = (
        loss_of(phase_of(LossSpec("metric", levels=levels)), sample, prediction)
        for levels in ((0,), (1,), (0, 1))
    )
    assert float(one.before) > 0.01 and math.isnan(one.epe)
    torch.testing.assert_close(both.total, (one.total + two.total) / 2)


def test_a_metric_loss_may_measure_against_a_moved_tgt(sample):
    image = torch.cat((sample.tgt, sample.tgt), 1)
    prediction = Prediction(0 * sample.truth, {0: Embedding(image, image)})
    still, moved = (
        loss_of(phase_of(LossSpec("metric", pure_emb=pure)), sample, prediction)
        for pure in (False, True)
    )
    assert float(still.before) == 0 and float(moved.before) > 0.01
    torch.testing.assert_close(still.similarity, moved.similarity)


def test_gradients_of_a_mix_lead_to_the_truth(sample):
    field = constant(0, 0).requires_grad_()
    mixed = phase_of(KNOWN, PLAIN, smoothness=1.0)
    loss_of(mixed, sample, Prediction(field, {})).total.backward()
    # Less of the loss with more along cols, and with less along rows.
    assert field.grad[0, 0].sum() < 0 < field.grad[0, 1].sum()


def test_a_plain_loss_masks_as_the_rules_of_its_phase_say(sample):
    phase = phase_of(PLAIN, smoothness=3.0)
    maps = PairMasks(sample.src, sample.tgt)
    pair = PairLoss(
        sample.truth,
        pair_weights(phase.similarity_rules, maps),
        pair_weights(phase.smoothness_rules, maps),
        3.0,
    )
    found = loss_of(phase, sample, Prediction(sample.truth, {}))
    assert found.total == plain_loss(sample.src, sample.tgt, pair).total


def test_distil_asks_for_what_the_finetuner_finds(sample):
    """The embeddings are sharp images, so the finetuner finds the truth (2, -1)."""
    options = AlignerOptions(finetune_knots=(16,), finetune_sm=0.01, finetune_level=0)
    image = torch.cat((sample.src, sample.src), 1), torch.cat((sample.tgt,) * 2, 1)
    start = constant(1.2, -0.4)
    prediction = Prediction(start, {0: Embedding(*image)})
    phase = phase_of(LossSpec("distil", iterations=30))
    assert levels_wanted(phase, options) == (0,)
    terms = phase_loss(phase, sample, prediction, seeded_generator(3), options)
    # 1 px from the truth at the start; what the finetuner is off adds to it.
    assert float(terms.epe) == pytest.approx(1.0, abs=0.25)
