"""Placing sections: maps that were put in are found again."""

import numpy as np
import pytest

from metroem.errors import DatasetError
from metroem.geometry import affine
from metroem.geometry.grid import Grid
from metroem.stack.place import (
    Edge,
    Placed,
    Placement,
    check_placed,
    confirmed_edges,
    describe_placed,
    solve_placements,
)

MIDDLE = np.array([250.0, 180.0])


def similarity(degrees, shift, scale=1.0, *, flip=False):
    angle = np.radians(degrees)
    turn = scale * np.array(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    )
    if flip:
        turn = turn @ np.diag([-1.0, 1.0])
    return np.column_stack([turn, shift])


def edge_of(maps, z, y, *, score=20.0, num=30, noise=0.0):
    """A match between two sections whose maps, section -> canvas, are known."""
    rng = np.random.default_rng([z, y])
    canvas = rng.uniform((0, 0), (500, 360), (num, 2))
    at = affine.apply(affine.invert(maps[z]), canvas)
    other = affine.apply(affine.invert(maps[y]), canvas)
    is_mirrored = affine.determinant(maps[z]) * affine.determinant(maps[y]) < 0
    at = at + noise * rng.standard_normal(at.shape)
    return Edge(z, y, at, other, "keypoints", score, is_mirrored)


def all_edges(maps, reach=2, **about):
    return [
        edge_of(maps, z, z - k, **about)
        for z in sorted(maps)
        for k in range(1, reach + 1)
        if z - k in maps
    ]


def error(found, maps, z, fix):
    """Distance of canvas points, by the matrices found and by those put in."""
    points = np.array([[0.0, 0], [500, 0], [0, 360]])
    # The canvas is that of the section that stays.
    truth = affine.compose(maps[fix], affine.invert(maps[z]))
    return np.abs(affine.apply(found[z], points) - affine.apply(truth, points)).max()


MAPS = {
    0: similarity(10, (3, 4)),
    1: similarity(-140, (900, 200)),
    2: similarity(35, (-50, 20)),
    3: similarity(80, (400, -700)),
    4: similarity(-5, (1000, 30)),
}


@pytest.mark.parametrize("fix", [None, 0, 3])
def test_turns_and_shifts_are_found_again(fix):
    middles = dict.fromkeys(MAPS, MIDDLE)

    found, placed = solve_placements(all_edges(MAPS), middles, "rigid", fix=fix)

    fixed = 2 if fix is None else fix
    np.testing.assert_allclose(found[fixed], affine.identity(), atol=1e-9)
    assert max(error(found, MAPS, z, fixed) for z in MAPS) < 0.01
    assert {one.how for one in placed.values()} == {"keypoints"}


def test_mirrored_sections_are_found_again():
    maps = MAPS | {
        1: similarity(-140, (900, 200), flip=True),
        2: similarity(35, (-50, 20), flip=True),
    }

    found, _ = solve_placements(
        all_edges(maps), dict.fromkeys(maps, MIDDLE), "rigid", fix=0
    )

    assert max(error(found, maps, z, 0) for z in maps) < 0.01


def test_affine_maps_are_found_and_scale_does_not_drift():
    stretch = np.array([[1.02, 0.01, 5.0], [0.0, 0.99, -3.0]])
    maps = {0: affine.identity(), 1: stretch, 2: affine.identity()}

    found, _ = solve_placements(
        all_edges(maps), dict.fromkeys(maps, MIDDLE), "affine", fix=0
    )

    assert error(found, maps, 1, 0) < 1.0
    # Each section 1 % smaller than the one before: a chain would shrink to 61 %.
    maps = {z: similarity(0, (0, 0), 0.99**z) for z in range(50)}
    found, _ = solve_placements(
        all_edges(maps), dict.fromkeys(maps, MIDDLE), "rigid", fix=0
    )
    assert affine.scale(found[49]) == pytest.approx(1, abs=1e-6)


def test_one_wrong_match_does_not_bend_the_stack():
    maps = {z: similarity(2 * z, (7 * z, -3 * z)) for z in range(8)}
    edges = all_edges(maps, reach=3)
    wrong = edge_of(maps | {5: similarity(170, (90, 900))}, 5, 3)
    edges = [wrong if (e.z, e.y) == (5, 3) else e for e in edges]

    found, _ = solve_placements(edges, dict.fromkeys(maps, MIDDLE), "rigid", fix=0)

    assert max(error(found, maps, z, 0) for z in maps) < 1.0


