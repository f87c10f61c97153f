"""Place sections: find where each lies, from thumbnails, and solve all at once.

Each section is matched with the three before it (`match_sections`). A match gives
points s of section z and t of section y that show the same tissue. Let complex
numbers be points, col + i row. Every affine map is s -> a s + b conj(s) + c, and a
similarity has b = 0. The maps of all sections to the canvas minimise

    sum over matches  w mean |m_z(s) - m_y(t)|^2
    + h r^2 sum_z     |a_z - a_z / |a_z||^2 + (b's) |b_z|^2,

with r the size of a section. The second line holds each map near a turn, so that scale
does not drift over hundreds of sections. Weights w are those of Cauchy's robust loss,
so that one wrong match does not bend the stack.

Source: Zhang 1997 (doi:10.1016/S0262-8856(96)01112-2) for the weights.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import spsolve

from metroem.errors import DatasetError
from metroem.geometry import affine
from metroem.geometry.grid import Grid
from metroem.io.image_volume import ImageVolume
from metroem.io.volume import iter_sections
from metroem.io.volume_write import Notes
from metroem.stack.match_sections import (
    LEVEL_PX,
    Section,
    describe,
    level_factors,
    match,
    tissue_box,
)
from metroem.stack.tasks import Step

logger = logging.getLogger(__name__)

# Sections before it that a section is matched with.
NEIGHBOURS = 3
# Sections of a task.
_BLOCK = 16
# h and b's of the head, by model: how much turns are preferred.
_HOLD = {"rigid": 1e3, "similarity": 1e-2, "affine": 1e-2}
_HOLD_SHEAR = 3e-2
_ROUNDS = 12
# Residual at which the weight of a match is a half: at least this fraction of r.
_LEAST_RESIDUAL = 2e-3
# A match of a lower score is used only if another one confirms it: of 30 pairs of a
# stack with a section of another tissue, 29 had 17 and more, and a wrong one 7.1.
_SURE_SCORE = 10.0
# Two matches confirm each other if they differ by less than this fraction of the spread
# of their points.
_MAX_DIFFERENCE = 0.1
_FORMAT = 1


class Edge(NamedTuple):
    """Points of two sections that show the same tissue.

    Attributes:
        z: the one section.
        y: the other section, before it.
        points: (N, 2) col and row in section z.
        others: (N, 2) col and row in section y.
        how: "keypoints" or "correlation".
        score: of the match.
        is_mirrored: whether one of the two is mirrored.
    """

    z: int
    y: int
    points: np.ndarray
    others: np.ndarray
    how: str
    score: float
    is_mirrored: bool = False


class Placed(NamedTuple):
    """How a section got its place.

    Attributes:
        how: "keypoints", "correlation", "neighbours" (it matches nothing, or nothing
            of the main part of the stack) or "blank".
        score: of its best match, standard deviations above chance; 0 without one.
        matched: z of the sections that it matches.
        reason: why it has the place of its neighbours; "" if it was matched.
    """

    how: str
    score: float
    matched: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Placement:
    """Where all sections lie.

    Attributes:
        matrices: by z, (2, 3) pull: (col, row, 1) of the canvas -> the raw section,
            mip-0 pixels of the volume.
        placed: by z, how it was found.
        area: the canvas, at mip 0: it holds the tissue of all sections.
    """

    matrices: Mapping[int, np.ndarray]
    placed: Mapping[int, Placed]
    area: Grid

    @classmethod
    def read(cls, destination: str) -> "Placement":
        """Read <destination>/placement.json.

        Raises:
            DatasetError: it does not exist, or is not what this version writes.
        """
        note = Notes(destination).read(["placement.json"]).get("placement.json")
        if note is None:
            raise DatasetError(
                f"{destination}/placement.json: does not exist; run the step place "
                "first (align-stack --steps place, or metroem place)"
            )
        try:
            if note["format"] != _FORMAT:
                raise ValueError(f"format {note['format']}")
            sections = {int(z): about for z, about in note["sections"].items()}
            return cls(
                {
                    z: affine.swap_axes(np.array(about["matrix"], float))
                    for z, about in sections.items()
                },
                {
                    z: Placed(
                        about["how"],
                        about["score"],
                        tuple(about["matched"]),
                        about["reason"],
                    )
                    for z, about in sections.items()
                },
                Grid(0, *(note["canvas"][key] for key in ("x", "y", "rows", "cols"))),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(
                f"{destination}/placement.json: is not what this version writes "
                f"({error}); run the step place again: --again"
            ) from error

    def write(self, destination: str) -> None:
        """Write <destination>/placement.json.

        Its matrices map (x, y, 1) of the aligned volume to (x, y) of the raw one.
        """
        sections = {
            str(z): {
                "matrix": affine.swap_axes(matrix).tolist(),
                **self.placed[z]._asdict(),
            }
            for z, matrix in sorted(self.matrices.items())
        }
        area = self.area
        canvas = {"x": area.x, "y": area.y, "rows": area.rows, "cols": area.cols}
        note = {"format": _FORMAT, "canvas": canvas, "sections": sections}
        Notes(destination).write("placement.json", note)

    def describe(self) -> list[str]:
        """Say how many sections were placed by what, and name those that were not."""
        return describe_placed(self.placed)


def describe_placed(placed: Mapping[int, Placed]) -> list[str]:
    """Say how many sections were placed by what, and name those that were not."""
    counts = {
        how: sum(one.how == how for one in placed.values())
        for how in ("keypoints", "correlation", "neighbours", "blank")
    }
    words = [f"{count} by {how}" for how, count in counts.items() if count]
    lines = [f"placed {len(placed)} sections: {', '.join(words)}"]
    unplaced = [z for z, one in sorted(placed.items()) if one.reason]
    for reason, group in groupby(unplaced, key=lambda z: placed[z].reason):
        lines.append(f"sections {_in_words(list(group))}: {reason}")
    return lines


def check_placed(placement: Placement) -> None:
    """Raise an error that names the sections that match nothing.

    Raises:
        DatasetError: a section with tissue has the place of its neighbours.
    """
    lost = [z for z, one in placement.placed.items() if one.how == "neighbours"]
    if lost:
        raise DatasetError(
            f"sections {_in_words(lost)}: match no neighbour, so they lie where their "
            "neighbours do; look at them, and give --allow_unplaced if that is right"
        )


def _in_words(sections: Sequence[int]) -> str:
    """List sections, with runs as "3 to 7"."""
    runs: list[list[int]] = []
    for z in sorted(sections):
        if runs and z == runs[-1][-1] + 1:
            runs[-1].append(z)
        else:
            runs.append([z])
    return ", ".join(
        f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs
    )


# -------------------------------------------------------------------- all at once


def solve_placements(
    edges: Sequence[Edge],
    sections: Mapping[int, np.ndarray | None],
    model: str,
    *,
    fix: int | None = None,
    known: Mapping[int, np.ndarray] | None = None,
) -> tuple[dict[int, np.ndarray], dict[int, Placed]]:
    """Find the places of all sections at once.

    Args:
        edges: all matches.
        sections: by z, the middle of its tissue, (2,) col and row; None if blank.
        model: "rigid", "similarity" or "affine".
        fix: section that stays where it is; None: the middle one of the largest group
            of sections that match.
        known: matrices of sections that keep theirs, by z; then `fix` is not used.

    Returns:
        By z, (2, 3) pull matrices from the canvas to the section, and how each was
        found.

    Raises:
        DatasetError: no section has tissue.
    """
    known = known or {}
    if all(middle is None for middle in sections.values()):
        raise DatasetError(
            f"sections {_in_words(list(sections))}: none has tissue, so there is "
            "nothing to place; check --z_start, --z_end and the volume"
        )
    edges = confirmed_edges(edges, sections)
    groups = _groups(edges, sections)
    main = next(
        (one for one in groups if fix in one or any(z in known for z in one)),
        groups[0],
    )
    maps: dict[int, np.ndarray] = {z: affine.invert(m) for z, m in known.items()}
    placed: dict[int, Placed] = {}
    for group in [main, *(one for one in groups if one is not main)]:
        if len(group) == 1 and group is not main:
            continue
        of_group = [edge for edge in edges if edge.z in group]
        held = {z: m for z, m in maps.items() if z in group}
        start = fix if fix in group else sorted(group)[len(group) // 2]
        found = _solve_group(of_group, sorted(group), model, start, held)
        if group is not main:
            found = _moved_to_neighbours(found, maps, sections)
        maps |= found
        for z in group:
            about = _about(z, of_group)
            if group is not main:
                about = about._replace(
                    how="neighbours",
                    reason="match each other, but nothing else of the stack; they were "
                    "moved together to where their neighbours lie",
                )
            elif len(group) == 1:
                about = Placed("neighbours", 0.0, (), "match no neighbour")
            placed[z] = about
    for z in sections:
        if z not in maps:
            is_blank = sections[z] is None
            reason = "have no tissue" if is_blank else "match no neighbour"
            how = "blank" if is_blank else "neighbours"
            placed[z] = Placed(how, 0.0, (), reason)
    _interpolate(maps, sorted(sections))
    matrices = {z: affine.invert(maps[z]) for z in sorted(sections)}
    matrices |= dict(known)
    return matrices, {z: placed[z] for z in sorted(sections)}


def confirmed_edges(
    edges: Sequence[Edge], sections: Mapping[int, np.ndarray | None]
) -> list[Edge]:
    """Leave out matches that are not sure and that no other match confirms.

    Sections are grouped by sure matches. A match that is not sure and that connects two
    groups needs another one between them that says the same.
    """
    sure = [edge for edge in edges if edge.score >= _SURE_SCORE]
    kept = list(sure)
    groups = _groups(sure, sections)
    group_of = {z: index for index, group in enumerate(groups) for z in group}
    by_groups: dict[tuple[int, int], list[Edge]] = {}
    for edge in edges:
        if edge.score < _SURE_SCORE:
            pair = group_of[edge.z], group_of[edge.y]
            by_groups.setdefault((min(pair), max(pair)), []).append(edge)
    for (one, other), between in by_groups.items():
        if one == other:
            kept += between  # the sure matches outvote a wrong one
            continue
        maps = {}
        for index in (one, other):
            group = sorted(groups[index])
            of_group = [edge for edge in sure if edge.z in groups[index]]
            maps |= _chain(of_group, group, {group[0]: affine.identity()})
        size = max(float(np.std(edge.points, axis=0).max()) for edge in between)
        places = [_place_of(edge, maps, groups[one], size) for edge in between]
        limit = _MAX_DIFFERENCE * size
        for index, edge in enumerate(between):
            if any(
                np.abs(places[index] - place).max() < limit
                for k, place in enumerate(places)
                if k != index
            ):
                kept.append(edge)
    return sorted(kept, key=lambda edge: (edge.z, -edge.y))


def _place_of(
    edge: Edge, maps: Mapping[int, np.ndarray], group: set[int], size: float
) -> np.ndarray:
    """Map a triangle of one group to the other group by a match, (3, 2).

    Args:
        edge: the match.
        maps: first maps of the sections of both groups, each in its group's frame.
        group: the one group.
        size: length of the triangle's sides, px.
    """
    inner, outer = (edge.z, edge.points), (edge.y, edge.others)
    if edge.z not in group:
        inner, outer = outer, inner
    mirror = [-1.0 if edge.is_mirrored else 1.0, 1.0]
    between = affine.fit(inner[1] * mirror, outer[1], "similarity") * [*mirror, 1.0]
    triangle = np.array([[0.0, 0.0], [size, 0.0], [0.0, size]])
    at = affine.apply(affine.invert(maps[inner[0]]), triangle)
    return affine.apply(maps[outer[0]], affine.apply(between, at))


def _groups(
    edges: Sequence[Edge], sections: Mapping[int, np.ndarray | None]
) -> list[set[int]]:
    """Group sections with tissue that are connected by matches, the largest first."""
    group_of = {z: {z} for z, middle in sections.items() if middle is not None}
    for edge in edges:
        one, other = group_of[edge.z], group_of[edge.y]
        if one is not other:
            one |= other
            for z in other:
                group_of[z] = one
    unique = {id(group): group for group in group_of.values()}
    return sorted(unique.values(), key=lambda group: (-len(group), min(group)))


def _about(z: int, edges: Sequence[Edge]) -> Placed:
    """Describe by which matches a section was placed."""
    own = [edge for edge in edges if z in (edge.z, edge.y)]
    best = max(own, key=lambda edge: edge.score, default=None)
    if best is None:
        return Placed("keypoints", 0.0, (), "")
    by_keypoints = any(edge.how == "keypoints" for edge in own)
    others = sorted({edge.y if edge.z == z else edge.z for edge in own})
    how = "keypoints" if by_keypoints else "correlation"
    return Placed(how, round(best.score, 2), tuple(others), "")


def _solve_group(
    edges: Sequence[Edge],
    group: Sequence[int],
    model: str,
    fix: int,
    held: Mapping[int, np.ndarray],
) -> dict[int, np.ndarray]:
    """Solve the maps, section -> canvas, of sections that are connected by matches.

    Args:
        edges: the matches between them.
        group: their z, in rising order.
        model: "rigid", "similarity" or "affine".
        fix: the section whose map is the identity; not used if some are held.
        held: maps of sections that keep theirs.
    """
    if not held:
        held = {fix: affine.identity()}
    points = {
        index: tuple(_as_complex(p) for p in (edge.points, edge.others))
        for index, edge in enumerate(edges)
    }
    size = max(
        (float(np.abs(p - p.mean()).mean()) for pair in points.values() for p in pair),
        default=1.0,
    )
    starts = _chain(edges, group, held)
    free = [z for z in group if z not in held]
    if not free:
        return {}
    column = {z: index for index, z in enumerate(free)}
    maps = {z: starts[z] for z in group}
    weights = np.ones(len(edges))
    middles = {
        z: np.concatenate(
            [points[i][0] for i, e in enumerate(edges) if e.z == z]
            + [points[i][1] for i, e in enumerate(edges) if e.y == z]
        ).mean()
        for z in group
    }
    for _ in range(_ROUNDS):
        before = maps
        maps = _solve_once(
            edges, points, weights, (maps, held), column, middles, model, size
        )
        residuals = np.array(
            [
                np.sqrt(
                    np.mean(np.abs(_apply(maps[e.z], s) - _apply(maps[e.y], t)) ** 2)
                )
                for e, (s, t) in zip(edges, points.values(), strict=True)
            ]
        )
        scale = max(2 * float(np.median(residuals)), _LEAST_RESIDUAL * size)
        weights = 1 / (1 + (residuals / scale) ** 2)
        change = max(float(np.abs(maps[z] - before[z])[:, 2].max()) for z in free)
        if change < 1e-3:
            break
    if model != "affine":
        maps = {
            z: m if z in held else _to_model(m, model, middles[z])
            for z, m in maps.items()
        }
    return {z: maps[z] for z in free} | {z: held[z] for z in group if z in held}


def _solve_once(
    edges: Sequence[Edge],
    points: Mapping[int, tuple[np.ndarray, ...]],
    weights: np.ndarray,
    current: tuple[Mapping[int, np.ndarray], Mapping[int, np.ndarray]],
    column: Mapping[int, int],
    middles: Mapping[int, complex],
    model: str,
    size: float,
) -> dict[int, np.ndarray]:
    """Solve the linear equations of the file's head once; complex, three a section."""
    maps, held = current
    num = 3 * len(column)
    rows: list[sparse.coo_array] = []
    right: list[np.ndarray] = []
    for index, edge in enumerate(edges):
        factor = np.sqrt(weights[index] / len(edge.points))
        parts, constant = [], np.zeros(len(edge.points), complex)
        for z, at, sign in (
            (edge.z, points[index][0], 1.0),
            (edge.y, points[index][1], -1.0),
        ):
            if z in column:
                offset = at - middles[z]
                values = [offset, offset.conj(), np.ones(len(at), complex)]
                parts.append((3 * column[z], sign * np.stack(values, 1)))
            else:
                constant -= sign * _apply(held[z], at)
        block_rows = np.arange(len(constant))
        where = [
            (np.repeat(block_rows, 3), np.tile(first + np.arange(3), len(constant)))
            for first, _ in parts
        ]
        rows.append(
            sparse.coo_array(
                (
                    factor * np.concatenate([v.ravel() for _, v in parts])
                    if parts
                    else np.zeros(0, complex),
                    (
                        np.concatenate([r for r, _ in where]) if parts else np.zeros(0),
                        np.concatenate([c for _, c in where]) if parts else np.zeros(0),
                    ),
                ),
                shape=(len(constant), num),
            )
        )
        right.append(factor * constant)
    hold, shear = np.sqrt(_HOLD[model]) * size, np.sqrt(_HOLD_SHEAR) * size
    if model != "affine":
        shear = 1e3 * size
    turns = np.zeros(num, complex)
    held_values = np.zeros(num, complex)
    for z, index in column.items():
        is_mirror = affine.determinant(maps[z]) < 0
        a, b = _parts(maps[z])
        main, other = (1, 0) if is_mirror else (0, 1)
        held_values[3 * index + main] = hold
        held_values[3 * index + other] = shear
        value = (b if is_mirror else a) or 1.0
        turns[3 * index + main] = hold * value / abs(value)
    rows.append(sparse.diags_array(held_values).tocoo())
    right.append(turns)
    matrix = sparse.vstack(rows).tocsc()
    adjoint = matrix.conj().T
    normal = (adjoint @ matrix + sparse.eye_array(num) * 1e-12).tocsc()
    solved: Any = spsolve(normal, adjoint @ np.concatenate(right)).reshape(-1, 3)
    found = {z: np.asarray(m) for z, m in maps.items() if z not in column}
    for z, index in column.items():
        a, b, c = solved[index]
        found[z] = _from_parts(a, b, c - a * middles[z] - b * np.conj(middles[z]))
    return found


