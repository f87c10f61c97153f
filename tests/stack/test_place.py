"""Placing sections: maps that were put in are found again."""

import cv2
import numpy as np
import pytest

from metroem.errors import DatasetError
from metroem.geometry import affine
from metroem.geometry.grid import Grid
from metroem.stack.place import (
    PlaceMatchStep,
    Placement,
    PlaceSolveStep,
    check_placed,
    describe_placed,
    place_sections,
)
from metroem.stack.solve_placements import (
    Edge,
    Placed,
    confirmed_edges,
    solve_placements,
)
from metroem.synthetic.tissue import TissueRecipe, make_tissue
from tests.volumes import make_volume

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
    with pytest.raises(
        DatasetError, match=r"match no neighbour, .*: 2; look.*unplaced"
    ):
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


def test_wrong_matches_with_the_section_before_are_left_out_and_named():
    maps = {z: similarity(40 * z, (7 * z, -30 * z), 1.01) for z in range(14)}
    wrong = {
        (5, 4): edge_of(maps | {5: similarity(170, (90, 900))}, 5, 4),
        (9, 8): edge_of(maps | {9: similarity(20, (-400, 0))}, 9, 8),
        (10, 9): edge_of(maps | {9: similarity(-80, (0, 100))}, 10, 9),
    }
    edges = all_edges(maps, reach=3, noise=0.5)
    edges = [wrong.get((edge.z, edge.y), edge) for edge in edges]

    found, placed = solve_placements(
        edges, dict.fromkeys(maps, MIDDLE), "similarity", fix=7
    )

    # Points have 0.5 px of noise: a match of 30 of them turns by 0.5 / 150 / sqrt(30).
    assert max(error(found, maps, z, 7) for z in maps) < 2.0
    assert placed[5].not_used == (4,) and placed[9].not_used == (8, 10)
    assert describe_placed(placed)[-1].endswith(
        "contradict them: 5 on 4, 9 on 8, 10 on 9"
    )


def test_a_section_to_fix_that_matches_nothing_is_replaced_by_its_neighbour():
    edges = [e for e in all_edges(MAPS) if 2 not in (e.z, e.y)]
    edges += [edge_of(MAPS, 3, 1)]

    found, placed = solve_placements(edges, dict.fromkeys(MAPS, MIDDLE), "rigid", fix=2)

    assert [z for z, one in placed.items() if one.reason] == [2]
    np.testing.assert_allclose(found[1], affine.identity(), atol=1e-9)
    assert max(error(found, MAPS, z, 1) for z in (0, 1, 3, 4)) < 0.01


def test_sizes_differ_but_do_not_drift_over_a_long_stack():
    """Each match is 0.1 % too small, which a chain would sum up to 18 %."""
    maps = {z: similarity(0, (0, 0), 1 + 0.005 * (-1) ** z) for z in range(200)}
    edges = []
    for edge in all_edges(maps, reach=1):
        middle = edge.points.mean(0)
        edges.append(edge._replace(points=middle + 0.999 * (edge.points - middle)))

    found, _ = solve_placements(edges, dict.fromkeys(maps, MIDDLE), "similarity")

    sizes = np.array([affine.scale(found[z]) for z in range(0, 200, 2)])
    assert np.ptp(sizes) < 0.05
    # The sections' own sizes stay: odd ones are 1 % larger on the canvas.
    assert affine.scale(found[100]) / affine.scale(found[101]) == pytest.approx(
        0.995 / 1.005, abs=2e-3
    )


# ------------------------------------------------------------------ volumes

