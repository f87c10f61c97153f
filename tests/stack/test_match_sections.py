"""Matching two sections: turns, shifts, crops and contrast that were put in."""

import subprocess
import sys
import warnings

import cv2
import numpy as np
import pytest

import metroem
from metroem.errors import UsageError
from metroem.geometry import affine
from metroem.stack import match_sections
from metroem.stack.match_sections import Section, match, place
from metroem.synthetic.tissue import TissueRecipe, make_tissue

SHAPE = 330, 380


@pytest.fixture(scope="module")
def tissue():
    """Two neighbouring sections, and one of other tissue."""
    one, other = make_tissue(TissueRecipe(2, *SHAPE, seed=3))
    unlike = make_tissue(TissueRecipe(1, *SHAPE, seed=4))[0]
    return one, other, unlike


def similarity(degrees, shift, size=1.0):
    """The map that turns about the middle of the section: tgt -> src."""
    angle = np.radians(degrees)
    linear = size * np.array(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    )
    middle = (np.array(SHAPE[::-1]) - 1) / 2
    return np.column_stack([linear, middle + shift - linear @ middle])


def moved(section, matrix, shape=SHAPE):
    """Move a section by a map, original -> moved; 0 where it shows nothing."""
    size = shape[::-1]
    image = cv2.warpAffine(section, matrix, size, flags=cv2.INTER_CUBIC)
    tissue = cv2.warpAffine(np.ones_like(section), matrix, size)
    return np.where(tissue > 0, np.maximum(image, 1), 0).astype(np.uint8)


def error_px(found, truth):
    """Mean distance over the section, px."""
    points = np.stack(
        np.meshgrid(np.arange(0, SHAPE[1], 20), np.arange(0, SHAPE[0], 20))
    )
    points = points.reshape(2, -1).T.astype(float)
    return np.hypot(
        *(affine.apply(found, points) - affine.apply(truth, points)).T
    ).mean()


@pytest.mark.parametrize("degrees", [0, 37, 90, -141, 180])
def test_any_turn_and_shift_is_found(tissue, degrees):
    truth = similarity(degrees, (60, -45), 1.01)

    found = place(moved(tissue[1], truth, (480, 500)), tissue[0])

    assert error_px(found, truth) < 1.3


def test_less_than_half_in_common_is_enough(tissue):
    truth = similarity(70, (130, 110))
    src = moved(tissue[1], truth)  # the rest is lost at the frame
    assert 0.25 < (src > 0).mean() < 0.5

    assert error_px(place(src, tissue[0]), truth) < 2.5


def test_inverted_contrast_is_found(tissue):
    truth = similarity(-20, (15, 30))
    src = moved(255 - tissue[1], truth)

    found = match(Section(src), Section(tissue[0]))

    assert found is not None and error_px(found.matrix, truth) < 1.3


@pytest.mark.parametrize(
    ("degrees", "is_inverted"), [(38, True), (128, False), (-128, True), (-38, False)]
)
def test_correlation_finds_what_has_no_keypoints(
    tissue, monkeypatch, degrees, is_inverted
):
    monkeypatch.setattr(match_sections, "_propose_by_keypoints", lambda pair: [])
    truth = similarity(degrees, (-40, 25))
    contrast = 255 - tissue[1] if is_inverted else tissue[1]

    found = match(Section(moved(contrast, truth, (450, 470))), Section(tissue[0]))

    assert found is not None and found.how == "correlation"
    assert error_px(found.matrix, truth) < 1.3


@pytest.mark.parametrize(
    ("score", "correlates", "how"),
    [
        (7.9, True, "correlation"),
        (7.9, False, "keypoints"),
        (8.0, True, "keypoints"),
    ],
)
def test_a_match_by_keypoints_that_is_not_sure_is_compared_with_correlation(
    tissue, monkeypatch, score, correlates, how
):
    """The best map by keypoints had 7.2 in two sections, and was 39 px off."""
    best = match_sections._best

    def score_keypoints(pair, proposals, by):
        found = best(pair, proposals, by)
        return found._replace(score=score) if by == "keypoints" else found

    monkeypatch.setattr(match_sections, "_best", score_keypoints)
    if not correlates:
        monkeypatch.setattr(match_sections, "_propose_by_correlation", lambda pair: [])

    found = match(Section(tissue[1]), Section(tissue[0]))

    assert found is not None and found.how == how


def test_points_of_a_match_show_the_same_tissue(tissue):
    truth = similarity(50, (20, 10))

    found = match(Section(moved(tissue[1], truth)), Section(tissue[0]))

    assert found is not None and found.how == "keypoints" and found.score > 10
    assert 20 < len(found.src_points) <= 250
    off = found.src_points - affine.apply(truth, found.tgt_points)
    assert np.median(np.hypot(*off.T)) < 2


