import math

import numpy as np
import pytest

from metroem.stack.histogram import Histogram


def test_figures_of_parts_are_those_of_all_values():
    values = np.random.default_rng(0).gamma(2, 3, 999)
    parts = [Histogram(0.02) for _ in range(3)]
    for part, share in zip(parts, np.array_split(values, 3), strict=True):
        part.add(share)
    total = Histogram(0.02)
    for part in parts:
        total.merge(part.pairs())
    assert total.count == 999
    assert total.mean() == pytest.approx(values.mean(), abs=0.001)
    for fraction in (0.05, 0.5, 0.95):
        exact = np.sort(values)[int(fraction * 999)]
        assert total.percentile(fraction) == pytest.approx(exact, abs=0.0101)


def test_values_that_are_not_known_do_not_count():
    histogram = Histogram(0.5)
    histogram.add(np.array([[1.0, np.nan], [np.inf, -2.1]]))
    assert histogram.pairs() == [(-4, 1), (2, 1)]
    assert histogram.mean() == -0.5


def test_without_values_nothing_is_known():
    histogram = Histogram(0.5)
    histogram.add(np.array([np.nan]))
    assert histogram.count == 0
    assert math.isnan(histogram.mean()) and math.isnan(histogram.percentile(0.5))


def test_the_last_percentile_is_the_largest_value():
    histogram = Histogram(1.0, [(3, 2), (7, 1)])
    assert histogram.percentile(0.0) == 3
    assert histogram.percentile(0.67) == 7
    assert histogram.percentile(1.0) == 7