NUM, SHAPE = 7, (230, 270)
TURNS = (0, 30, -50, 100, 0, 170, -20)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Sections of one tissue, turned; one blank, one of other tissue; the true maps."""
    tissue = make_tissue(TissueRecipe(NUM, *SHAPE, seed=5))
    side = 384
    truth, sections = {}, []
    for z, degrees in enumerate(TURNS):
        turn = similarity(degrees, (0, 0))
        middle = (np.array(SHAPE[::-1]) - 1) / 2
        turn[:, 2] = np.array([3 * z, -4 * z]) + (side - 1) / 2 - turn[:, :2] @ middle
        size = (side, side)
        image = cv2.warpAffine(tissue[z], turn, size)
        shown = cv2.warpAffine(np.ones_like(tissue[z]), turn, size)
        truth[z] = turn
        sections.append(np.where(shown > 0, np.maximum(image, 1), 0))
    sections[3][:] = 0
    other = make_tissue(TissueRecipe(1, *SHAPE, seed=6))[0]
    sections[4][60 : 60 + SHAPE[0], 50 : 50 + SHAPE[1]] = other
    sections[4][:60], sections[4][60 + SHAPE[0] :] = 0, 0
    sections[4][:, :50], sections[4][:, 50 + SHAPE[1] :] = 0, 0
    # The rows of a section run along x of the volume.
    return np.stack(sections), truth, tmp_path_factory.mktemp("raw")


def steps(folder, volume, num, *, ends=None, model="rigid"):
    match = PlaceMatchStep(
        f"file://{folder}", volume, range(10, 10 + num), model, False, 256
    )
    return match, PlaceSolveStep(match, None, 32, 128, ends)


def run(step):
    for task in step.tasks():
        figures = step.run(task)
        assert figures.get("bytes_read", 0) <= 1.3 * figures.get("bytes_needed", 0)


def test_sections_of_a_volume_are_placed(raw, tmp_path):
    sections, truth, _ = raw
    volume = make_volume(
        tmp_path / "raw", [sections[:, None]], offset=(64, -32, 10), chunk=(64, 64, 1)
    )

    for step in steps(tmp_path / "dst", volume, NUM):
        run(step)

    placement = Placement.read(f"file://{tmp_path}/dst")
    how = [placement.placed[z].how for z in range(10, 10 + NUM)]
    assert how[3] == "blank" and how[4] == "neighbours"
    assert {how[z] for z in (0, 1, 2, 5, 6)} == {"keypoints"}
    # By the truth and by the placement, pixels of section 0 show tissue of section z.
    points = np.array([[120.0, 150], [250, 130], [180, 260]])
    corner = np.array([-32.0, 64.0])  # col counts along y
    for z in (1, 2, 5, 6):
        to_canvas = affine.invert(placement.matrices[10])
        found = affine.compose(to_canvas, placement.matrices[10 + z])
        expected = affine.compose(affine.invert(truth[0]), truth[z])
        got = affine.apply(found, points + corner) - corner
        assert np.abs(got - affine.apply(expected, points)).max() < 2
    # The canvas holds all placed tissue, on whole blocks.
    area = placement.area
    assert (area.x % 32, area.y % 32, area.rows % 32, area.cols % 32) == (0, 0, 0, 0)
    for z in (0, 1, 2, 5, 6):
        rows, cols = np.nonzero(sections[z])
        inside = np.stack([cols, rows], 1)[::97] + corner
        at = affine.apply(affine.invert(placement.matrices[10 + z]), inside)
        assert (at >= (area.y, area.x)).all()
        assert (at < (area.end[1], area.end[0])).all()
    # It is not larger, although turned sections lie in larger boxes.
    found = []
    for z in (0, 1, 2, 4, 5, 6):
        tissue = np.argwhere(sections[z])[:, ::-1] + corner
        found.append(affine.apply(affine.invert(placement.matrices[10 + z]), tissue))
    low, high = np.concatenate(found).min(0), np.concatenate(found).max(0)
    assert (low - (area.y, area.x) < 33).all()
    assert ((area.end[1], area.end[0]) - high <= 33).all()


def test_a_stack_that_grew_is_the_same_when_its_task_is_run_again(raw, tmp_path):
    volume = make_volume(tmp_path / "raw", [raw[0][:3, None]], offset=(0, 0, 10))

    def solve(num, **settings):
        run(steps(tmp_path / "dst", volume, num, **settings)[1])
        return Placement.read(f"file://{tmp_path}/dst")

    for num in (2, 3):
        run(steps(tmp_path / "dst", volume, num)[0])
    before = solve(2)
    after = solve(3)
    written = (tmp_path / "dst" / "placement.json").read_bytes()
    solve(3)

    assert (tmp_path / "dst" / "placement.json").read_bytes() == written
    assert after.kept_end == 12 and after.area.covers(before.area)
    for z in (10, 11):
        np.testing.assert_array_equal(after.matrices[z], before.matrices[z])
        assert after.placed[z] == before.placed[z]
    assert after.placed[12].matched == (10, 11)
    # As a new stack of that length, or with other settings, all are placed anew.
    assert solve(3, ends=(13,)).kept_end is None
    assert solve(3, ends=(12, 13)).kept_end == 12
    assert solve(3, model="affine").kept_end is None
    assert solve(2).kept_end is None


def test_tasks_read_whole_layers_of_thick_chunks(raw, tmp_path):
    volume = make_volume(
        tmp_path / "raw",
        [np.zeros((70, 1, 40, 50), np.uint8)],
        offset=(0, 0, 3),
        chunk=(64, 64, 8),
    )
    match = PlaceMatchStep(
        f"file://{tmp_path}/dst", volume, range(6, 70), "rigid", False, 256
    )

    # Layers begin at 3, 11, 19 ...; one of them is read for the sections before.
    assert match.tasks() == ["z6-35", "z35-67", "z67-70"]
    figures = match.run("z35-67")
    assert figures == {"bytes_read": 40 * 50 * 40, "bytes_needed": 32 * 50 * 40}


def test_a_missing_match_file_is_named(raw, tmp_path):
    volume = make_volume(tmp_path / "raw", [raw[0][:, None]], offset=(0, 0, 10))
    _, solve = steps(tmp_path / "dst", volume, NUM)

    with pytest.raises(DatasetError, match="matches/z10-17.json: does not exist"):
        solve.run(*solve.tasks())


def test_sections_in_memory_are_placed_in_their_own_frame(raw):
    sections, truth, _ = raw

    matrices, lines = place_sections(list(sections[:4]), fix=1, model="rigid")

    assert lines == ["placed 4 sections: 3 by keypoints, 1 by blank"] + [
        "sections 3: have no tissue"
    ]
    np.testing.assert_allclose(matrices[1], affine.identity(), atol=1e-9)
    expected = affine.compose(affine.invert(truth[1]), truth[2])
    points = np.array([[150.0, 150], [220, 210]])
    got = affine.apply(matrices[2], points)
    assert np.abs(got - affine.apply(expected, points)).max() < 2
