"""align_stack on arrays: known shifts, and what it refuses before a network runs."""

from typing import Any

import numpy as np
import pytest
import torch

import metroem
from metroem.errors import UsageError
from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from metroem.models.weights import checkpoint_path, save_weights
from tests.models.specs import CORRELATION, write_spec
from tests.stack.textures import waves

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


def test_fields_lead_to_the_tissue_of_the_middle_section(tmp_path):
    (module,) = init_pyramid(tmp_path, [0])
    write_spec(module / "model", CORRELATION)
    torch.manual_seed(0)
    loaded: Any = load_module(module, checkpoint_name=None)
    weights = checkpoint_path(module / "model", "checkpoint")
    save_weights(loaded.aligner.net, weights)
    shifts = np.array([(0, 0), (12, -7), (-5, 9), (3, 20)], float)  # along rows, cols
    sections = [np.rint(waves(192, 256, shift)).astype(np.uint8) for shift in shifts]

    fields = metroem.align_stack(sections, tmp_path, fix=1)

    assert fields.shape == (4, 2, 192, 256) and fields.dtype == np.float32
    inner = fields[:, :, 40:-40, 40:-40]
    expected = (shifts - shifts[1])[:, ::-1, None, None]
    assert np.abs(inner - expected).max() < 0.2
