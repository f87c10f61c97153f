import pytest
import torch

from metroem.errors import UsageError
from metroem.masks import (
    SIMILARITY_RULES,
    SMOOTHNESS_RULES,
    MaskRule,
    MaskRules,
    PairMaps,
    find_defects,
    grow,
    warp_mask,
    weigh,
)


def image(*values):
    return torch.tensor(values, dtype=torch.float32)[None, None]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("eq", [0, 1, 0]),
        ("neq", [1, 0, 1]),
        ("lt", [1, 0, 0]),
        ("gt", [0, 0, 1]),
        ("between", [0, 1, 0]),
        ("not_between", [1, 0, 1]),
    ],
)
def test_each_strategy_binarises_as_it_says(strategy, expected):
    rule = MaskRule("src", strategy=strategy, value=2.0, bounds=(1.5, 2.5))
    assert rule.weight(image([1, 2, 3])).flatten().tolist() == expected


def test_rings_grow_the_masked_area_in_turn():
    values = torch.ones(1, 1, 1, 9)
    values[..., 0] = 0
    rule = MaskRule("src", mask_value=0.1, rings=((1, 0.2), (2, 0.3)))
    weights = rule.weight(values).flatten().tolist()
    assert weights == pytest.approx([0.1, 0.2, 0.3, 0.3, 1, 1, 1, 1, 1])


def test_a_rule_may_look_at_one_channel():
    values = torch.tensor([[[[1.0, 1.0]], [[1.0, 0.0]]]])
    assert MaskRule("src", channel=0).weight(values).flatten().tolist() == [1, 1]
    assert MaskRule("src", channel=1).weight(values).flatten().tolist() == [1, 0]


def test_no_data_counts_in_neither_term_and_lets_the_field_tear():
    src, tgt = torch.ones(2, 1, 1, 6, 8)
    src[..., 0], tgt[..., 7] = 0, 0
    maps = PairMaps(src, tgt)

    similarity = weigh(SIMILARITY_RULES, maps)
    smoothness = weigh(SMOOTHNESS_RULES, maps)

    # The area grows by one pixel on each side.
    assert similarity.src[0, 0, 3].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert similarity.tgt[0, 0, 3].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert smoothness.src[0, 0, 3].tolist() == pytest.approx([1e-5, 0] + 6 * [1])
    assert (smoothness.tgt == 1).all()


def test_weights_of_src_go_along_with_it():
    src, tgt = torch.ones(2, 1, 1, 5, 9)
    src[..., 0] = 0
    weight = weigh(
        MaskRules(src=(MaskRule("src_zeros", strategy="eq"),)), PairMaps(src, tgt)
    )
    field = torch.zeros(1, 2, 5, 9)
    field[:, 0] = -3  # reads three cols to the left
    assert weight.along(field)[0, 0, 2].round().tolist() == [0] * 4 + [1] * 5


def test_defects_that_are_given_are_used():
    src, tgt = torch.ones(2, 1, 1, 5, 9)
    defects = torch.zeros(1, 1, 5, 9, dtype=torch.bool)
    defects[..., 4] = True
    weight = weigh(SIMILARITY_RULES, PairMaps(src, tgt, defects))
    assert weight.src[0, 0, 2].tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]


def test_an_unknown_map_or_strategy_is_refused():
    with pytest.raises(UsageError, match="'source'"):
        MaskRule("source")
    with pytest.raises(UsageError, match="'above'"):
        MaskRule("src", strategy="above")


def test_growing_goes_in_all_directions():
    mask = torch.zeros(1, 1, 5, 7, dtype=torch.bool)
    mask[..., 2, 3] = True
    grown = grow(mask, 1)
    assert grown.sum() == 9 and grown[..., 1:4, 2:5].all()


def test_a_warped_mask_lies_where_its_field_reads_it():
    mask = torch.zeros(1, 1, 5, 9, dtype=torch.bool)
    mask[..., 2:4] = True
    field = torch.zeros(1, 2, 5, 9)
    field[:, 0] = -2.5  # reads between cols 2 and 3 to the left: half of each
    assert warp_mask(mask, field)[0, 0, 2].tolist() == [
        c in (4, 5, 6) for c in range(9)
    ]


def test_defects_are_gaps_of_the_tissue_above_a_size():
    section = torch.ones(1, 1, 40, 60)
    section[..., 10:14, :] = 0  # a fold, 4 px wide: 240 px
    section[..., 30:33, 20:23] = 0  # a hole of 9 px
    section[..., :, 50:] = 0  # the end of the tissue
    defects = find_defects(section, min_thickness=8, min_px=20)
    assert defects[..., 10:14, :45].all()
    assert not defects[..., 25:, :].any()
    assert not defects[..., :8, 52:].any()


def test_a_section_without_gaps_has_no_defects():
    assert not find_defects(torch.ones(2, 1, 9, 12), min_thickness=4, min_px=1).any()
