"""Test crops that are rotated in their patch."""

import math

import pytest
import torch

from metroem.data.random_maps import pixel_grid
from metroem.data.rotation import Rotation, random_rotation, rotate_crop
from metroem.data.sample import Sample, seeded_generator
from metroem.data.sampling import EpochSeed, TrainingEpoch
from metroem.geometry.field import warp
from metroem.geometry.grid import Grid
from metroem.specs.augmentations import RandomTurn
from metroem.specs.schedule import Phase
from tests.image_sets import pairs_of, write_images

GRID = Grid(1, 64, 128, 60, 90)
SIZE = (24, 40)


def draws(count, **options):
    for index in range(count):
        yield random_rotation(
            GRID, SIZE, RandomTurn(**options), seeded_generator(7, index)
        )


# Error of torch's bicubic kernel (a = -0.75) on a tilted plane, at most.
BICUBIC_ERROR_PX = 0.05


def plane(shape, per_col, per_row):
    """A tilted plane, whose values say where they were read."""
    rows, cols = pixel_grid(shape)
    return (per_col * cols + per_row * rows + 1000.0)[None, None]


def sample_in(rotation, image, **more):
    """Cut a rotation's window out of a map of the patch."""
    grid = rotation.window
    row, col = (grid.x - GRID.x) >> 1, (grid.y - GRID.y) >> 1
    cut = slice(row, row + grid.rows), slice(col, col + grid.cols)
    whole = Sample(image, -image, None, ("one",))
    return whole._replace(**more).window(*cut)


def in_patch(rotation):
    """Col and row of each pixel of a rotated crop in the patch, (2, h, w)."""
    first = torch.tensor([rotation.window.y - GRID.y, rotation.window.x - GRID.x]) >> 1
    return rotation.positions[0] + first.view(2, 1, 1)


def test_a_rotated_crop_stays_in_its_patch_and_its_window():
    for rotation in draws(60, zoom=1.25):
        assert GRID.covers(rotation.window)
        cols, rows = in_patch(rotation)
        assert cols.min() >= -0.5 and cols.max() <= GRID.cols - 0.5
        assert rows.min() >= -0.5 and rows.max() <= GRID.rows - 0.5
        assert rotation.positions.min() >= -0.5
        assert (rotation.positions[0, 0] <= rotation.window.cols - 0.5).all()
        assert (rotation.positions[0, 1] <= rotation.window.rows - 0.5).all()


def test_angles_go_all_round_and_steps_up_to_the_zoom():
    found = list(draws(200, zoom=1.25))
    angles = [math.atan2(t.matrix[1, 0], t.matrix[0, 0]) for t in found]
    steps = [float(torch.linalg.det(t.matrix).sqrt()) for t in found]
    assert {int(a // (math.pi / 4)) for a in angles} == set(range(-4, 4))
    assert 1.0 < max(steps) <= 1.25
    # A crop rotated by 45 degrees is higher than the patch by (24 + 40) / sqrt(2) of
    # it, and zoomed in until it fits.
    assert 0.75 < min(steps)


def test_pixels_are_read_where_the_rotation_says():
    (rotation,) = draws(1, zoom=1.25)
    image = plane(GRID.shape, 3.0, -5.0)
    crop = rotate_crop(sample_in(rotation, image), rotation)
    cols, rows = in_patch(rotation)
    wanted = (3.0 * cols - 5.0 * rows + 1000.0)[None, None]
    torch.testing.assert_close(crop.src, wanted, atol=BICUBIC_ERROR_PX * 8.0, rtol=0)
    torch.testing.assert_close(crop.tgt, -crop.src)


def test_a_rotation_by_90_degrees_is_rot90():
    window = Grid(0, 0, 0, 7, 7)
    rows, cols = pixel_grid((7, 7))
    # Rightwards in the crop is downwards in the window: (col, row) -> (-row, col).
    positions = torch.stack((6 - rows.expand(7, 7), cols.expand(7, 7)))[None]
    rotation = Rotation(window, positions, torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    image = torch.rand(1, 1, 7, 7, generator=torch.Generator().manual_seed(1)) + 1
    prior = torch.stack((torch.full((7, 7), 2.0), torch.full((7, 7), 0.5)))[None]

    crop = rotate_crop(Sample(image, image, prior, ("one",)), rotation)

    torch.testing.assert_close(crop.src, torch.rot90(image, 1, (2, 3)))
    # 2 px rightwards in the window are 2 px upwards in the crop.
    torch.testing.assert_close(crop.prior_field[0, 0], torch.full((7, 7), 0.5))
    torch.testing.assert_close(crop.prior_field[0, 1], torch.full((7, 7), -2.0))


def test_a_rotated_prior_field_still_leads_to_the_same_tissue():
    image = plane(GRID.shape, 2.0, 7.0)
    rows, cols = pixel_grid(GRID.shape)
    shift = torch.stack((2 + 0.01 * rows + 0 * cols, -1 + 0.02 * cols + 0 * rows))
    prior = shift[None]
    for rotation in draws(5, zoom=1.25):
        crop = rotate_crop(sample_in(rotation, image, prior_field=prior), rotation)
        warped = warp(crop.src, crop.prior_field, padding="border")
        before = sample_in(rotation, warp(image, prior, padding="border"))
        wanted = rotate_crop(before, rotation).src
        inside = (slice(None), slice(None), slice(6, -6), slice(6, -6))
        atol = 2 * BICUBIC_ERROR_PX * 9.0
        torch.testing.assert_close(warped[inside], wanted[inside], atol=atol, rtol=0)


def test_no_data_and_defects_rotate_with_the_sections():
    (rotation,) = draws(1, zoom=1.0)
    rows, cols = pixel_grid(GRID.shape)
    hole = ((rows - 30) ** 2 + (cols - 45) ** 2 < 100)[None, None]
    image = torch.where(hole, 0.0, plane(GRID.shape, 1.0, 1.0))
    crop = rotate_crop(sample_in(rotation, image, src_defects=hole), rotation)
    cols, rows = in_patch(rotation)
    radius = ((rows - 30) ** 2 + (cols - 45) ** 2).sqrt()[None, None]
    assert radius.min() < 8
    assert (crop.src[radius < 9] == 0).all() and (crop.src[radius > 11] != 0).all()
    assert crop.src_defects[radius < 9].all()
    assert not crop.src_defects[radius > 11].any()
    assert crop.tgt_defects is None


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_an_epoch_rotates_its_samples_and_repeats_itself(tmp_path, prob):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5")
    phase = Phase(
        lr=1e-3,
        num_epochs=1,
        smoothness=1.0,
        crop_size=24,
        augmentations=(RandomTurn(prob=prob),),
    )
    plain = Phase(lr=1e-3, num_epochs=1, smoothness=1.0, crop_size=24)
    pairs, key = pairs_of(tmp_path), EpochSeed(0, 0, 0, 0)
    rotated, again = (TrainingEpoch(pairs, phase, key, batch_size=1) for _ in range(2))
    straight = TrainingEpoch(pairs, plain, key, batch_size=1)

    assert rotated[1].src.shape == straight[1].src.shape
    assert torch.equal(rotated[1].src, again[1].src)
    ref = pairs[rotated.order[1]]
    values = torch.from_numpy(ref.images.read(ref.index).src)
    assert bool(torch.isin(rotated[1].src, values).all()) == (prob == 0.0)
