"""The mean of a field and the inverse of the swapped pair's."""

import torch

from metroem.geometry.field import compose, invert
from metroem.geometry.regularize import make_inverse_consistent

SHAPE = (48, 72)


def wave(px, shape=SHAPE):
    """A smooth field of up to `px`, other along rows than along cols."""
    row, col = torch.meshgrid(*(torch.arange(n) * 1.0 for n in shape), indexing="ij")
    field = torch.stack([torch.sin(row / 9), torch.cos(col / 11) * torch.sin(row / 13)])
    return px * field[None]


def test_a_field_that_agrees_stays():
    field = wave(3.0)
    # At the border an inverse is that of the field as it is continued there.
    apart = (make_inverse_consistent(field, invert(field)) - field)[
        ..., 4:-4, 4:-4
    ].abs()
    assert apart.max() < 0.01


def test_two_shifts_meet_halfway():
    forward = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, *SHAPE)
    backward = torch.tensor([-1.4, 2.0]).view(1, 2, 1, 1).expand(1, 2, *SHAPE)

    # 0.4 px apart: half of that, less 1 % of it.
    half = 0.2 * torch.exp(torch.tensor(-((0.4 / 4.0) ** 2)))
    met = make_inverse_consistent(forward, backward)
    torch.testing.assert_close(met[:, 0], (1.0 + half).expand(1, *SHAPE))
    torch.testing.assert_close(met[:, 1], forward[:, 1])


def test_a_contradiction_leaves_the_field_alone():
    forward = wave(1.0)
    met = make_inverse_consistent(forward, -forward + 20.0)
    torch.testing.assert_close(met, forward, atol=1e-4, rtol=0)


def test_swapping_the_pair_inverts_the_result():
    forward, backward = wave(3.0), invert(wave(3.0)) + 0.5
    cycle = compose(
        make_inverse_consistent(forward, backward),
        make_inverse_consistent(backward, forward),
    )
    inside = cycle[..., 8:-8, 8:-8].norm(dim=1)
    before = compose(forward, backward)[..., 8:-8, 8:-8].norm(dim=1)
    assert before.max() > 0.5
    assert inside.max() < 0.05
