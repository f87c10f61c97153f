import math

import numpy as np
import pytest
import torch

from metroem.data.sample import Sample
from metroem.evaluation.metrics import EndpointError
from metroem.evaluation.scores import (
    Score,
    WarpScore,
    mean_score,
    score_aligned,
    score_known,
    score_pair,
)
from metroem.synthetic.distortion import GroundTruth

SHAPE = (160, 224)  # two rows of three chunks of 64 px, and some more


@pytest.fixture
def moved_pair():
    # src shows at col + 3 what tgt shows at col: the truth is +3 along cols.
    rng = np.random.default_rng(0)
    tgt = rng.integers(1, 255, (96, 128)).astype(np.uint8)
    src = np.roll(tgt, 3, axis=1)
    field = np.zeros((2, 96, 128), np.float32)
    field[0] = 3
    valid = torch.zeros(1, 1, 96, 128, dtype=torch.bool)
    valid[..., 16:-16, 16:-16] = True
    return src, tgt, field, GroundTruth(torch.from_numpy(field)[None], valid)


def test_the_true_field_scores_no_error_and_full_correlation(moved_pair):
    src, tgt, field, truth = moved_pair
    score = score_pair(src, tgt, [0 * field, field], truth)
    assert score.epe_none == pytest.approx(3)
    assert score.epe == pytest.approx((3, 0))
    assert score.cpc[0] == score.cpc_none < 0.3
    assert score.cpc[1] == pytest.approx(1, abs=1e-6)
    assert score.cpc_true == pytest.approx(1, abs=1e-6)
    assert score.folds == 0


def test_without_a_truth_errors_are_unknown_and_correlations_are_not(moved_pair):
    src, tgt, field, _ = moved_pair
    score = score_pair(src, tgt, [field])
    assert math.isnan(score.epe_none)
    assert math.isnan(score.epe[0])
    assert math.isnan(score.cpc_true)
    assert score.cpc[0] == pytest.approx(1, abs=1e-6)


def test_blank_pixels_count_for_nothing(moved_pair):
    src, tgt, field, _ = moved_pair
    blank = tgt.copy()
    blank[20:40, 30:60] = 0
    score = score_pair(src, blank, [field])
    assert score.cpc[0] == pytest.approx(1, abs=1e-6)


def test_means_leave_unknown_figures_out():
    nan = float("nan")
    one = Score(2.0, (1.0, 0.5), 0.1, (0.4, 0.6), 0.7, 0.0)
    two = Score(nan, (nan, nan), 0.3, (0.6, 0.8), nan, 0.2)
    mean = mean_score([one, two])
    assert mean.epe_none == 2.0
    assert mean.epe == (1.0, 0.5)
    assert mean.cpc == pytest.approx((0.5, 0.7))
    assert mean.cpc_true == 0.7
    assert mean.folds == pytest.approx(0.1)


def constant(d_cols, d_rows):
    return torch.tensor([d_cols, d_rows]).view(1, 2, 1, 1).expand(1, 2, *SHAPE).clone()


@pytest.fixture
def sample():
    """A pair whose src shows at col + 3 what tgt shows at col."""
    tgt = torch.randn(1, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    return Sample(tgt.roll(3, dims=-1), tgt, None, ("pair",))


def noise(rows, cols):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(1))


def test_figures_of_a_pair_by_hand(sample):
    # There and back ends 0.5 px off, everywhere, as does the inverse.
    score, worst = score_aligned(sample, constant(3.0, 0.0), constant(-2.5, 0.0))
    assert score.cpc == pytest.approx(1, abs=1e-6)
    assert abs(score.cpc_before) < 0.1 and score.made_worse == 0
    assert score.length_px == 3.0
    assert (score.cycle_mean_px, score.cycle_p95_px) == (0.5, 0.5)
    assert score.swap_mean_px == pytest.approx(0.5, abs=1e-5)
    assert (score.folds_ppm, score.det_p01, score.det_p99) == (0, 1, 1)
    assert score.counted == pytest.approx((160 - 32) * (224 - 32) / (160 * 224))
    assert math.isnan(score.ring_cpc)  # no defect
    assert worst.figure == pytest.approx(1, abs=1e-6)


def test_the_worst_chunk_is_found(sample):
    spoiled = sample.tgt.clone()
    spoiled[0, 0, 64:128, 128:192] = noise(64, 64)
    sample = sample._replace(tgt=spoiled)
    _, worst = score_aligned(sample, constant(3.0, 0.0), constant(-3.0, 0.0))
    assert (worst.row, worst.col) == (96, 160) and abs(worst.figure) < 0.1


@pytest.mark.parametrize("given", [False, True])
def test_the_ring_around_a_defect_is_told_apart(sample, given):
    # A crack along row 64; all within 32 px of it is another tissue, and the rest
    # of the chunks, rows 96 to 127, is right.
    tgt = sample.tgt.clone()
    tgt[0, 0, 28:102] = noise(74, 224)
    crack = torch.zeros_like(tgt, dtype=torch.bool)
    crack[..., 60:70, :] = True
    tgt[crack] = 0
    sample = sample._replace(tgt=tgt)
    if given:
        sample = sample._replace(src_defects=crack ^ crack, tgt_defects=crack)
    score, _ = score_aligned(sample, constant(3.0, 0.0), constant(-3.0, 0.0))
    assert abs(score.ring_cpc) < 0.05 < 0.2 < score.cpc
    # What a defect hides is not counted: 10 rows of 192 columns off the border.
    assert score.counted == pytest.approx((128 - 10) * 192 / (160 * 224))


