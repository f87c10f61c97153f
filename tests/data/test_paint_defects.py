import math

import pytest
import torch

from metroem.data.paint_defects import (
    CurvedLine,
    Wedge,
    crack,
    fold,
    paint_band,
    remove_tissue,
    stain,
)
from metroem.data.sample import seeded_generator
from metroem.specs.augmentations import Crack, Fold, Missing, Stain

ROWS, COLS = 120, 168
DAMAGES = [
    (fold, Fold(width_px=18)),
    (crack, Crack(width_px=20)),
    (remove_tissue, Missing(share=0.3)),
    (stain, Stain(radius_px=40)),
]
every_damage = pytest.mark.parametrize(("damage", "options"), DAMAGES)
every_seed = pytest.mark.parametrize("seed", range(4))


@pytest.fixture
def image():
    """Grey levels within 1, no data in the first rows."""
    noise = torch.rand(1, 1, ROWS, COLS, generator=seeded_generator(0, 0))
    image = (2 * noise - 1).clamp(min=-0.999)
    image[..., :10, :] = 0
    return image


@every_damage
@every_seed
def test_what_is_not_hidden_stays(image, damage, options, seed):
    before, random_state = image.clone(), torch.get_rng_state()
    damaged = damage(image, options, seeded_generator(seed))
    assert torch.equal(image, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert damaged.image.shape == damaged.hidden.shape == image.shape
    assert damaged.hidden.dtype == torch.bool
    assert not damaged.hidden[image == 0].any()
    assert (damaged.image[image == 0] == 0).all()
    if damage is stain:  # its soft border covers more than it hides
        assert (damaged.image <= image).float().mean() > 0.95
    else:
        seen = ~damaged.hidden
        assert torch.equal(damaged.image[seen], image[seen])


@every_damage
def test_the_same_seed_damages_alike(image, damage, options):
    once, again, other = (
        damage(image, options, seeded_generator(s)) for s in (1, 1, 2)
    )
    assert torch.equal(once.image, again.image)
    assert torch.equal(once.hidden, again.hidden)
    assert not torch.equal(once.hidden, other.hidden)


@every_seed
def test_a_fold_is_dark_where_its_mask_is(image, seed):
    folded, hidden = fold(image, Fold(width_px=18), seeded_generator(seed))
    assert folded[hidden].mean() < -1
    # Nothing else is as dark, so a threshold finds the inside of the fold again.
    assert hidden[folded < -1].all()
    inside = -torch.nn.functional.max_pool2d(-hidden.float(), 3, 1, 1) > 0
    assert (folded[inside] < -1).float().mean() > 0.95
    assert (folded[hidden] != 0).all()


@every_seed
def test_a_fold_is_not_wider_than_asked(image, seed):
    hidden = fold(image, Fold(width_px=18), seeded_generator(seed)).hidden
    # No longer than 1.3 of the diagonal, no wider than asked and what is ragged.
    assert 0 < hidden.sum() < 1.3 * math.hypot(ROWS, COLS) * (18 + 4)


@every_seed
def test_a_crack_is_bright_where_its_mask_is(image, seed):
    cracked, hidden = crack(image, Crack(width_px=20), seeded_generator(seed))
    assert hidden.any() and cracked[hidden].mean() > 1
    assert hidden[cracked > 1].all()


@every_seed
def test_a_crack_is_not_wider_than_asked(seed):
    image = torch.ones(1, 1, ROWS, COLS)
    hidden = crack(image, Crack(width_px=30), seeded_generator(seed)).hidden
    # A wedge, which at most the longer side and a half of it reaches in.
    assert 0 < hidden.sum() < 1.5 * COLS * 30 / 2 + 4 * COLS


@every_seed
def test_what_is_torn_off_is_no_data_and_of_the_share_asked(seed):
    image = torch.ones(1, 1, ROWS, COLS)
    torn, hidden = remove_tissue(image, Missing(share=0.3), seeded_generator(seed))
    assert torch.equal(torn == 0, hidden)
    # Between a third of the share and all of it; drawn on every 16th pixel.
    assert 0.09 < hidden.float().mean() < 0.31
    # From the border inwards: some side of the image is hidden more than half.
    sides = [hidden[..., 0, :], hidden[..., -1, :], hidden[..., 0], hidden[..., -1]]
    assert max(side.float().mean() for side in sides) > 0.4


@every_seed
def test_a_stain_is_dark_where_it_hides(image, seed):
    stained, hidden = stain(image, Stain(radius_px=40), seeded_generator(seed))
    assert (stained[hidden] < -0.3).float().mean() > 0.95
    assert (stained[image != 0] != 0).all()


@pytest.mark.parametrize("dark", [True, False])
def test_a_band_is_painted_alike_with_and_without_batch(image, dark):
    hidden = torch.zeros(ROWS, COLS, dtype=torch.bool)
    hidden[:, 30:45] = True
    flat = paint_band(image[0, 0], hidden, seeded_generator(5), dark=dark)
    whole = paint_band(image, hidden[None, None], seeded_generator(5), dark=dark)
    assert torch.equal(flat, whole[0, 0])
    assert flat[10:, 31:44].mean() * (-1 if dark else 1) > 1.2
    assert (flat[:10] == 0).all() and torch.equal(flat[:, 45:], image[0, 0, :, 45:])


@every_seed
def test_moving_along_the_normal_changes_the_distance_by_as_much(seed):
    line = CurvedLine.random((ROWS, COLS), seeded_generator(seed))
    along_cols, along_rows = line.normal
    assert math.isclose(math.hypot(along_cols, along_rows), 1, rel_tol=1e-6)
    rows, cols = torch.tensor([3.0, 70.0, 110.0]), torch.tensor([150.0, 2.0, 60.0])
    moved = rows + 7 * along_rows, cols + 7 * along_cols
    torch.testing.assert_close(line.distance(*moved), line.distance(rows, cols) + 7)
    torch.testing.assert_close(line.position(*moved), line.position(rows, cols))


def test_distance_and_position_are_those_of_the_formula():
    line = CurvedLine((1.0, 0.0), (50.0, 80.0), 6.0, 200.0, 0.0)
    rows, cols = torch.tensor([50.0, 100.0, 0.0]), torch.tensor([80.0, 80.0, 90.0])
    # 50 px along the line is a quarter of the sine: the line is 6 px to the side.
    torch.testing.assert_close(line.position(rows, cols), torch.tensor([0.0, 50, -50]))
    torch.testing.assert_close(line.distance(rows, cols), torch.tensor([0.0, -6, 16]))


def test_a_wedge_closes_to_its_tip():
    wedge = Wedge(width_px=12.0, tip_px=40.0, length_px=100.0)
    positions = torch.tensor([-90.0, -60.0, -10.0, 40.0, 70.0])
    expected = torch.tensor([12.0, 12.0, 6.0, 0.0, 0.0])
    torch.testing.assert_close(wedge.opening(positions), expected)
