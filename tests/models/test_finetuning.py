import pytest
import torch

from metroem.errors import UsageError
from metroem.finetune.adam import FinetuneResult, summary
from metroem.geometry.field import warp
from metroem.models.finetuning import find_pair_masks, finetune
from metroem.models.options import AlignerOptions
from tests.pairs import texture

ROWS, COLS = 88, 120


@pytest.fixture
def pair():
    """src and tgt of mean 0 and std 1, tgt shifted by 1.5 px along cols."""
    image = texture(ROWS, COLS, seed=3)
    src = (image - image.mean()) / image.std()
    field = torch.zeros(1, 2, ROWS, COLS)
    field[:, 0] = 1.5
    return src, warp(src, field, padding="border")


def embedding(pair, level):
    """The image, and the image again as the only feature, at a level."""
    size = 2**level
    return tuple(
        torch.nn.functional.avg_pool2d(image, size, ceil_mode=True).repeat(1, 2, 1, 1)
        for image in pair
    )


@pytest.mark.parametrize(("knots", "level"), [((), 0), ((32, 16), 0), ((32, 16), 1)])
def test_a_field_is_finetuned_on_the_embeddings_of_its_level(pair, knots, level):
    options = AlignerOptions(
        finetune_knots=knots, finetune_level=level, finetune_sm=1.0
    )
    maps = find_pair_masks(*pair, (None, None), options)
    start = torch.zeros(1, 2, ROWS, COLS)

    tuned = finetune(start, embedding(pair, level), maps, options)

    found = tuned.field[..., 12:-12, 12:-12].mean((0, 2, 3))
    torch.testing.assert_close(found, torch.tensor([1.5, 0.0]), atol=0.15, rtol=0)
    assert (tuned.loss_after < tuned.loss_before).all()


def test_defects_that_are_not_given_are_found():
    image = texture(200, 240, seed=3)
    tgt = (image - image.mean()) / image.std()
    src = tgt.clone()
    src[..., 40:56, :] = -3.0
    given = torch.zeros_like(tgt, dtype=torch.bool)

    ours = find_pair_masks(
        src, tgt, (None, given), AlignerOptions(finetune_knots=(16,))
    )
    original = find_pair_masks(src, tgt, (None, given), AlignerOptions())

    assert ours.src_defects is not None and original.src_defects is not None
    assert ours.src_defects[..., 42:54, :].all() and not original.src_defects.any()
    assert ours.tgt_defects is given


@pytest.mark.parametrize("by_trust", [False, True])
def test_what_is_masked_or_not_trusted_pulls_at_nothing(pair, by_trust):
    src, tgt = pair
    tgt = tgt.clone()
    tgt[..., 30:60] = src[..., 30:60]  # as if it had not moved there
    mask = torch.zeros_like(tgt, dtype=torch.bool)
    mask[..., 26:64] = True
    options = AlignerOptions(finetune_knots=(32, 16), finetune_sm=1e5)

    def found(defects, confidence=None):
        maps = find_pair_masks(src, tgt, defects, options)
        start = torch.zeros(1, 2, ROWS, COLS)
        features = embedding((src, tgt), 0)
        tuned = finetune(start, features, maps, options, confidence=confidence)
        return float(tuned.field[:, 0, 12:-12, 16:22].mean())

    none = torch.zeros_like(mask)
    without = found((none, none), (~mask).float()) if by_trust else found((none, mask))
    assert abs(without - 1.5) < 0.5 * abs(found((none, none)) - 1.5)


def test_levels_belong_to_knots():
    with pytest.raises(UsageError, match="finetune_level 1 without finetune_knots"):
        AlignerOptions(finetune_level=1)


def test_a_summary_gives_the_means_over_samples_and_over_results():
    field = torch.zeros(1, 2, 4, 6)
    before, after = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])
    results = [
        FinetuneResult(field, before, after, 10),
        FinetuneResult(field, before[:1], after[:1], 5),
    ]
    assert summary(results) == (
        "finetuned 2 pairs: loss 1.667 -> 1.333 in 7.5 steps (means)"
    )