def test_folds_on_a_defect_are_not_counted(sample):
    field = constant(0.0, 0.0)
    field[:, 1, 64:] = -4.0  # turns back between rows 63 and 64
    crack = torch.zeros(1, 1, *SHAPE, dtype=torch.bool)
    crack[..., 62:66, :] = True
    torn = sample._replace(src_defects=crack ^ crack, tgt_defects=crack)
    whole = sample._replace(src_defects=crack ^ crack, tgt_defects=crack ^ crack)
    back = constant(0.0, 0.0)
    assert score_aligned(torn, field, back)[0].folds_ppm == 0
    # Central differences see it in 2 of the 158 rows that have neighbours.
    found = score_aligned(whole, field, back)[0].folds_ppm
    assert found == pytest.approx(1e6 * 2 / 158)


@pytest.mark.parametrize("d_cols", [1000.0, float("nan")])
def test_a_field_that_leaves_nothing_to_compare_made_its_pair_worse(sample, d_cols):
    same = sample._replace(src=sample.tgt)
    score, worst = score_aligned(same, constant(d_cols, 0.0), constant(0.0, 0.0))
    assert score.counted == 0 and score.made_worse == 1
    assert score.cpc_before == pytest.approx(1) and score.cpc == worst.figure == 0


def test_a_pair_aligned_already_is_made_worse_by_a_wrong_field(sample):
    same = sample._replace(src=sample.tgt)
    none, wrong = constant(0.0, 0.0), constant(2.0, 0.0)
    assert score_aligned(same, none, none)[0].made_worse == 0
    assert score_aligned(same, wrong, none)[0].made_worse == 1


def test_errors_against_a_known_warp_by_hand():
    truth, field = constant(3.0, 4.0), constant(3.0, 4.0)
    field[:, 0, :, 192:208] += 9.0  # 16 of the 192 columns that count
    near = torch.zeros(1, 1, *SHAPE, dtype=torch.bool)
    near[..., 184:216] = True  # 24 of them
    known = GroundTruth(truth, torch.ones_like(near))

    score, worst = score_known(field, known, near, constant(0.3, 0.4))

    assert score.before.mean == pytest.approx(5) and score.made_worse == 0
    assert score.after.mean == pytest.approx(9 * 16 / 192)
    assert score.after.above_eight == pytest.approx(16 / 192)
    assert score.near_px == pytest.approx(9 * 16 / 24)
    assert score.identity_px == pytest.approx(0.5)
    # The last chunks end at col 192, before the error: every chunk is right.
    assert worst.figure == 0


def test_a_field_longer_than_the_warp_made_its_section_worse():
    known = GroundTruth(constant(1.0, 0.0), torch.ones(1, 1, *SHAPE, dtype=torch.bool))
    field = constant(1.0, 0.0)
    field[..., 64:128, 64:128] = 20.0
    score, worst = score_known(field, known, known.valid, constant(0.0, 0.0))
    assert score.made_worse == 1
    assert (worst.row, worst.col) == (96, 96)
    assert worst.figure == pytest.approx(math.hypot(19, 20))


def test_means_go_into_figures_of_figures():
    nan = float("nan")
    none = EndpointError(*[4.0] * 8)
    one = WarpScore(none, EndpointError(*[1.0] * 8), nan, 0.0, 0.01, 0.0)
    two = WarpScore(none, EndpointError(*[3.0] * 8), 2.0, 5.0, 0.03, 1.0)
    mean = mean_score([one, two])
    assert isinstance(mean, WarpScore) and isinstance(mean.after, EndpointError)
    assert mean.after.above_eight == 2.0 and mean.near_px == 2.0
    assert (mean.folds_ppm, mean.made_worse) == (2.5, 0.5)


def test_what_a_field_loses_of_a_chunk_counts_as_unlike(sample):
    # Aligned, but for the cols from 128 on, which point out of the image.
    field = constant(3.0, 0.0)
    field[:, 0, :, 112:] = 500.0
    score, worst = score_aligned(sample, field, constant(-3.0, 0.0))
    # Two rows of three chunks, of which cols 16 to 63, 64 to 127 and 128 to 191 count:
    # all, three quarters and nothing of them are kept, and right.
    assert score.cpc == pytest.approx((1 + 0.75 + 0) / 3, abs=1e-6)
    assert worst.figure == 0 and (worst.row, worst.col) == (32, 160)
    assert score.length_px == pytest.approx((3 * 96 + 500 * 96) / 192)
    assert score.counted == pytest.approx(128 * 96 / (160 * 224))


def test_a_field_does_not_choose_the_ring_that_it_is_scored_on(sample):
    # A defect of src, and a field that moves it out of sight: its ring stays due.
    crack = torch.zeros(1, 1, *SHAPE, dtype=torch.bool)
    crack[..., 70:80, 60:120] = True
    torn = sample._replace(src_defects=crack, tgt_defects=crack ^ crack)
    score, _ = score_aligned(torn, constant(900.0, 0.0), constant(0.0, 0.0))
    assert score.ring_cpc == 0 and abs(score.ring_cpc_before) < 0.1


def test_a_stage_that_points_away_is_scored_by_what_it_loses(moved_pair):
    src, tgt, field, truth = moved_pair
    lost = score_pair(src, tgt, [np.full_like(field, 700.0), field], truth)
    whole = score_pair(src, tgt, [field, field], truth)
    # The other stage, and the pair without alignment, are scored as ever.
    assert lost.cpc == pytest.approx((0, 1), abs=1e-6)
    assert lost.cpc_none == whole.cpc_none and lost.cpc_true == whole.cpc_true
