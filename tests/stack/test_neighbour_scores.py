import numpy as np
import pytest

from metroem.stack.neighbour_scores import score_sections
from tests.stack.textures import waves

# Two windows along rows, three along cols; the far border is half filled and less.
ROWS, COLS = 200, 300


def stack(*shifts):
    """Sections of one texture, each moved."""
    return [waves(ROWS, COLS, shift) for shift in shifts]


def scores_of(sections, first=0):
    return list(score_sections(enumerate(sections), first))


def test_the_first_section_has_nothing_to_be_compared_with():
    first, second = scores_of(stack((0, 0), (0, 0)))
    assert (first.against == 0).all() and first.num_alone > 0
    assert np.isnan(first.correlation).all() and np.isnan(first.jumps).all()
    assert second.num_alone == 0


def test_jumps_lie_along_the_axes_on_which_they_were_made():
    _, moved, back = scores_of(stack((0, 0), (5, -3), (0, 0)))
    inner = (slice(0, 2), slice(0, 2))
    np.testing.assert_allclose(moved.vectors[inner][..., 1], 5, atol=0.1)
    np.testing.assert_allclose(moved.vectors[inner][..., 0], -3, atol=0.1)
    np.testing.assert_allclose(back.vectors[inner][..., 1], -5, atol=0.1)
    np.testing.assert_allclose(moved.jumps[inner], np.hypot(5, 3), atol=0.1)


def test_steady_drift_is_no_jitter():
    shifts = [(2.0 * z, -1.0 * z) for z in range(4)]
    *_, third, fourth = scores_of(stack(*shifts))
    assert np.nanmedian(third.jumps) == pytest.approx(np.hypot(2, 1), abs=0.05)
    assert np.nanmax(fourth.jitter[:2, :2]) < 0.15
    # One section that is off: by 6 px, then by 12 px back and forth.
    off = scores_of(stack((0, 0), (0, 0), (6, 0), (0, 0)))
    np.testing.assert_allclose(off[2].jitter[0, 0], 6, atol=0.1)
    np.testing.assert_allclose(off[3].jitter[0, 0], 12, atol=0.1)


def test_correlation_is_that_of_the_formula():
    one, other = waves(ROWS, COLS), waves(ROWS, COLS, seed=1)
    mixed = 0.6 * one + 0.4 * other
    _, scores = scores_of([one, mixed])
    for row, col in ((0, 0), (1, 2)):
        square = (slice(64 * row, 64 * row + 64), slice(64 * col, 64 * col + 64))
        exact = np.corrcoef(one[square].ravel(), mixed[square].ravel())[0, 1]
        found = scores.correlation[row // 2, col // 2, row % 2, col % 2]
        assert found == pytest.approx(exact, abs=1e-5)


def test_a_blank_section_is_carried_over_and_does_not_hide_a_jump():
    sections = stack((0, 0), (0, 0), (0, 0), (4, 0))
    sections[1][:] = sections[2][:] = 0
    _, blank, _, after = scores_of(sections)
    assert (blank.against == 0).all() and blank.num_alone == 0
    assert not blank.tissue.any()
    assert (after.against[:, :2] == 3).all()
    assert np.nanmedian(after.jumps) == pytest.approx(4, abs=0.1)


def test_drift_over_a_blank_section_is_no_jitter():
    sections = stack((0, 0), (2, 0), (4, 0), (6, 0), (8, 0))
    sections[2][:] = 0
    scores = scores_of(sections)
    assert scores[3].against[0, 0] == 2
    assert np.isnan(scores[3].jitter).all()  # the section before has no displacement
    # After two steps at once, one step of half the length is the same drift.
    assert np.nanmax(scores[4].jitter[:1, :2]) < 0.15


def test_a_hole_is_compared_with_the_section_before_it():
    sections = stack((0, 0), (0, 0), (0, 0))
    sections[1][:128, :128] = 0
    _, holed, after = scores_of(sections)
    assert holed.against[0, 0] == 0 and holed.against[0, 1] == 1
    assert after.against[0, 0] == 2 and after.against[0, 1] == 1
    assert after.jumps[0, 0] == pytest.approx(0, abs=0.05)


def test_sections_before_the_first_only_serve_as_reference():
    sections = stack((0, 0), (3, 0), (3, 0), (0, 0), (0, 0))
    whole = scores_of(sections)
    part = scores_of(sections, first=3)
    assert [one.z for one in part] == [3, 4]
    for one, other in zip(part, whole[3:], strict=True):
        np.testing.assert_array_equal(one.vectors, other.vectors)
        np.testing.assert_array_equal(one.jitter, other.jitter)
        np.testing.assert_array_equal(one.correlation, other.correlation)


def test_nan_and_infinite_pixels_have_no_data():
    sections = stack((0, 0), (0, 0))
    sections[1][:64, :128] = np.nan
    sections[1][64:128, :100] = np.inf
    _, scores = scores_of(sections)
    assert not scores.tissue[:64, :128].any()
    assert scores.against[0, 0] == 0 and scores.against[0, 1] == 1


def test_lost_windows_count_as_far_as_was_searched():
    other = waves(ROWS, COLS, seed=5)
    _, scores = scores_of([waves(ROWS, COLS), other])
    assert scores.lost[:, :2].all()
    assert (scores.errors[:, :2] == 16).all() and np.isnan(scores.jumps[:, :2]).all()
