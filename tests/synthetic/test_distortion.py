import numpy as np
import pytest
import torch

from metroem.errors import UsageError
from metroem.evaluation.metrics import fold_fraction
from metroem.geometry.field import warp
from metroem.synthetic.distortion import (
    BORDER_PX,
    Distortion,
    distort,
    random_field,
    true_pair,
)
from metroem.synthetic.tissue import TissueRecipe, make_tissue

MARGIN_PX = 24
CLEAN = Distortion(fold=0, corner=0, noise=(0, 0), contrast=0, brightness=0)


@pytest.fixture(scope="module")
def tissue():
    return make_tissue(TissueRecipe(num_sections=1, rows=224, cols=272, seed=1))[0]


def sections_of(tissue, distortion, num=2):
    return [
        distort(
            tissue, distortion, margin_px=MARGIN_PX, rng=np.random.default_rng([5, z])
        )
        for z in range(num)
    ]


def as_tensor(image):
    return torch.from_numpy(image.astype(np.float32))[None, None]


def test_the_true_field_brings_src_onto_tgt(tissue):
    src, tgt = sections_of(tissue, CLEAN)
    truth = true_pair(src, tgt)
    error = (warp(as_tensor(src.image), truth.field) - as_tensor(tgt.image)).abs()
    before = (as_tensor(src.image) - as_tensor(tgt.image)).abs()
    # Left is the loss of one bilinear resampling at membranes and the grain.
    assert error[truth.valid].mean() < 4
    assert error[truth.valid].mean() < before[truth.valid].mean() / 4


def test_the_true_field_of_a_section_to_itself_is_zero(tissue):
    section = sections_of(tissue, CLEAN, 1)[0]
    truth = true_pair(section, section)
    assert truth.field.abs().max() < 0.01


def test_the_truth_is_on_the_sections_grid_and_leaves_the_border_out(tissue):
    src, tgt = sections_of(tissue, CLEAN)
    truth = true_pair(src, tgt)
    assert src.image.shape == (176, 224)
    assert truth.field.shape == (1, 2, 176, 224)
    assert not truth.valid[..., : BORDER_PX - 1, :].any()
    assert not truth.valid[..., -(BORDER_PX - 1) :].any()
    assert truth.valid.float().mean() > 0.5


def test_the_same_generator_gives_the_same_section(tissue):
    first, again = (
        sections_of(tissue, Distortion(), 1),
        sections_of(tissue, Distortion(), 1),
    )
    np.testing.assert_array_equal(first[0].image, again[0].image)
    torch.testing.assert_close(first[0].field, again[0].field, rtol=0, atol=0)


def test_a_fold_is_dark_bends_the_field_and_is_left_out_of_the_truth(tissue):
    smooth = sections_of(tissue, CLEAN)
    folded = sections_of(tissue, Distortion(fold=1, corner=0))
    assert folded[1].near_fold.any()
    assert not smooth[1].near_fold.any()
    valid = true_pair(smooth[1], folded[0]).valid[0, 0].numpy()
    assert not (valid & folded[0].near_fold).any()
    assert np.percentile(folded[1].image[folded[1].near_fold], 5) < 40
    assert fold_fraction(folded[1].field) == 0


def test_a_missing_corner_is_zero_and_left_out_of_the_truth(tissue):
    torn = sections_of(tissue, Distortion(fold=0, corner=1))[1]
    assert 0.005 < (torn.image == 0).mean() < 0.1
    corners = torn.image[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 0).sum() == 1
    whole = sections_of(tissue, CLEAN)[0]
    valid = true_pair(whole, torn).valid[0, 0].numpy()
    assert not valid[torn.image == 0].any()


def test_a_random_field_keeps_to_its_limits():
    limits = Distortion(peak_px=(5, 5), shift_px=2, degrees=0, stretch=0)
    field = random_field(np.random.default_rng(0), (200, 160), limits)
    assert field.shape == (1, 2, 200, 160)
    # The smooth part peaks at 5 px and the shift is at most 2 px each way.
    assert 2 < field.norm(dim=1).max() < 5 + 2 * 2**0.5
    assert fold_fraction(field) == 0


def test_tissue_smaller_than_its_margin_is_refused():
    with pytest.raises(UsageError, match="nothing inside a margin"):
        sections_of(np.ones((40, 90), np.uint8), CLEAN)