def test_a_section_that_matches_nothing_lies_between_its_neighbours():
    maps = {z: similarity(0, (10 * z, 0)) for z in range(5)}
    edges = [e for e in all_edges(maps) if 2 not in (e.z, e.y)]
    middles = dict.fromkeys(maps, MIDDLE) | {4: None}
    edges = [e for e in edges if 4 not in (e.z, e.y)]

    found, placed = solve_placements(edges, middles, "rigid", fix=0)

    assert error(found, maps, 2, 0) < 0.01  # the mean of 1 and 3
    assert placed[2] == Placed("neighbours", 0.0, (), "match no neighbour")
    assert placed[4].how == "blank"
    np.testing.assert_allclose(found[4], found[3])
    lines = describe_placed(placed)
    assert lines == [
        "placed 5 sections: 3 by keypoints, 1 by neighbours, 1 by blank",
        "sections 2: match no neighbour",
        "sections 4: have no tissue",
    ]
    with pytest.raises(DatasetError, match=r"sections 2: match no neighbour.*unplaced"):
        check_placed(Placement(found, placed, Grid(0, 0, 0, 8, 8)))


def test_two_parts_that_do_not_match_are_each_whole():
    maps = {z: similarity(3 * z, (5 * z, 2 * z)) for z in range(9)}
    edges = [e for e in all_edges(maps) if (e.z < 5) == (e.y < 5)]

    found, placed = solve_placements(edges, dict.fromkeys(maps, MIDDLE), "rigid", fix=0)

    assert max(error(found, maps, z, 0) for z in range(5)) < 0.01
    # Within the smaller part, sections lie on each other as they should.
    for z in range(6, 9):
        between = affine.compose(affine.invert(found[5]), found[z])
        truth = affine.compose(maps[5], affine.invert(maps[z]))
        np.testing.assert_allclose(between, truth, atol=1e-4)
    assert {placed[z].how for z in range(5, 9)} == {"neighbours"}
    # The nearest sections of both parts lie on each other.
    at = affine.apply(affine.invert(found[5]), MIDDLE[None])
    np.testing.assert_allclose(
        at, affine.apply(affine.invert(found[4]), MIDDLE[None]), atol=1e-6
    )


def test_a_weak_match_needs_another_one_that_confirms_it():
    middles = dict.fromkeys(MAPS, MIDDLE)
    strong = [e for e in all_edges(MAPS) if 2 not in (e.z, e.y)]
    weak = edge_of(MAPS, 2, 1, score=7.0)
    wrong = edge_of(MAPS | {2: similarity(90, (0, 0))}, 3, 2, score=7.0)
    confirming = edge_of(MAPS, 2, 0, score=7.0)

    assert weak not in confirmed_edges([*strong, weak], middles)
    assert len(confirmed_edges([*strong, weak, wrong], middles)) == len(strong)
    kept = confirmed_edges([*strong, weak, wrong, confirming], middles)
    assert {(e.z, e.y) for e in kept if e.score < 10} == {(2, 1), (2, 0)}


def test_known_places_are_kept_when_a_stack_grows():
    maps = {z: similarity(2 * z, (7 * z, 0)) for z in range(6)}
    edges = all_edges(maps)
    middles = dict.fromkeys(maps, MIDDLE)
    shorter = {z: MIDDLE for z in range(4)}
    few = [e for e in edges if e.z < 4]
    before, _ = solve_placements(few, shorter, "similarity", fix=None)

    found, _ = solve_placements(edges, middles, "similarity", known=before)

    assert all(np.array_equal(found[z], before[z]) for z in before)
    truth = affine.compose(affine.invert(before[3]), found[5])
    np.testing.assert_allclose(
        truth, affine.compose(maps[3], affine.invert(maps[5])), atol=0.05
    )


def test_a_stack_without_tissue_is_refused():
    with pytest.raises(DatasetError, match="sections 0 to 2: none has tissue"):
        solve_placements([], dict.fromkeys(range(3)), "rigid")


def test_a_placement_is_read_as_it_was_written(tmp_path):
    placement = Placement(
        {3: similarity(30, (5.5, -7)), 4: affine.identity()},
        {3: Placed("correlation", 9.5, (4,), ""), 4: Placed("blank", 0.0, (), "none")},
        Grid(0, -64, 128, 256, 512),
    )
    placement.write(f"file://{tmp_path}")

    read = Placement.read(f"file://{tmp_path}")

    np.testing.assert_array_equal(read.matrices[3], placement.matrices[3])
    assert read.placed == placement.placed and read.area == placement.area
    # On disk x comes first: rows run along x.
    text = (tmp_path / "placement.json").read_text()
    assert '"matrix"' in text
    with pytest.raises(DatasetError, match="run the step place first"):
        Placement.read(f"file://{tmp_path}/nothing")
