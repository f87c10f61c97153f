"""Test scores of networks whose fields move the pixels to score out of view."""

import json
import math

import pytest
import torch

import train
from metroem.data.known_warp import known_warp
from metroem.data.sample import Sample, seeded_generator
from metroem.data.sampling import ValidationPairs
from metroem.geometry.field import invert
from metroem.models.module_folders import init_pyramid
from metroem.models.options import AlignerOptions
from metroem.models.types import Prediction
from metroem.specs.augmentations import KnownWarp
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase
from metroem.training.phase_loss import covered, phase_loss
from metroem.training.step import StepMetrics
from metroem.training.targets import EarlierStages, add_pseudo_label
from metroem.training.validate import validate
from tests.image_sets import pairs_of, write_images
from tests.models.specs import scalenet, write_spec
from tests.pairs import write_pairs
from tests.test_train import arguments

ROWS, COLS = 48, 72
WARP = KnownWarp(prob=1, same=0, tear=0, peak_px=4, shift_px=2, knot_px=16)
CPU = torch.device("cpu")


def shift(d_cols, d_rows=0.0):
    field = torch.tensor([d_cols, d_rows], dtype=torch.float32).view(1, 2, 1, 1)
    return field.repeat(1, 1, ROWS, COLS)


def texture(*, d_cols=0.0):
    row, col = torch.meshgrid(
        torch.arange(float(ROWS)), torch.arange(float(COLS)) + d_cols, indexing="ij"
    )
    return (torch.sin(row / 3) + torch.cos(col / 4) + 0.1)[None, None]


def phase_of(kind, **options):
    warps = (WARP,) if kind == "known_warp" else ()
    losses = (LossSpec(kind),)
    return Phase(1e-3, 1, 0.0, losses=losses, augmentations=warps, **options)


def warped(network, prior=None):
    """A pair under a known warp, whose truth rests on what a network finds."""
    given = Sample(texture(), texture(), prior, ("a",))
    known = known_warp(given, WARP, seeded_generator(0))
    return add_pseudo_label(known, network, WARP)


def finds(field):
    """A network that is shown a pair, then the pair swapped."""
    return lambda sample, levels: Prediction(torch.cat((field, invert(field))), {})


def score(phase, sample, field):
    prediction, generator = Prediction(field, {}), seeded_generator(1)
    return phase_loss(phase, sample, prediction, generator, is_score=True)


def test_a_field_that_points_out_of_the_image_scores_its_length():
    # It is the same before and after the warp: consistent, and all lost.
    out = shift(300.0)
    sample = warped(finds(out))
    assert not sample.truth_valid.any() and sample.scored.float().mean() > 0.5
    assert float(covered(sample, out)) == 0
    epe = float(score(phase_of("known_warp"), sample, out).epe)
    assert epe == pytest.approx(300, abs=WARP.peak_px + 2 * WARP.shift_px + 1)
    # A network that finds the warp, and that nothing has moved before it.
    none = warped(finds(shift(0.0)))
    assert float(covered(none, none.truth)) == 1
    assert float(score(phase_of("known_warp"), none, none.truth).epe) < 0.02


def test_a_rough_field_scores_what_it_is_off_and_not_nothing():
    noise = 40 * torch.randn(1, 2, ROWS, COLS, generator=seeded_generator(5))
    sample = warped(finds(noise))
    assert float(covered(sample, noise)) < 0.02
    # The mean length of two normal deviates of 40 px.
    epe = float(score(phase_of("known_warp"), sample, noise).epe)
    assert epe == pytest.approx(40 * math.sqrt(math.pi / 2), rel=0.1)


def test_what_is_lost_of_a_truth_on_a_prior_field_is_measured_from_there():
    prior = shift(20.0)
    sample = warped(finds(prior), prior)
    assert float(covered(sample, prior)) == 1
    assert float(score(phase_of("known_warp"), sample, sample.truth).epe) < 0.02
    lost = warped(finds(shift(320.0)), prior)
    epe = float(score(phase_of("known_warp"), lost, shift(320.0)).epe)
    assert epe == pytest.approx(300, abs=WARP.peak_px + 2 * WARP.shift_px + 1)


def test_a_prior_field_that_shows_nothing_leaves_the_pair_unwarped():
    # The prior field of a collapsed earlier stage: the unwarped pair is scored.
    prior = shift(300.0)
    sample = warped(finds(shift(0.0)), prior)
    assert float(covered(sample, shift(0.0))) == 1
    plain = Sample(texture(), texture(), prior, ("a",))
    good, lost = (score(phase_of("plain"), plain, f) for f in (shift(0.0), prior))
    assert float(good.total) < 1e-6 < float(lost.total)
    assert float(covered(plain, shift(0.0))) == 1


def test_a_training_counts_what_is_left_as_it_did():
    sample = warped(finds(shift(300.0)))
    prediction = Prediction(shift(300.0), {})
    terms = phase_loss(phase_of("known_warp"), sample, prediction, seeded_generator(1))
    assert float(terms.total) == 0 and float(terms.epe) == 0


