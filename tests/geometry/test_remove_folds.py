import torch

from metroem.evaluation.metrics import fold_fraction
from metroem.geometry.regularize import remove_folds

ROWS, COLS = 60, 84


def positions():
    return torch.meshgrid(
        torch.arange(float(ROWS)), torch.arange(float(COLS)), indexing="ij"
    )


def test_a_field_without_folds_is_left_as_it_is():
    rows, cols = positions()
    field = torch.stack((3 * torch.sin(rows / 15), 2 * torch.cos(cols / 18)))[None]
    assert remove_folds(field) is field


def test_a_fold_is_smoothed_away_and_the_rest_kept():
    _, cols = positions()
    # Displacements that fall by 12 px over 6 px: the image runs backwards there.
    step = -2 * (cols - COLS / 2).clamp(-3, 3)
    field = torch.stack((step, torch.zeros_like(step)))[None]
    assert fold_fraction(field) > 0.05
    unfolded = remove_folds(field)
    assert fold_fraction(unfolded) == 0
    # The window that smooths a drop of 12 px has to be some 12 px wide: 8 px to each
    # side in the last round, on top of those before.
    far = (cols - COLS / 2).abs() > 34
    assert torch.equal(unfolded[..., far], field[..., far])


def test_samples_of_a_batch_do_not_touch_each_other():
    _, cols = positions()
    step = -2 * (cols - COLS / 2).clamp(-3, 3)
    folded = torch.stack((step, torch.zeros_like(step)))
    smooth = 0.1 * folded
    both = remove_folds(torch.stack((smooth, folded)))
    assert torch.equal(both[0], smooth)
    assert torch.allclose(both[1], remove_folds(folded[None])[0])


def test_windows_are_square_and_end_at_the_border():
    rows, cols = positions()
    # An oblique fold that runs into a corner.
    along = (2 * rows + cols - 40) / 5**0.5
    step = -2 * along.clamp(-3, 3)
    field = torch.stack((step / 5**0.5, 2 * step / 5**0.5))[None]
    unfolded = remove_folds(field)
    assert fold_fraction(field) > 0.05 and fold_fraction(unfolded) == 0
    # A displacement of all pixels stays as it is, also at the border.
    moved = remove_folds(field + 7)
    torch.testing.assert_close(moved, unfolded + 7, atol=1e-4, rtol=0)
    # Rows are as cols.
    turned = remove_folds(field.mT.flip(1)).mT.flip(1)
    torch.testing.assert_close(turned, unfolded, atol=1e-4, rtol=0)
