import math

import numpy as np
import pytest
import torch

from metroem.distort import Truth
from metroem.evaluate import Score, mean_score, score_pair


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
    return src, tgt, field, Truth(torch.from_numpy(field)[None], valid)


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