@pytest.mark.parametrize("turned", [False, True])
def test_other_tissue_is_refused(tissue, turned):
    src = moved(tissue[2], similarity(65, (20, -20))) if turned else tissue[2]

    assert place(src, tissue[0]) is None
    assert place(src, tissue[0], flip=True) is None


def test_parts_without_overlap_are_refused(tissue):
    left, right = tissue[1].copy(), tissue[0].copy()
    left[:, 170:] = 0
    right[:, :210] = 0

    assert place(left, right) is None


def test_mirrored_sections_are_found_only_if_asked_for(tissue):
    flip = np.array([[-1.0, 0.0, SHAPE[1] - 1], [0.0, 1.0, 0.0]])
    turn = similarity(-33, (12, 8))
    src = moved(np.ascontiguousarray(tissue[1][:, ::-1]), turn)
    truth = affine.compose(flip, turn)

    assert place(src, tissue[0]) is None
    found = place(src, tissue[0], flip=True)
    assert affine.determinant(found) < 0 and error_px(found, truth) < 1.3


def test_models_keep_what_they_promise(tissue):
    stretch = np.array([[1.03, 0.01, 4.0], [0.0, 0.98, 6.0]])
    src = moved(tissue[1], stretch)

    rigid, similar, full = (
        place(src, tissue[0], model) for model in ("rigid", "similarity", "affine")
    )

    assert affine.scale(rigid) == pytest.approx(1, abs=1e-9)
    linear = similar[:, :2]
    np.testing.assert_allclose(
        linear @ linear.T, affine.determinant(similar) * np.eye(2), atol=1e-9
    )
    assert error_px(full, stretch) < 1.3 < error_px(rigid, stretch)


def test_a_wrong_guess_does_no_harm(tissue):
    truth = similarity(25, (5, -9))
    src, tgt = Section(moved(tissue[1], truth)), Section(tissue[0])

    right = match(src, tgt, guess=truth)
    wrong = match(src, tgt, guess=similarity(-110, (90, 80)))

    assert right is not None and wrong is not None
    assert error_px(right.matrix, truth) < 1.3
    assert error_px(wrong.matrix, truth) < 1.3


@pytest.mark.parametrize("image", [np.zeros(SHAPE, np.uint8), np.eye(6, 9, dtype="u1")])
def test_blank_sections_match_nothing(tissue, image):
    assert Section(image).is_blank
    assert place(image, tissue[0]) is None and place(tissue[0], image) is None


def test_sections_of_other_types_are_matched_as_bytes_are(tissue):
    truth = similarity(15, (3, 4))
    src = moved(tissue[1], truth)

    expected = place(src, tissue[0])
    for scaled in (src.astype(np.uint16) * 200, src.astype(np.float32) / 255):
        found = place(scaled, tissue[0])
        assert error_px(found, expected) < 0.3


def test_the_same_sections_give_the_same_matrix(tissue):
    src = moved(tissue[1], similarity(77, (30, -10)))

    np.testing.assert_array_equal(place(src, tissue[0]), metroem.place(src, tissue[0]))


def test_large_sections_are_reduced(tissue):
    truth = similarity(40, (8, -6))
    src = moved(tissue[1], truth)
    large = [np.kron(image, np.ones((4, 4), np.uint8)) for image in (src, tissue[0])]

    found = match(Section(large[0]), Section(large[1]), thumbnail_px=512)

    assert found is not None
    assert error_px(affine.change_mip(found.matrix, 0, 2), truth) < 1.3


def test_importing_metroem_does_not_import_opencv():
    code = "import sys, metroem, metroem.__main__; sys.exit('cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_pixels_that_are_not_finite_have_no_data(tissue):
    one, other, _ = tissue
    for bad in (np.nan, np.inf, -np.inf, 1e39):
        src = one.astype(np.float64)
        src[:9], src[50, 60] = bad, bad
        blank = np.where(src == one, src, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = place(src, other)
        assert found is not None
        np.testing.assert_array_equal(found, place(blank, other))


@pytest.mark.parametrize("shape", [(40, 50, 3), (0, 50), (40,)])
def test_images_that_are_not_grey_levels_are_refused(tissue, shape):
    with pytest.raises(UsageError, match="expected grey levels"):
        place(np.ones(shape, np.uint8), tissue[0])
    assert metroem.place([[0, 0], [0, 0]], tissue[0]) is None  # type: ignore[arg-type]
