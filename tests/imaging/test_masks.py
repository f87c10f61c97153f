import pytest
import torch

from metroem.errors import UsageError
from metroem.imaging.defects import find_bands, find_defects, find_gaps
from metroem.imaging.loss_weights import PairMasks, pair_weights, rule_weight
from metroem.imaging.mask_rules import (
    SIMILARITY_RULES,
    SMOOTHNESS_RULES,
    MaskRule,
    MaskRules,
)
from metroem.imaging.masks import dilate, warp_mask
from metroem.models.options import AlignerOptions


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
    assert rule_weight(rule, image([1, 2, 3])).flatten().tolist() == expected


def test_rings_grow_the_masked_area_in_turn():
    values = torch.ones(1, 1, 1, 9)
    values[..., 0] = 0
    rule = MaskRule("src", mask_value=0.1, rings=((1, 0.2), (2, 0.3)))
    weights = rule_weight(rule, values).flatten().tolist()
    assert weights == pytest.approx([0.1, 0.2, 0.3, 0.3, 1, 1, 1, 1, 1])


def test_a_rule_may_look_at_one_channel():
    values = torch.tensor([[[[1.0, 1.0]], [[1.0, 0.0]]]])
    assert rule_weight(MaskRule("src", channel=0), values).flatten().tolist() == [1, 1]
    assert rule_weight(MaskRule("src", channel=1), values).flatten().tolist() == [1, 0]


def test_no_data_counts_in_neither_term_and_lets_the_field_tear():
    src, tgt = torch.ones(2, 1, 1, 6, 8)
    src[..., 0], tgt[..., 7] = 0, 0
    maps = PairMasks(src, tgt)

    similarity = pair_weights(SIMILARITY_RULES, maps)
    smoothness = pair_weights(SMOOTHNESS_RULES, maps)

    # The area grows by one pixel on each side.
    assert similarity.src[0, 0, 3].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert similarity.tgt[0, 0, 3].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert smoothness.src[0, 0, 3].tolist() == pytest.approx([1e-5, 0] + 6 * [1])
    assert (smoothness.tgt == 1).all()


def test_weights_of_src_go_along_with_it():
    src, tgt = torch.ones(2, 1, 1, 5, 9)
    src[..., 0] = 0
    weight = pair_weights(
        MaskRules(src=(MaskRule("src_zeros", strategy="eq"),)), PairMasks(src, tgt)
    )
    field = torch.zeros(1, 2, 5, 9)
    field[:, 0] = -3  # reads three cols to the left
    assert weight.along(field)[0, 0, 2].round().tolist() == [0] * 4 + [1] * 5


def test_defects_that_are_given_are_used():
    src, tgt = torch.ones(2, 1, 1, 5, 9)
    defects = torch.zeros(1, 1, 5, 9, dtype=torch.bool)
    defects[..., 4] = True
    weight = pair_weights(SIMILARITY_RULES, PairMasks(src, tgt, defects))
    assert weight.src[0, 0, 2].tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]


def test_an_unknown_map_or_strategy_is_refused():
    with pytest.raises(UsageError, match="'source'"):
        MaskRule("source")
    with pytest.raises(UsageError, match="'above'"):
        MaskRule("src", strategy="above")


def test_growing_reaches_the_border_and_stops_there():
    mask = torch.zeros(2, 1, 4, 7, dtype=torch.bool)
    mask[0, 0, 1, 5] = True
    grown = dilate(mask, 2)
    assert grown[0, 0, :, 3:].all() and grown.sum() == 16
    assert mask.sum() == 1 and dilate(mask, 9)[0].all()


def test_growing_goes_in_all_directions():
    mask = torch.zeros(1, 1, 5, 7, dtype=torch.bool)
    mask[..., 2, 3] = True
    grown = dilate(mask, 1)
    assert grown.sum() == 9 and grown[..., 1:4, 2:5].all()


def test_a_warped_mask_lies_where_its_field_reads_it():
    mask = torch.zeros(1, 1, 5, 9, dtype=torch.bool)
    mask[..., 2:4] = True
    field = torch.zeros(1, 2, 5, 9)
    field[:, 0] = -2.5  # reads between cols 2 and 3 to the left: half of each
    assert warp_mask(mask, field)[0, 0, 2].tolist() == [
        c in (4, 5, 6) for c in range(9)
    ]


