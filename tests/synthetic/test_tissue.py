import numpy as np
import pytest

from metroem.errors import UsageError
from metroem.synthetic.tissue import (
    SmoothNoise,
    TissueRecipe,
    bspline_weights,
    make_tissue,
)

RECIPE = TissueRecipe(num_sections=5, rows=160, cols=128, seed=3)


@pytest.fixture(scope="module")
def tissue():
    return make_tissue(RECIPE)


def correlation(a, b):
    return np.corrcoef(a.ravel().astype(float), b.ravel().astype(float))[0, 1]


def test_tissue_has_the_shape_asked_for_and_no_blank_pixel(tissue):
    assert tissue.shape == (5, 160, 128)
    assert tissue.dtype == np.uint8
    assert tissue.min() >= 1


def test_the_same_seed_gives_the_same_tissue_and_another_seed_another(tissue):
    np.testing.assert_array_equal(make_tissue(RECIPE), tissue)
    other = make_tissue(TissueRecipe(num_sections=1, rows=160, cols=128, seed=4))
    assert abs(correlation(other[0], tissue[0])) < 0.3


def test_neighbouring_sections_correlate_without_being_equal(tissue):
    near = np.mean([correlation(tissue[z], tissue[z + 1]) for z in range(4)])
    far = correlation(tissue[0], tissue[4])
    assert 0.55 < near < 0.9
    assert far < near - 0.2


def test_tissue_off_by_a_few_pixels_correlates_less(tissue):
    # Membranes are about 4 px wide, so 6 px is enough to lose them.
    aligned = correlation(tissue[1][8:-8, 8:-8], tissue[0][8:-8, 8:-8])
    moved = correlation(tissue[1][8:-8, 14:-2], tissue[0][8:-8, 8:-8])
    assert moved < aligned - 0.2


def test_tissue_has_dark_membranes_and_bright_cytoplasm(tissue):
    dark, middle = np.percentile(tissue, [5, 50])
    assert dark < 85
    assert middle > 120


def test_tissue_without_sections_is_refused():
    with pytest.raises(UsageError, match="must be positive"):
        TissueRecipe(num_sections=0)


def test_spline_weights_sum_to_one_and_peak_at_two_thirds_on_a_knot():
    weights = bspline_weights(np.array([1.0, 1.5, 2.25]), 5)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(weights[0], [1 / 6, 2 / 3, 1 / 6, 0, 0], atol=1e-6)


def test_smooth_noise_has_unit_deviation_and_changes_little_in_a_pixel():
    rng = np.random.default_rng(0)
    noise = SmoothNoise(rng, (40.0, 300.0, 200.0), (10.0, 8.0))
    plane = noise.section(20.0)
    assert plane.shape == (300, 200)
    # About 25 * 37 independent values: the deviation is known to 3 %, and the
    # variance of B-splines varies by 4 % a dimension between knots.
    assert 0.85 < plane.std() < 1.15
    assert np.abs(np.diff(plane, axis=0)).max() < 0.6