def _chain(
    edges: Sequence[Edge], group: Sequence[int], held: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """Find first maps, section -> canvas, along the best matches."""
    maps = dict(held)
    best_first = sorted(edges, key=lambda edge: (edge.z - edge.y, -edge.score))
    while len(maps) < len(set(group) | set(held)):
        edge = next(e for e in best_first if (e.z in maps) != (e.y in maps))
        known, new, at, to = edge.y, edge.z, edge.others, edge.points
        if edge.z in maps:
            known, new, at, to = edge.z, edge.y, edge.points, edge.others
        mirror = [-1.0 if edge.is_mirrored else 1.0, 1.0]
        between = affine.fit(to * mirror, at, "similarity")
        between = between * [*mirror, 1.0]
        maps[new] = affine.compose(between, maps[known])
    return maps


def _moved_to_neighbours(
    found: Mapping[int, np.ndarray],
    maps: Mapping[int, np.ndarray],
    sections: Mapping[int, np.ndarray | None],
) -> dict[int, np.ndarray]:
    """Move a group of sections so that the nearest lies where its neighbour does."""
    near, other = min(
        ((z, y) for z in found for y in maps), key=lambda pair: abs(pair[0] - pair[1])
    )
    middle, neighbour = sections[near], sections[other]
    if middle is None or neighbour is None:
        return dict(found)
    shift = affine.apply(maps[other], neighbour[None])[0]
    shift = shift - affine.apply(found[near], middle[None])[0]
    return {z: m + np.column_stack([np.zeros((2, 2)), shift]) for z, m in found.items()}


def _interpolate(maps: dict[int, np.ndarray], sections: Sequence[int]) -> None:
    """Give sections without a map the mean of their neighbours', by distance."""
    have = sorted(maps)
    for z in sections:
        if z in have:
            continue
        before = max((y for y in have if y < z), default=None)
        after = min((y for y in have if y > z), default=None)
        if before is None or after is None:
            nearest = after if before is None else before
            assert nearest is not None
            maps[z] = maps[nearest]
            continue
        fraction = (z - before) / (after - before)
        mixed = (1 - fraction) * maps[before] + fraction * maps[after]
        # The mean of two turns that differ much is nearly singular.
        is_good = abs(affine.determinant(mixed)) > 0.25
        near = before if fraction <= 0.5 else after
        maps[z] = mixed if is_good else maps[near]


def _to_model(matrix: np.ndarray, model: str, middle: complex) -> np.ndarray:
    """Project a map onto its model; the image of its middle stays."""
    center = np.array([middle.real, middle.imag])
    similar = affine.nearest_similarity(matrix, center)
    if model == "similarity":
        return similar
    linear = similar[:, :2] / affine.scale(similar)
    image = similar[:, :2] @ center + similar[:, 2]
    return np.column_stack([linear, image - linear @ center])


def _as_complex(points: np.ndarray) -> np.ndarray:
    return points[:, 0] + 1j * points[:, 1]


def _apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map complex points."""
    a, b = _parts(matrix)
    return a * points + b * points.conj() + complex(*matrix[:, 2])


def _parts(matrix: np.ndarray) -> tuple[complex, complex]:
    """Return a and b of a map, see the file's head."""
    (p, q), (r, s) = matrix[:, :2]
    return complex(p + s, r - q) / 2, complex(p - s, r + q) / 2


def _from_parts(a: complex, b: complex, c: complex) -> np.ndarray:
    """Make the matrix of a map from its parts."""
    return np.array(
        [
            [a.real + b.real, b.imag - a.imag, c.real],
            [a.imag + b.imag, a.real - b.real, c.imag],
        ]
    )


# ------------------------------------------------------------------------ matching


class Matched(NamedTuple):
    """A thumbnail, and its matches with those before it.

    Attributes:
        z: the section.
        middle: (2,) col and row of the middle of its tissue; None if blank.
        edges: its matches; points are px of the thumbnail.
        box: first row, end row, first col, end col of its tissue; None if blank.
    """

    z: int
    middle: np.ndarray | None
    edges: list[Edge]
    box: tuple[int, int, int, int] | None


def match_thumbnails(
    thumbnails: Iterable[tuple[int, np.ndarray]],
    factors: Sequence[int],
    model: str,
    flip: bool,
    first: int,
) -> Iterator[Matched]:
    """Match each thumbnail with those before it.

    Args:
        thumbnails: z and (h, w) grey levels, 0 = no data, in rising order of z.
        factors: of `level_factors`.
        model: map that is fitted to a pair.
        flip: whether sections may be mirrored.
        first: sections before it are only matched with.
    """
    ways = (False, True)[: 1 + flip]
    earlier: dict[int, Section | None] = {}
    found: dict[tuple[int, int], np.ndarray] = {}
    for z, image in thumbnails:
        sides = [describe(image, factors, way) for way in ways]
        edges = []
        for y in range(z - 1, z - 1 - NEIGHBOURS, -1):
            if y not in earlier:
                continue
            # The way through a section between is a good guess.
            through = (
                affine.compose(found[x, y], found[z, x])
                for x in range(z - 1, y, -1)
                if (z, x) in found and (x, y) in found
            )
            guess = next(through, None)
            for side in sides:
                one = match(side, earlier[y], model, guess)
                if one is not None:
                    found[z, y] = one.matrix
                    is_mirrored = affine.determinant(one.matrix) < 0
                    points = one.src_points, one.tgt_points
                    edges.append(Edge(z, y, *points, one.how, one.score, is_mirrored))
                    break
        earlier[z] = sides[0]
        earlier.pop(z - NEIGHBOURS, None)
        box = tissue_box(image)
        middle = None
        if box is not None and sides[0] is not None:
            middle = np.array([(box[2] + box[3] - 1) / 2, (box[0] + box[1] - 1) / 2])
        if z >= first:
            yield Matched(z, middle, edges, box)


def place_sections(
    sections: Sequence[np.ndarray],
    *,
    model: str = "similarity",
    flip: bool = False,
    fix: int | None = None,
) -> tuple[list[np.ndarray], list[str]]:
    """Place sections that are in memory.

    Args:
        sections: (H, W) each, grey levels, 0 = no data.
        model: map of a section: "rigid", "similarity" or "affine".
        flip: whether sections may be mirrored.
        fix: index of the section that stays where it is; None: the middle one.

    Returns:
        (2, 3) pull matrices, (col, row, 1) of the common frame -> the section; and
        lines that say what was found.

    Raises:
        DatasetError: no section has tissue.
    """
    factors = level_factors(sections)
    matched = list(match_thumbnails(enumerate(sections), factors, model, flip, 0))
    edges = [edge for one in matched for edge in one.edges]
    middles = {one.z: one.middle for one in matched}
    matrices, placed = solve_placements(edges, middles, model, fix=fix)
    return list(matrices.values()), describe_placed(placed)


# --------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class PlaceMatchStep(Step):
    """Match thumbnails of sections: a block of sections a task.

    Attributes:
        destination: the folder of the stack.
        cv_path: volume of the raw sections.
        sections: range of z.
        model: map of a section.
        flip: whether sections may be mirrored.
        thumbnail_px: longest side of a thumbnail.
        name: name of the step.
    """

    destination: str
    cv_path: str
    sections: range
    model: str
    flip: bool
    thumbnail_px: int
    name: str = "place-match"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            "cv_path": self.cv_path,
            "model": self.model,
            "flip": self.flip,
            "thumbnail_px": self.thumbnail_px,
        }

    def tasks(self) -> list[str]:
        stop = self.sections.stop
        starts = range(self.sections.start, stop, _BLOCK)
        return [f"z{z}-{min(z + _BLOCK, stop)}" for z in starts]

    def run(self, task: str) -> Mapping[str, Any]:
        start, stop = map(int, task[1:].split("-"))
        read = range(max(start - NEIGHBOURS, self.sections.start), stop)
        window = self._volume.extent()[0].cover(self._mip)
        side = max(window.shape)
        factors = sorted(
            {-(-side // px) for px in LEVEL_PX if px < self.thumbnail_px}
            | {-(-side // self.thumbnail_px)},
            reverse=True,
        )
        images = (
            (z, image[0])
            for z, image in iter_sections(self._volume, dict.fromkeys(read, window))
        )
        note: dict[str, Any] = {}
        for one in match_thumbnails(images, factors, self.model, self.flip, start):
            note[str(one.z)] = {
                "box": one.box and self._to_mip0_box(one.box, window),
                "matches": [
                    {
                        "on": edge.y,
                        "how": edge.how,
                        "score": edge.score,
                        "is_mirrored": edge.is_mirrored,
                        "points": self._to_mip0(edge.points, window),
                        "others": self._to_mip0(edge.others, window),
                    }
                    for edge in one.edges
                ],
                "is_blank": one.middle is None,
            }
        Notes(f"{self.destination}/matches").write(f"{task}.json", note)
        read_bytes = len(read) * window.rows * window.cols
        needed = (stop - start) * window.rows * window.cols
        return {"bytes_read": read_bytes, "bytes_needed": needed}

    @property
    def _mip(self) -> int:
        """The coarsest mip at which sections are as long as a thumbnail."""
        longest = max(self._volume.extent()[0].shape)
        mip = 0
        while longest >> (mip + 1) >= self.thumbnail_px:
            mip += 1
        return max(mip, self._volume.mips[0])

    def _to_mip0(self, points: np.ndarray, window: Grid) -> list[list[float]]:
        """Convert px of a thumbnail to mip-0 px of the volume."""
        spacing = 1 << window.mip
        at = (points + 0.5) * spacing - 0.5 + [window.y, window.x]
        return np.round(at, 2).tolist()

    def _to_mip0_box(self, box: tuple[int, int, int, int], window: Grid) -> list[int]:
        """Convert a box to first row, end row, first col and end col at mip 0."""
        top, bottom, left, right = (edge << window.mip for edge in box)
        x, y = window.x, window.y
        return [top + x, bottom + x, left + y, right + y]

    @cached_property
    def _volume(self) -> ImageVolume:
        return ImageVolume(self.cv_path)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a copy opens by itself."""
        return {k: v for k, v in self.__dict__.items() if k != "_volume"}


@dataclass(frozen=True)
class PlaceSolveStep(Step):
    """Place all sections at once, from their matches: one task.

    When a stack grows, sections that were placed before keep their places.

    Attributes:
        match: the step before.
        fix: section that stays where it is; None: the middle one.
        block_px: what the canvas begins and ends at, mip-0 px.
        chunk_px: by how much its beginning moves when a stack grows, mip-0 px.
        name: name of the step.
    """

    match: PlaceMatchStep
    fix: int | None
    block_px: int
    chunk_px: int
    name: str = "place-solve"

    @property
    def destination(self) -> str:  # type: ignore[override]
        """The folder of the stack."""
        return self.match.destination

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**self.match.settings, "fix": self.fix}

    def tasks(self) -> list[str]:
        sections = self.match.sections
        return [f"z{sections.start}-{sections.stop}"]

    def run(self, task: str) -> Mapping[str, Any]:
        names = [f"{name}.json" for name in self.match.tasks()]
        notes = Notes(f"{self.destination}/matches").read(names)
        if missing := sorted(set(names) - set(notes)):
            raise DatasetError(
                f"{self.destination}/matches/{missing[0]}: does not exist; run the "
                "step place again: --steps place --again"
            )
        edges, middles, boxes = [], {}, {}
        for note in notes.values():
            for key, about in note.items():
                z, box = int(key), about["box"]
                middles[z], boxes[z] = None, box
                if not about["is_blank"]:
                    top, bottom, left, right = box
                    middles[z] = np.array([left + right - 1, top + bottom - 1]) / 2
                edges += [
                    Edge(
                        *(z, one["on"], np.array(one["points"], float)),
                        *(np.array(one["others"], float), one["how"], one["score"]),
                        one["is_mirrored"],
                    )
                    for one in about["matches"]
                ]
        middles = dict(sorted(middles.items()))
        before = self._earlier(len(middles))
        known = {} if before is None else before.matrices
        matrices, placed = solve_placements(
            edges, middles, self.match.model, fix=self.fix, known=known
        )
        if before is not None:
            placed |= before.placed
        area = self._area(matrices, boxes, before)
        placement = Placement(matrices, placed, area)
        placement.write(self.destination)
        for line in placement.describe():
            logger.info("%s", line)
        return {}

    def _earlier(self, num_sections: int) -> Placement | None:
        """Read the placement of a shorter stack with the same settings."""
        notes = Notes(self.destination).read(["placement.json", "placed_by.json"])
        if notes.get("placed_by.json") != {"settings": dict(self.settings)}:
            Notes(self.destination).write(
                "placed_by.json", {"settings": dict(self.settings)}
            )
            return None
        if "placement.json" not in notes:
            return None
        before = Placement.read(self.destination)
        is_shorter = len(before.matrices) < num_sections
        return before if is_shorter else None

    def _area(
        self,
        matrices: Mapping[int, np.ndarray],
        boxes: Mapping[int, Sequence[int] | None],
        before: Placement | None,
    ) -> Grid:
        """Find the canvas: the box of the tissue of all placed sections."""
        corners = []
        for z, box in boxes.items():
            if box is not None:
                top, bottom, left, right = box
                ends = [(c, r) for c in (left, right - 1) for r in (top, bottom - 1)]
                ends = np.array(ends, float)
                corners.append(affine.apply(affine.invert(matrices[z]), ends))
        found = np.concatenate(corners)
        low = np.floor(found.min(0)).astype(int)[::-1]
        high = np.ceil(found.max(0)).astype(int)[::-1] + 1
        unit = self.block_px
        start, stop = low // unit * unit, -(-high // unit) * unit
        if before is not None:
            # Chunks keep their names if the canvas begins whole chunks earlier.
            area = before.area
            first, last = np.array([area.x, area.y]), np.array(area.end)
            steps = np.maximum(-(-(first - start) // self.chunk_px), 0)
            start, stop = first - steps * self.chunk_px, np.maximum(stop, last)
        return Grid(0, *start.tolist(), *(stop - start).tolist())