def test_similarity_counts_tissue_that_a_field_points_away_from_as_unlike():
    # src has a blank half: a field into it has nothing to compare.
    src = texture()
    src[..., COLS // 2 :] = 0
    sample = Sample(src, texture(), None, ("a",))
    away = shift(float(COLS // 2 + 8))
    aligned, lost = (score(phase_of("plain"), sample, f) for f in (shift(0.0), away))
    assert float(aligned.similarity) < 1e-6
    border = 6  # an eighth of the shorter side is left out
    due = (..., slice(border, -border), slice(border, COLS // 2 - 3))
    power = float(sample.tgt[due].square().mean())
    assert float(lost.similarity) == pytest.approx(2 * power, rel=0.1)
    assert float(covered(sample, away)) < 0.02 < float(covered(sample, shift(0.0)))
    trained = phase_loss(
        phase_of("plain"), sample, Prediction(away, {}), seeded_generator(1)
    )
    assert float(trained.similarity) < float(lost.similarity) / 4


def test_a_pair_that_shows_nothing_has_no_score():
    blank = Sample(0 * texture(), texture(), None, ("a",))
    assert math.isnan(score(phase_of("plain"), blank, shift(0.0)).total)
    assert math.isnan(covered(blank, shift(0.0)))
    assert not StepMetrics(*[math.nan] * 8).is_known


class Off(torch.nn.Module):
    """A network whose field is one vector everywhere."""

    options = AlignerOptions()

    def __init__(self, length):
        super().__init__()
        self.length = length

    def forward(self, sample, levels):
        return Prediction(
            torch.full_like(sample.src, self.length).repeat(1, 2, 1, 1), {}
        )


def test_validation_leaves_out_pairs_without_a_score(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=3)
    pairs = pairs_of(tmp_path)
    phase, before = phase_of("plain"), EarlierStages(1, (), "ck", CPU)
    whole = validate(
        Off(0.5), ValidationPairs(pairs[1:], phase, 0), before, seed=0, device=CPU
    )
    read = ValidationPairs.__getitem__

    class WithBlank(ValidationPairs):
        def __getitem__(self, position):
            sample = read(self, position)
            return sample._replace(src=0 * sample.src) if position == 0 else sample

    samples = WithBlank(pairs, phase, 0)
    scores = validate(Off(0.5), samples, before, seed=0, device=CPU)
    assert scores.loss == pytest.approx(whole.loss) and scores.is_known
    assert scores.covered == pytest.approx(whole.covered)
    out = validate(Off(400.0), samples, before, seed=0, device=CPU)
    assert out.has_collapsed and not out.is_known


@pytest.fixture
def run(tmp_path):
    write_pairs(tmp_path / "data", mips=(1,), num_pairs=6, shape=(96, 128))
    (module,) = init_pyramid(tmp_path / "pyramid", [1], "scalenet")
    write_spec(module / "model", scalenet(4, 6))
    phase = {"lr": 1e-4, "num_epochs": 3, "smoothness": 1, "crop_size": 48}
    (tmp_path / "schedule.json").write_text(json.dumps({"1": [phase]}))
    return tmp_path


ONE_STAGE = ("--train_stages", "0", "--generate_field_stages", "0")


def known_losses(monkeypatch, values):
    """Validation says these, (loss, covered) an epoch."""
    left = iter(values)

    def scored(*args, **options):
        loss, share = next(left)
        return StepMetrics(loss, loss, 0.0, 0.0, math.nan, 1.0, 1.0, share)

    monkeypatch.setattr("metroem.training.stage.validate", scored)


def best_and_last(run):
    folder = run / "pyramid/.train/ck"
    best = next((run / "pyramid").glob("0_*/model/ck.state.pth.tar"), None)
    last = folder / "stage_0_last.state.pth.tar"
    return best and best.read_bytes(), last.read_bytes()


@pytest.mark.parametrize("worse", [(0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_an_epoch_without_a_score_is_never_the_best(run, monkeypatch, caplog, worse):
    known_losses(monkeypatch, [worse, (5.0, 1.0), worse])
    train.main(arguments(run, *ONE_STAGE))
    state = torch.load(run / "pyramid/.train/ck/stage_0.state.pt", weights_only=True)
    best, last = best_and_last(run)
    assert best is not None and best != last and state["phase"] == 1
    assert "no score, so not the best" in caplog.text
    assert ("the network has collapsed" in caplog.text) == (worse[1] == 0)


def test_a_stage_without_any_score_says_so_and_keeps_what_was_there(
    run, monkeypatch, caplog
):
    known_losses(monkeypatch, [(0.0, 0.0)] * 6)
    train.main(arguments(run, *ONE_STAGE))
    assert "no epoch has a score on the held-out pairs" in caplog.text
    best, last = best_and_last(run)
    assert best == last and "Kept are the last weights" in caplog.text
    # Weights that it began from are better than those.
    path = next((run / "pyramid").glob("0_*/model/ck.state.pth.tar"))
    (run / "pyramid/.train/ck/stage_0.state.pt").unlink()
    train.main(arguments(run, *ONE_STAGE, "--seed", "5"))
    assert path.read_bytes() == best != best_and_last(run)[1]
    assert "Kept are the weights from before the phase" in caplog.text
