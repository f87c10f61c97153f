"""One linear range of grey levels, mapped to 1..255."""

import numpy as np
import pytest

from metroem.errors import DatasetError
from metroem.imaging.grey_range import GreyRange, find_grey_range


def test_the_range_becomes_1_to_255_and_0_stays_0():
    levels = np.array([[0, 1000, 1127], [1254, 900, 60000]], np.uint16)
    mapped, clipped, tissue = GreyRange(1000, 1254).to_uint8(levels)
    np.testing.assert_array_equal(mapped, [[0, 1, 128], [255, 1, 255]])
    assert mapped.dtype == np.uint8 and (clipped, tissue) == (2, 5)


def test_nan_is_no_data():
    mapped, _, tissue = GreyRange(1, 2).to_uint8(np.array([np.nan, 1.0, 0.0, 2.0]))
    np.testing.assert_array_equal(mapped, [0, 1, 0, 255])
    assert tissue == 2


def test_a_range_that_begins_below_0_has_0_as_a_grey_level():
    levels = np.array([-127, 0, 127], np.int16)
    mapped, clipped, tissue = GreyRange(-127, 127).to_uint8(levels)
    np.testing.assert_array_equal(mapped, [1, 128, 255])
    assert (clipped, tissue) == (0, 3)


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        (np.array([-3, 5], np.int16), "below 0, such as -3.*--grey_range"),
        (np.array([np.inf, 5.0]), "infinite"),
    ],
)
def test_levels_that_cannot_be_right_are_refused(levels, words):
    with pytest.raises(DatasetError, match=words):
        GreyRange(1, 2).to_uint8(levels)


def test_the_range_is_that_of_tissue_without_its_extremes():
    levels = np.arange(1000, 3001, dtype=np.uint16)  # evenly: percentiles are exact
    blank = np.zeros(5000, np.uint16)
    found = find_grey_range([levels, blank])
    assert found == GreyRange(pytest.approx(1002.0), pytest.approx(2998.0))
    hot = np.concatenate([levels, [65535]])
    assert find_grey_range([hot]).high < 3001


@pytest.mark.parametrize(
    ("sample", "words"),
    [(np.zeros(9), "are blank.*--grey_range"), (np.full(9, 4.0), "one grey level, 4")],
)
def test_a_range_that_cannot_be_found_has_to_be_stated(sample, words):
    with pytest.raises(DatasetError, match=words):
        find_grey_range([sample])
