"""Rigidity and the plain loss are the original's, at tissue borders, too."""

import pytest
import torch

from metroem.imaging.loss_weights import PairMasks, pair_weights
from metroem.loss import PairLoss, plain_loss, rigidity
from metroem.specs.schedule import parse_mask_rules
from tests.compatibility.original import arrays


@pytest.fixture(scope="module")
def numbers():
    return arrays("loss")


# "torn" jumps by 20 px from pixel to pixel and is 0 outside of the tissue.
@pytest.mark.parametrize("name", ["smooth", "rough", "torn", "nothing"])
@pytest.mark.parametrize(
    ("suffix", "options"),
    [("", {}), ("_power_1", {"power": 1}), ("_diagonal", {"diagonal_mult": 0.5})],
)
def test_rigidity_is_that_of_the_original(numbers, name, suffix, options):
    found = rigidity(numbers[f"field_{name}"], **options)

    expected = numbers[f"rigidity_{name}{suffix}"]
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_loss_along_tissue_borders_is_that_of_the_original(numbers):
    src, tgt, field = (numbers[f"pair_{name}"] for name in ("src", "tgt", "field"))
    eq = {"binarization": {"strat": "eq", "value": 0}}
    similarity = {
        "src": [{"name": "src_zeros", **eq}],
        "tgt": [{"name": "tgt_zeros", **eq}],
    }
    smoothness = {"src": [{"name": "src_zeros", "mask_value": 1e-5, **eq}]}
    maps = PairMasks(src, tgt)
    weights = [
        pair_weights(parse_mask_rules(rules, ""), maps)
        for rules in (similarity, smoothness)
    ]
    pair = PairLoss(field, *weights, smoothness=7.0)

    terms = plain_loss(src, tgt, pair)

    expected = [numbers[f"pair_{n}"] for n in ("total", "similarity", "smoothness")]
    found = [terms.total, terms.similarity, 7 * terms.rigidity]
    for ours, theirs in zip(found, expected, strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=1e-5)
