import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from metroem.data.sample import Sample
from metroem.evaluation.report.pair_pictures import MASKS, draw_pair, draw_wheel
from metroem.io.pictures import stretched
from tests.pairs import SHIFT_PX, shifted_pair

ROWS, COLS = 128, 192


def opened(uri):
    assert uri.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def sample_of(rows, cols, **defects):
    masks = {
        name: defects.get(name, torch.zeros(1, 1, rows, cols, dtype=torch.bool))
        for name in ("src_defects", "tgt_defects")
    }
    return Sample(*shifted_pair(rows, cols, seed=0), None, ("a pair",), **masks)


@pytest.fixture
def drawn():
    """A pair 3 px apart along cols, what two stages make of it, a defect, a fold."""
    defect = torch.zeros(1, 1, ROWS, COLS, dtype=torch.bool)
    defect[..., 80:90, 20:50] = True
    field = torch.zeros(1, 2, ROWS, COLS)
    field[:, 0] = SHIFT_PX
    first = field / 2
    field[:, 1, 30, 100] = -4  # so that the determinant is 1 - 4 / 2 in row 29
    return draw_pair(sample_of(ROWS, COLS, tgt_defects=defect), [first, field])


def test_pictures_are_upright_and_src_after_looks_like_tgt(drawn):
    pictures = drawn.pictures
    before, after, tgt = (
        np.asarray(opened(pictures[name]).convert("L"), float)
        for name in ("before", "after", "tgt")
    )
    assert tgt.shape == (COLS, ROWS) and pictures["factor"] == 1
    inside = (slice(16, -16), slice(16, -16))
    difference = np.abs(tgt - after)[inside].mean(), np.abs(tgt - before)[inside].mean()
    assert difference[0] < 6 and difference[1] > 3 * difference[0]


def test_masks_show_defects_and_folds_where_they_are(drawn):
    masks = opened(drawn.pictures["masks"])
    codes = np.asarray(masks)
    names = ["", *MASKS, "stripe of a defect", "rim of a fold"]
    # Of the 9 px along a row, 3 are a stripe: (row + col) % 9 < 3.
    assert names[codes[36, 85]] == "defect"  # col 36, row 85: 121 = 13 * 9 + 4
    assert names[codes[34, 85]] == "stripe of a defect"  # 119 = 13 * 9 + 2
    assert names[codes[98, 29]] == "rim of a fold"  # the fold is widened by 1 px
    assert names[codes[100, 29]] == "fold"
    assert names[codes[2, 2]] == "not compared"  # the border
    assert codes[120, 60] == 0
    alpha = np.asarray(masks.convert("RGBA"))[..., 3]
    assert alpha[120, 60] == 0 and alpha[100, 29] == 255


def test_the_worst_chunks_come_first_with_what_is_around_them(drawn):
    cpc = np.array(drawn.pictures["correlation"]["after"])
    # The chunk at rows 64 to 128 of cols 0 to 64 has too few pixels off the defect.
    assert cpc.shape == (3, 2) and np.isnan(cpc[0, 1])
    assert [crop.cpc for crop in drawn.crops] == sorted(cpc[np.isfinite(cpc)])
    for crop in drawn.crops:
        # x runs along rows of the arrays, which run to the right in pictures.
        assert cpc[crop.y // 64, crop.x // 64] == crop.cpc
        assert opened(crop.picture).size == (128, 128)
        left, top, right, bottom = crop.box
        assert (right - left, bottom - top) == (0.5, 0.5)
    # The middle chunk down has 32 px around it; the image is no wider than the crop.
    middle = next(c for c in drawn.crops if (c.x, c.y) == (32, 96))
    assert middle.box == (0, 0.25, 0.5, 0.75)


def test_the_correlation_is_upright_and_better_after(drawn):
    before, after = (
        np.array(drawn.pictures["correlation"][n]) for n in ("before", "after")
    )
    assert before.shape == after.shape == (COLS // 64, ROWS // 64)
    assert np.nanmin(after) > 0.9 > np.nanmax(before)
    none, half, full = np.nanmean(before), *drawn.stage_cpc
    assert none < half < full


def test_arrows_are_means_along_x_and_y_of_the_volume(drawn):
    arrows = drawn.pictures["arrows"]
    x, y = np.array(arrows["x"]), np.array(arrows["y"])
    assert arrows["square"] == COLS // 24
    assert x.shape == y.shape == (24, ROWS // 8)
    # The displacement is along cols, which run along the volume's y.
    np.testing.assert_allclose(y, SHIFT_PX)
    assert np.median(x) == 0
    assert drawn.pictures["fullPx"] == pytest.approx(SHIFT_PX)


def test_large_pictures_are_averaged_and_lose_no_fold():
    rows, cols = 96, 1100
    field = torch.zeros(1, 2, rows, cols)
    field[:, 1, 40, 801] = -4
    drawn = draw_pair(sample_of(rows, cols), [field])
    assert drawn.pictures["factor"] == 2
    assert opened(drawn.pictures["tgt"]).size == (48, 550)
    codes = np.asarray(opened(drawn.pictures["masks"]))
    assert codes.shape == (550, 48) and (codes[399:403, 19:22] == 3).any()
    assert max(opened(drawn.thumb).size) <= 96


def test_the_wheel_has_the_colour_of_each_direction():
    wheel = np.asarray(opened(draw_wheel()))
    side = len(wheel)
    assert wheel[0, 0, 3] == 0  # outside
    assert (wheel[side // 2, side // 2, :3] > 230).all()
    # Downwards is along y, cols: hue 0, red.
    down = wheel[-2, side // 2].astype(int)
    assert down[0] == 255 and down[1] < 30


def test_grey_levels_can_be_those_of_another_image():
    image = np.arange(1, 101, dtype=np.float32).reshape(5, 20)
    brighter = np.where(image > 50, image + 30, 0)
    grey = stretched(brighter, like=image)
    assert (grey[image <= 50] == 0).all()
    assert grey[2, 11] > stretched(image)[2, 11]
    assert (stretched(image, like=np.zeros_like(image)) == 0).all()
