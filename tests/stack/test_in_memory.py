"""align_stack on arrays: what it refuses before a network runs."""

import numpy as np
import pytest

import metroem
from metroem.errors import UsageError

PAIR = [np.ones((40, 50), np.uint8)] * 2


@pytest.mark.parametrize(
    ("sections", "options", "match"),
    [
        (PAIR[:1], {}, "1 sections .*: expected two or more"),
        ([PAIR[0], np.ones((50, 40), np.uint8)], {}, "of one shape"),
        ([one.astype(float) for one in PAIR], {}, "float64.*: expected .* uint8"),
        ([np.ones((40, 50, 3), np.uint8)] * 2, {}, r"expected .* \[rows, cols\]"),
        ([one.tolist() for one in PAIR], {}, "int64.*: expected .* uint8"),
        (PAIR, {"fix": 2}, "fix 2: expected 0 to 1"),
        (PAIR, {"fix": -1}, "fix -1: expected 0 to 1"),
        (PAIR, {"neighbours": 0}, "neighbours 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_aligned_is_refused(sections, options, match):
    with pytest.raises(UsageError, match=match):
        metroem.align_stack(sections, "nowhere", **options)