def test_gaps_are_zeros_inside_the_tissue_above_a_size():
    section = torch.ones(1, 1, 40, 60)
    section[..., 10:14, :] = 0  # a fold, 4 px wide: 240 px
    section[..., 30:33, 20:23] = 0  # a hole of 9 px
    section[..., :, 50:] = 0  # the end of the tissue
    defects = find_gaps(section, min_thickness=8, min_px=20)
    assert defects[..., 10:14, :45].all()
    assert not defects[..., 25:, :].any()
    assert not defects[..., :8, 52:].any()


def test_a_section_without_gaps_has_no_defects():
    assert not find_defects(torch.ones(2, 1, 9, 12), min_thickness=4, min_px=1).any()
    assert not find_defects(torch.zeros(2, 1, 9, 13)).any()


ROWS, COLS = 300, 421


def section(seed=0):
    """Membranes 4 px wide and mitochondria of 28 px in noise; mean 0, std 1.

    A row in four of dark membranes every 20 px, dark discs on a grid of 70 px.
    """
    generator = torch.Generator().manual_seed(seed)
    row, col = torch.meshgrid(
        torch.arange(float(ROWS)), torch.arange(float(COLS)), indexing="ij"
    )
    image = 0.5 + 0.4 * torch.randn(ROWS, COLS, generator=generator)
    image[((row + 6 * torch.sin(col / 30)) % 20 < 4) | (col % 33 < 4)] -= 1.7
    image[((row % 70 - 35) ** 2 + (col % 70 - 35) ** 2) < 14**2] = -1.2
    return ((image - image.mean()) / image.std())[None, None]


def band(width, slope=0.4):
    """A straight band across the section, (1, 1, ROWS, COLS) bool."""
    row, col = torch.meshgrid(torch.arange(ROWS), torch.arange(COLS), indexing="ij")
    return ((row - 70 - slope * col).abs() < width / 2)[None, None]


@pytest.mark.parametrize("seed", range(3))
def test_tissue_is_no_band(seed):
    assert not find_bands(section(seed)).any()


@pytest.mark.parametrize(("grey", "width"), [(-2.3, 16), (-3.0, 24), (2.6, 12)])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_a_fold_or_crack_across_the_section_is_found(grey, width, scale):
    planted = band(width)
    image = torch.where(planted, grey, section())

    found = find_bands(scale * image)

    assert (found & planted).sum() > 0.85 * planted.sum()
    assert (found & ~dilate(planted, 4)).sum() == 0


def test_a_stain_is_found_and_a_mitochondrion_is_not():
    row, col = torch.meshgrid(torch.arange(ROWS), torch.arange(COLS), indexing="ij")
    stain = ((row - 150) ** 2 + (col - 200) ** 2 < 40**2)[None, None]
    found = find_bands(torch.where(stain, -3.0, section()))
    assert (found & stain).sum() > 0.9 * stain.sum()
    assert not (found & ~dilate(stain, 4)).any()


def test_no_data_is_no_band_and_hides_none():
    planted = band(16)
    image = torch.where(planted, -2.5, section())
    image[..., 350:] = 0

    found = find_bands(image)

    assert not found[..., 350:].any()
    assert (found & planted).sum() > 0.85 * planted[..., :350].sum()


def test_defects_are_gaps_and_bands_of_each_image_of_a_batch():
    dark, hole = band(16), band(16, slope=-0.1)
    images = torch.cat(
        [torch.where(dark, -2.5, section()), torch.where(hole, 0.0, section())]
    )
    found = find_defects(images)
    assert (found[:1] & dark).sum() > 0.85 * dark.sum()
    assert torch.equal(found[1:], hole)


def test_defects_are_found_alike_with_and_without_the_options_of_a_module():
    # data/ finds them by the defaults here, models by their options.
    options, defaults = AlignerOptions(), find_defects.__kwdefaults__
    assert options.min_defect_thickness == defaults["min_thickness"]
    assert options.min_defect_px == defaults["min_px"]
