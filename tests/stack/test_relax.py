"""Relaxing stacks: truth is a dense solution, or displacements that were put in."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from metroem.errors import DatasetError
from metroem.geometry import affine
from metroem.geometry.field import pixel_positions, sample
from metroem.geometry.grid import Grid
from metroem.stack import relax as relax_module
from metroem.stack.place import Placement
from metroem.stack.relax import (
    PairFields,
    RelaxOptions,
    RelaxStep,
    compose_affine,
    pair_precisions,
    relax,
    remove_affine,
)
from metroem.stack.tasks import Block, split_blocks

ROWS, COLS = 20, 28


def pair_fields(shifts, *, bad=(), k_max=3, correlation=0.86):
    """The fields of sections that were shifted by known cells, (n, 2)."""
    num = len(shifts)
    fields = {k: torch.zeros(num, 2, ROWS, COLS) for k in range(1, k_max + 1)}
    alike = {k: torch.zeros(num, 1, ROWS, COLS) for k in fields}
    for k in fields:
        for z in range(k, num):
            is_bad = z in bad or z - k in bad
            shift = torch.tensor([9.0, -7.0]) if is_bad else shifts[z] - shifts[z - k]
            fields[k][z] = shift.view(2, 1, 1)
            alike[k][z] = 0.05 if is_bad else correlation
    return PairFields(fields, alike, torch.zeros(num, 1, ROWS, COLS))


def random_shifts(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 2, generator=generator) * 0.3


def test_constant_shifts_are_solved_as_a_dense_matrix_solves_them():
    shifts, pull = random_shifts(6), 0.05
    pairs = pair_fields(shifts, k_max=1)

    found = relax(pairs, RelaxOptions(pull=pull))

    # The weight of a correlation of 0.86 is 1: (a + L) U = D^T (shifts' differences).
    difference = np.diff(np.eye(6), axis=0)
    matrix = pull * np.eye(6) + difference.T @ difference
    right = difference.T @ (difference @ shifts.numpy())
    expected = np.linalg.solve(matrix, right)
    middle = found[:, :, ROWS // 2, COLS // 2].numpy()
    np.testing.assert_allclose(middle, expected, atol=2e-3)
    assert float(found.std((2, 3)).max()) < 1e-3  # nothing bends


def test_a_bad_section_does_not_move_its_neighbours():
    shifts = random_shifts(9, seed=1)

    found = relax(pair_fields(shifts, bad=(4,)), RelaxOptions(pull=1e-4))

    sound = [z for z in range(9) if z != 4]
    mean = found.mean((2, 3))
    jumps = mean[sound][1:] - mean[sound][:-1]
    expected = shifts[sound][1:] - shifts[sound][:-1]
    assert float((jumps - expected).abs().max()) < 0.02


def test_two_bad_sections_are_crossed_by_the_third_neighbour():
    shifts = random_shifts(9, seed=2)

    found = relax(pair_fields(shifts, bad=(4, 5)), RelaxOptions(pull=1e-4))

    across = (found[6] - found[3]).mean((1, 2))
    assert float((across - (shifts[6] - shifts[3])).abs().max()) < 0.03


def test_farther_neighbours_do_not_count_where_nearer_ones_are_sound():
    alike = {k: torch.full((5, 1, 2, 3), c) for k, c in ((1, 0.84), (2, 0.72))}

    weights = pair_precisions(alike)

    assert float(weights[2].max()) == 0
    assert float(weights[1][1:].min()) > 0.8
    alike[1][3] = 0.1  # section 3 on 2
    weights = pair_precisions(alike)
    assert float(weights[1][3].max()) == 0
    # The paths of 3 on 1 and of 4 on 2 lead through it.
    assert float(weights[2][3].min()) > 0.3 and float(weights[2][4].min()) > 0.3
    assert float(weights[2][2].max()) == 0


@pytest.mark.parametrize("is_torn", [True, False])
def test_a_jump_is_kept_at_a_defect_alone(is_torn):
    pairs = pair_fields(torch.zeros(3, 2), k_max=2)
    step = torch.where(torch.arange(COLS) < 14, -1.0, 1.0).expand(ROWS, COLS)
    pairs.fields[1][1, 0] += step
    pairs.fields[1][2, 0] -= step
    if is_torn:
        pairs.defects[1, :, :, 13:15] = 1

    found = relax(pairs, RelaxOptions(pull=1e-3))

    jump = float((found[1, 0, :, 15] - found[1, 0, :, 12]).mean())
    assert jump > 1.2 if is_torn else jump < 1.0


def test_known_sections_keep_their_displacements():
    shifts = random_shifts(5, seed=3)
    known = {0: torch.full((1, 2, ROWS, COLS), 0.7)}

    found = relax(pair_fields(shifts), RelaxOptions(pull=1e-4), known)

    assert torch.equal(found[:1], known[0])
    assert float(
        (found[1] - (0.7 + shifts[1] - shifts[0]).view(2, 1, 1)).abs().max()
    ) < (0.02)


def test_a_part_of_a_long_stack_is_relaxed_as_the_whole():
    shifts = random_shifts(120, seed=4)
    pairs = pair_fields(shifts, k_max=1)
    options = RelaxOptions()

    whole = relax(pairs, options)
    part = relax(
        PairFields(
            {1: pairs.fields[1][:64]},
            {1: pairs.correlations[1][:64]},
            pairs.defects[:64],
        ),
        options,
    )

    # 48 sections later, in cells of 8 px.
    assert float((part[:16] - whole[:16]).abs().max()) * 8 < 0.05


def test_the_finest_level_solves_fewer_sections_and_finds_the_same(monkeypatch):
    num, wanted = 100, range(48, 60)
    generator = torch.Generator().manual_seed(6)
    # Distortions of each section, over 2 to 20 cells, and errors of the pairs.
    own, error = torch.zeros(num, 2, ROWS, COLS), torch.zeros(num, 2, ROWS, COLS)
    for values, size, height in ((own, 20, 0.5), (own, 5, 0.1), (error, 2, 0.03)):
        nodes = torch.randn(
            num, 2, ROWS // size + 1, COLS // size + 1, generator=generator
        )
        values += height * F.interpolate(nodes, (ROWS, COLS), mode="bilinear")
    pairs = pair_fields(torch.zeros(num, 2), bad=(45, 62))
    for k, fields in pairs.fields.items():
        fields[k:] += own[k:] - own[:-k] + k * error[k:]
    sizes = []
    solve = relax_module._relax_level
    monkeypatch.setattr(
        *(relax_module, "_relax_level"),
        lambda here, *rest: sizes.append(len(here.defects)) or solve(here, *rest),
    )

    part = relax(pairs, RelaxOptions(), wanted=wanted)
    whole = relax(pairs, RelaxOptions())

    assert sizes == [num, num, 24 + 12 + 24, num, num, num]
    assert float((part - whole[wanted.start : wanted.stop]).abs().max()) * 8 < 0.03
    assert float(whole.std()) * 8 > 2


def test_a_field_is_composed_with_a_turn_and_taken_apart_again():
    grid = Grid(3, 64, -16, 12, 17)
    angle = 0.6
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.column_stack([turn, [300.0, -40.0]])
    displacement = torch.randn(
        1, 2, *grid.shape, generator=torch.Generator().manual_seed(5)
    )

    field = compose_affine(displacement, matrix, grid)

    # At cell (row 4, col 9): mip-0 position, moved, then mapped.
    cell = np.array([9.0, 4.0]) + displacement[0, :, 4, 9].numpy()
    at = (cell + 0.5) * 8 - 0.5 + [grid.y, grid.x]
    to = affine.apply(matrix, at[None])[0]
    reached = (np.array([9.0, 4.0]) + field[0, :, 4, 9].numpy() + 0.5) * 8 - 0.5
    np.testing.assert_allclose(reached + [grid.y, grid.x], to, atol=1e-3)
    back = remove_affine(field, matrix, grid)
    assert float((back - displacement).abs().max()) < 1e-4


def test_fields_are_read_where_the_neighbour_was_moved_to():
    """f depends on the place: U_1(q) = U_0(q) + f(q + U_0(q)) is exact."""
    pairs = pair_fields(torch.zeros(2, 2), k_max=1)
    ramp = torch.arange(COLS, dtype=torch.float32) * 0.05
    pairs.fields[1][1, 0] = ramp.expand(ROWS, COLS)
    known = {0: torch.full((1, 2, ROWS, COLS), 2.0)}

    found = relax(pairs, RelaxOptions(pull=1e-6, bending=1e-3), known)

    positions = pixel_positions(found[:1]) + known[0]
    expected = 2.0 + sample(pairs.fields[1][1:], found[:1], positions, padding="border")
    inner = (..., slice(2, -2), slice(2, -6))
    assert float((found[1:][inner] - expected[inner])[:, 0].abs().max()) < 0.02


def test_displacements_that_are_not_finite_are_an_error():
    pairs = pair_fields(torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(DatasetError, match="not finite; give a smaller --smoothness"):
        relax(pairs, RelaxOptions(bending=1e39))


def test_blocks_that_read_fields_of_others_are_a_step_after_them():
    """Tasks of a step run in any order, so none may read what another one writes."""
    area = Grid(0, 0, 0, 128, 64)
    step = RelaxStep(
        *("file:///nowhere", Placement({}, {}, area), (4, 5, 9), 0, 0, 64, 2, 3, 2),
        *((4.0, 4.0, 40.0), RelaxOptions()),
    )
    found, end = [], 0
    for generation, blocks in enumerate(
        (["z0-2", "z2-4"], [], ["z4-6", "z6-8", "z8-9"])
    ):
        tasks = replace(step, generation=generation).tasks()
        assert [task.split("_")[0] for task in tasks[::2]] == blocks
        known = {step._known(Block.parse(task).sections)[0] for task in tasks}
        assert known <= {end}
        end = max([Block.parse(task).sections.stop for task in tasks], default=end)
        found += tasks
    everything = split_blocks(area, range(9), 64, 2)
    assert found == [block.name for block in everything]
