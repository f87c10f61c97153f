"""Place all sections of a stack at once, from how they match their neighbours.

A match of section z with section y gives points p of z and q of y that show the same
tissue. The maps B_z, from pixels of sections to the canvas, minimise

    sum over matches  w mean rho(|B_z(p) - B_y(q)|)
    + sum over z  v R^2 |shape(B_z) - shape of most sections|^2

with rho a robust loss, and w small for matches that disagree with the others. The shape
is the size and the stretch of a map, R the radius of a section. The second line keeps
sizes from drifting over hundreds of sections: each match would let them change a
little. Solved by Gauss-Newton; a step takes time in proportion to the sections.

Points and matrices are (col, row), indices of pixel centres, of any one mip.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse import linalg

from metroem.errors import DatasetError
from metroem.geometry import affine
from metroem.stack.match_sections import SURE_SCORE

# Two ways to the same section agree if they end this near, in units of the spread of
# the points. Right ones miss by some px, wrong ones by a good part of it.
_SAME = 0.1
# Points of a match that are used. Those of overlapping blocks are alike.
_POINTS = 32
_ROUNDS = 15
# Standard deviation of the sizes and stretches of sections.
_SHAPE = 0.01
# Independent points of a match: by so much is its map better than a point, squared.
_INDEPENDENT = 20
# A match is not used if its median distance is so many times that of most matches, and
# this fraction of the spread of its points.
_APART, _APART_SPREAD = 6.0, 0.03
# Distances below this fraction of the radius of a section are all alike: points are
# not known better.
_LEAST = 2e-3
# Columns of a step: turn, shift along cols, along rows, size, two stretches.
_NUM_FREE = {"rigid": 3, "similarity": 4, "affine": 6}


class Edge(NamedTuple):
    """A match: points of two sections that show the same tissue.

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

    def map_to(self, section: int) -> np.ndarray:
        """Fit the similarity from one of the two sections to the other, (2, 3).

        Args:
            section: the one that is mapped to.
        """
        start, end = self.points, self.others
        if section == self.z:
            start, end = end, start
        mirror = [-1.0 if self.is_mirrored else 1.0, 1.0]
        return affine.fit(start * mirror, end, "similarity") * [*mirror, 1.0]

    @property
    def spread_px(self) -> float:
        """Root mean square distance of the points from their middle."""
        return float(np.sqrt(self.others.var(0).sum()))


class Placed(NamedTuple):
    """How a section got its place.

    Attributes:
        how: "keypoints", "correlation", "neighbours" (it matches nothing, or nothing
            of the main part of the stack) or "blank".
        score: of its best match, standard deviations above chance; 0 without one.
        matched: z of the sections that it matches.
        reason: why it has the place of its neighbours; "" if it was matched.
        not_used: z of the sections that it matches in a way that all other matches
            contradict.
    """

    how: str
    score: float
    matched: tuple[int, ...]
    reason: str
    not_used: tuple[int, ...] = ()


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
            of sections that match. If it is not of that group, its nearest section is
            taken.
        known: matrices of sections that keep theirs, by z; then `fix` is not used.

    Returns:
        By z, (2, 3) pull matrices from the canvas to the section, and how each was
        found.

    Raises:
        DatasetError: no section has tissue.
    """
    known = {z: m for z, m in (known or {}).items() if z in sections}
    if all(middle is None for middle in sections.values()):
        raise DatasetError(
            f"sections {in_words(list(sections))}: none has tissue, so there is "
            "nothing to place; check --z_start, --z_end and the volume"
        )
    edges = confirmed_edges(edges, sections)
    tree, groups = _span(edges, sections, known)
    main = next((one for one in groups if any(z in known for z in one)), groups[0])
    held = {z: affine.invert(matrix) for z, matrix in known.items()}
    for group in groups:
        if not any(z in known for z in group):
            middle = group[len(group) // 2] if fix is None else fix
            at = min(group, key=lambda z: (abs(z - middle), z))
            held[at] = affine.identity()
    system = _System(edges, _chain(tree, held, model), set(held), model)
    system.solve()
    contradicted = {(edge.z, edge.y) for edge in system.contradicted()}
    maps = {z: system.maps[z] for z in {*main, *known}}
    for group in groups:
        if group is not main and len(group) > 1:
            found = {z: system.maps[z] for z in group}
            maps |= _moved_to_neighbours(found, maps, sections)
    _interpolate(maps, sorted(sections), system.center())
    matrices = {z: affine.invert(maps[z]) for z in sorted(sections)} | dict(known)
    about = _about(edges, contradicted, groups, main, sections)
    return matrices, {z: about[z] for z in sorted(sections)}


def in_words(sections: Sequence[int]) -> str:
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


def confirmed_edges(
    edges: Sequence[Edge], sections: Mapping[int, np.ndarray | None]
) -> list[Edge]:
    """Leave out matches that are not sure and that no other match confirms.

    Sections are grouped by sure matches. A match that is not sure and that connects two
    groups needs another one between them that says the same.
    """
    sure = [edge for edge in edges if edge.score >= SURE_SCORE]
    kept = list(sure)
    tree, groups = _span(sure, sections, ())
    group_of = {z: index for index, group in enumerate(groups) for z in group}
    maps = _chain(tree, {group[0]: affine.identity() for group in groups}, "affine")
    by_groups: dict[tuple[int, int], list[Edge]] = {}
    for edge in edges:
        if edge.score < SURE_SCORE:
            one, other = sorted((group_of[edge.z], group_of[edge.y]))
            by_groups.setdefault((one, other), []).append(edge)
    for (one, other), between in by_groups.items():
        if one == other:
            kept += between  # the sure matches outvote a wrong one
            continue
        size = max(edge.spread_px for edge in between)
        triangle = np.array([[0.0, 0.0], [size, 0.0], [0.0, size]])
        places = []
        for edge in between:
            start, end = (edge.z, edge.y)[:: 1 if group_of[edge.z] == one else -1]
            at = affine.apply(affine.invert(maps[start]), triangle)
            at = affine.apply(edge.map_to(end), at)
            places.append(affine.apply(maps[end], at))
        for index, edge in enumerate(between):
            differences = [
                np.abs(places[index] - place).max()
                for k, place in enumerate(places)
                if k != index
            ]
            if min(differences, default=np.inf) < _SAME * size:
                kept.append(edge)
    return sorted(kept, key=lambda edge: (edge.z, -edge.y))


def _ranks(edges: Sequence[Edge]) -> list[int]:
    """See which matches loops of three sections confirm.

    Returns:
        For each match 0: confirmed, 1: not in a loop, 2: no loop closes.
    """
    maps = {(edge.z, edge.y): edge.map_to(edge.z) for edge in edges}
    closed: dict[tuple[int, int], list[bool]] = {key: [] for key in maps}
    for edge in edges:
        z, y = edge.z, edge.y
        for x in range(y + 1, z):
            if (z, x) in maps and (x, y) in maps:
                around = affine.compose(maps[x, y], maps[z, x])
                ends = affine.apply(around, edge.others)
                miss = np.hypot(*(ends - affine.apply(maps[z, y], edge.others)).T)
                for key in ((z, y), (z, x), (x, y)):
                    closed[key].append(float(miss.mean()) < _SAME * edge.spread_px)
    return [
        0 if any(closed[edge.z, edge.y]) else 2 if closed[edge.z, edge.y] else 1
        for edge in edges
    ]


def _span(
    edges: Sequence[Edge],
    sections: Mapping[int, np.ndarray | None],
    known: Collection[int],
) -> tuple[list[Edge], list[list[int]]]:
    """Join sections with tissue by the best matches, without loops.

    Args:
        edges: the matches.
        sections: by z, None if blank.
        known: sections that are joined already.

    Returns:
        The matches that join them, and the groups that are joined, the largest first;
        a group is in rising order of z.
    """
    group_of = {z: [z] for z, middle in sections.items() if middle is not None}
    group_of |= dict.fromkeys(known, sorted({*known}))
    tree = []
    ranked = sorted(
        zip(_ranks(edges), edges, strict=True),
        key=lambda one: (one[0], one[1].z - one[1].y, -one[1].score, one[1].z),
    )
    for _, edge in ranked:
        one, other = group_of[edge.z], group_of[edge.y]
        if one is other:
            continue
        if len(one) < len(other):
            one, other = other, one
        one += other
        group_of |= dict.fromkeys(other, one)
        tree.append(edge)
    groups = {id(group): sorted(group) for group in group_of.values()}
    return tree, sorted(groups.values(), key=lambda group: (-len(group), group[0]))


def _chain(
    tree: Sequence[Edge], held: Mapping[int, np.ndarray], model: str
) -> dict[int, np.ndarray]:
    """Compose matches, from the sections whose maps are held to all joined ones.

    Returns:
        By z, (2, 3): section -> canvas, of the model.
    """
    joined: dict[int, list[Edge]] = {}
    for edge in tree:
        joined.setdefault(edge.z, []).append(edge)
        joined.setdefault(edge.y, []).append(edge)
    maps, waiting = dict(held), list(held)
    while waiting:
        z = waiting.pop()
        for edge in joined.get(z, ()):
            new, points = (
                (edge.y, edge.others) if edge.z == z else (edge.z, edge.points)
            )
            if new not in maps:
                found = affine.compose(edge.map_to(z), maps[z])
                if model == "rigid":
                    found = _without_size(found, points.mean(0))
                maps[new] = found
                waiting.append(new)
    return maps


def _without_size(matrix: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """Make a similarity keep lengths; the image of one point stays the same."""
    linear = matrix[:, :2] / affine.scale(matrix)
    image = matrix[:, :2] @ middle + matrix[:, 2]
    return np.column_stack([linear, image - linear @ middle])


@dataclass
class _System:
    """The equations of all matches, and the maps found so far.

    Attributes:
        edges: the matches; those between sections that are held are not used.
        maps: (2, 3) by z: section -> canvas.
        held: sections that keep their map.
        model: of the maps.
    """

    edges: Sequence[Edge]
    maps: dict[int, np.ndarray]
    held: set[int]
    model: str

    def __post_init__(self) -> None:
        self.edges = [e for e in self.edges if not {e.z, e.y} <= self.held]
        self._free = sorted(set(self.maps) - self.held)
        row = {z: i for i, z in enumerate(self._free)}
        self._rows = np.array(
            [[row.get(e.z, -1), row.get(e.y, -1)] for e in self.edges], int
        ).reshape(-1, 2)
        self._points = np.array(
            [[_even(e.points), _even(e.others)] for e in self.edges]
        ).reshape(-1, 2, _POINTS, 2)
        self._spreads = np.array([edge.spread_px for edge in self.edges])
        self._radius = float(np.median(self._spreads)) if self.edges else 1.0
        self._least_px = _LEAST * self._radius
        # Matches over several sections are less exact: tissue changes in between.
        self._trust = np.array([1 / (edge.z - edge.y) for edge in self.edges])
        self._distances = np.zeros((len(self.edges), _POINTS))
        self._middle: dict[int, np.ndarray] = {}

    def solve(self) -> None:
        """Find the maps; see the head of this file."""
        if self._free:
            for _ in range(_ROUNDS):
                self._step()
        self._measure()

    def center(self) -> np.ndarray:
        """Return the middle of the sections on the canvas, (2,)."""
        middles = [
            affine.apply(self.maps[edge.y], edge.others).mean(0) for edge in self.edges
        ]
        return np.mean(middles, 0) if middles else np.zeros(2)

    def contradicted(self) -> list[Edge]:
        """List the matches that all others contradict."""
        if not self.edges:
            return []
        medians = np.median(self._distances, 1)
        most = max(float(np.median(medians)), self._least_px)
        far = (medians > _APART * most) & (medians > _APART_SPREAD * self._spreads)
        return [self.edges[i] for i in np.flatnonzero(far).tolist()]

    def _measure(self) -> tuple[np.ndarray, np.ndarray]:
        """Put all points on the canvas.

        Returns:
            (E, 2, P, 2) points of both sections of each match, and (E, P, 2) how far
            those of one lie from those of the other.
        """
        maps = np.array([[self.maps[e.z], self.maps[e.y]] for e in self.edges]).reshape(
            -1, 2, 2, 3
        )
        placed = np.einsum("esij,espj->espi", maps[..., :2], self._points)
        placed += maps[..., None, :, 2]
        apart = placed[:, 0] - placed[:, 1]
        self._distances = np.hypot(apart[..., 0], apart[..., 1])
        return placed, apart

    def _weights(self) -> tuple[np.ndarray, float]:
        """Weigh points by how well they agree; returns also their deviation, px."""
        medians = np.median(self._distances, 1)
        most = max(float(np.median(medians)), self._least_px)
        # Loss of Geman and McClure for matches, Cauchy's for the points of one.
        matches = self._trust / (1 + (medians / (3 * most)) ** 2) ** 2
        scale = 2 * np.maximum(medians, self._least_px)[:, None]
        points = 1 / (1 + (self._distances / scale) ** 2)
        return matches[:, None] * points / _POINTS, most

    def _step(self) -> None:
        """Take one step of Gauss-Newton."""
        placed, apart = self._measure()
        weights, deviation = self._weights()
        num = _NUM_FREE[self.model]
        middles, radius = self._middles(placed), self._radius
        jacobians = np.stack(
            [
                _jacobian(placed[:, side], middles[side], radius)[..., :num]
                for side in (0, 1)
            ],
            1,
        )
        jacobians[:, 1] *= -1
        weighted = weights[:, None, :, None, None] * jacobians
        num_edges = len(self.edges)
        flat, flat_weighted = (
            j.transpose(0, 1, 4, 2, 3).reshape(num_edges, 2 * num, -1)
            for j in (jacobians, weighted)
        )
        blocks = (flat_weighted @ flat.transpose(0, 2, 1)).reshape(
            num_edges, 2, num, 2, num
        )
        forces = -(flat_weighted @ apart.reshape(num_edges, -1, 1)).reshape(
            num_edges, 2, num
        )
        size = len(self._free) * num
        at = self._rows[..., None] * num + np.arange(num)  # below 0 if held
        row, col = np.broadcast_arrays(at[..., None, None], at[:, None, None])
        used = (row >= 0) & (col >= 0)
        matrix = sparse.coo_matrix((blocks[used], (row[used], col[used])), (size, size))
        right = np.zeros(size)
        np.add.at(right, at[at >= 0], forces[at >= 0])
        stiffness, pulls = self._shape_term(deviation, num)
        matrix = (matrix + sparse.diags(stiffness)).tocsc()
        step = np.asarray(linalg.spsolve(matrix, right + pulls, permc_spec="NATURAL"))
        self._move(step.reshape(-1, num))

    def _middles(self, placed: np.ndarray) -> np.ndarray:
        """Find the middles of both sections of each match on the canvas, (2, E, 2)."""
        sums: dict[int, list[np.ndarray]] = {}
        for edge, points in zip(self.edges, placed.mean(2), strict=True):
            sums.setdefault(edge.z, []).append(points[0])
            sums.setdefault(edge.y, []).append(points[1])
        self._middle = {z: np.mean(points, 0) for z, points in sums.items()}
        return np.array(
            [
                [self._middle[e.z] for e in self.edges],
                [self._middle[e.y] for e in self.edges],
            ]
        )

    def _shape_term(self, deviation: float, num: int) -> tuple[np.ndarray, np.ndarray]:
        """Pull sizes and stretches towards those of most sections.

        Returns:
            Diagonal and right side of its equations, (num_free * num,).
        """
        most = np.median(_shapes(list(self.maps.values())), 0)
        away = _shapes([self.maps[z] for z in self._free]) - most
        weight = deviation**2 / _INDEPENDENT / (_SHAPE * self._radius) ** 2
        stiffness = np.zeros((len(self._free), 6))
        stiffness[:, 3:] = weight
        # A section without matches that count would leave the equations singular.
        stiffness += 1e-9
        pulls = np.zeros_like(stiffness)
        pulls[:, 3:] = -weight * self._radius * away
        return stiffness[:, :num].ravel(), pulls[:, :num].ravel()

    def _move(self, steps: np.ndarray) -> None:
        """Apply a step to the maps that are not held."""
        radius, full = self._radius, np.zeros((len(steps), 6))
        full[:, : steps.shape[1]] = steps
        for z, step in zip(self._free, full, strict=True):
            turn, right, down, size, stretch, shear = step / [
                radius,
                1,
                1,
                *[radius] * 3,
            ]
            # A turn of any length stays a turn, and a size stays above 0.
            cos, sin = np.cos(turn), np.sin(turn)
            linear = np.exp(size) * np.array([[cos, -sin], [sin, cos]])
            linear = linear + [[stretch, shear], [shear, -stretch]]
            middle = self._middle[z]
            moved = np.column_stack([linear, middle + (right, down) - linear @ middle])
            self.maps[z] = affine.compose(self.maps[z], moved)


def _even(points: np.ndarray) -> np.ndarray:
    """Choose `_POINTS` of some points, spread over them; some twice if they are few."""
    return points[np.linspace(0, len(points) - 1, _POINTS).round().astype(int)]


def _jacobian(points: np.ndarray, middles: np.ndarray, radius: float) -> np.ndarray:
    """Derive points on the canvas by the step of their section.

    Args:
        points: (E, P, 2).
        middles: (E, 2), around which sections turn and grow.
        radius: divides turn, size and stretches, so that all steps are px.

    Returns:
        (E, P, 2, 6): turn, shift along cols, along rows, size, two stretches.
    """
    x, y = np.moveaxis((points - middles[:, None]) / radius, -1, 0)
    one, zero = np.ones_like(x), np.zeros_like(x)
    along_cols = np.stack([-y, one, zero, x, x, y], -1)
    along_rows = np.stack([x, zero, one, y, -y, x], -1)
    return np.stack([along_cols, along_rows], -2)


def _shapes(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Describe size and stretch of maps, (n, 3): log of the scale, and two stretches.

    The linear part is P R with R a turn (and a mirror) and P symmetric, so P is how the
    canvas is stretched afterwards.
    """
    left, values, _ = np.linalg.svd(np.array(maps)[:, :, :2])
    sizes = np.log(values.prod(1)) / 2
    scaled = left * (values / np.exp(sizes)[:, None])[:, None]
    stretch = scaled @ left.transpose(0, 2, 1)
    difference = (stretch[:, 0, 0] - stretch[:, 1, 1]) / 2
    return np.stack([sizes, difference, stretch[:, 0, 1]], 1)


def _about(
    edges: Sequence[Edge],
    contradicted: set[tuple[int, int]],
    groups: Sequence[Sequence[int]],
    main: Sequence[int],
    sections: Mapping[int, np.ndarray | None],
) -> dict[int, Placed]:
    """Describe how each section got its place."""
    used: dict[int, list[Edge]] = {z: [] for z in sections}
    not_used: dict[int, list[int]] = {z: [] for z in sections}
    for edge in edges:
        for z, other in ((edge.z, edge.y), (edge.y, edge.z)):
            if (edge.z, edge.y) in contradicted:
                not_used[z].append(other)
            else:
                used[z].append(edge)
    about = {}
    group_of = {z: group for group in groups for z in group}
    for z, own in used.items():
        by_keypoints = any(edge.how == "keypoints" for edge in own)
        how, reason = "keypoints" if by_keypoints else "correlation", ""
        if sections[z] is None:
            how, reason = "blank", "have no tissue"
        elif not own:
            how, reason = "neighbours", "match no neighbour"
        elif group_of[z] is not main:
            how = "neighbours"
            reason = (
                "match each other, but nothing else of the stack; they were moved "
                "together to where their neighbours lie"
            )
        others = sorted(edge.y if edge.z == z else edge.z for edge in own)
        score = round(max((edge.score for edge in own), default=0.0), 2)
        about[z] = Placed(how, score, tuple(others), reason, tuple(sorted(not_used[z])))
    return about


def _moved_to_neighbours(
    found: Mapping[int, np.ndarray],
    maps: Mapping[int, np.ndarray],
    sections: Mapping[int, np.ndarray | None],
) -> dict[int, np.ndarray]:
    """Move a group of sections so that the nearest lies where its neighbour does."""
    have = np.array(sorted(z for z in maps if sections[z] is not None))
    links = []
    for z in found:
        after = int(np.searchsorted(have, z))
        for y in have[max(after - 1, 0) : after + 1].tolist():
            links.append((abs(z - y), z, y))
    _, near, other = min(links)
    shift = affine.apply(maps[other], np.array([sections[other]]))[0]
    shift = shift - affine.apply(found[near], np.array([sections[near]]))[0]
    return {z: m + np.column_stack([np.zeros((2, 2)), shift]) for z, m in found.items()}


def _interpolate(
    maps: dict[int, np.ndarray], sections: Sequence[int], center: np.ndarray
) -> None:
    """Give sections without a map the mean of their neighbours', by distance.

    Args:
        maps: (2, 3) by z: section -> canvas; completed in place.
        sections: all z.
        center: (2,) on the canvas, about which turns are averaged.
    """
    have = np.array(sorted(maps))
    for z in sections:
        if z in maps:
            continue
        after = int(np.searchsorted(have, z))
        low, high = (
            int(have[i]) for i in (max(after - 1, 0), min(after, len(have) - 1))
        )
        if low == high:
            maps[z] = maps[low]
            continue
        pulls = affine.invert(maps[low]), affine.invert(maps[high])
        maps[z] = affine.invert(_mean(*pulls, (z - low) / (high - low), center))


def _mean(
    one: np.ndarray, other: np.ndarray, share: float, center: np.ndarray
) -> np.ndarray:
    """Average two maps; if they turn too differently, take the nearer one."""
    turn = one[:, :2] @ np.linalg.inv(other[:, :2])
    if np.linalg.det(turn) < 0 or np.trace(turn) <= 0:
        return one if share <= 0.5 else other
    mean = (1 - share) * one + share * other
    image = mean[:, :2] @ center + mean[:, 2]
    # The mean of two turns is a turn that also shrinks.
    size = affine.scale(one) ** (1 - share) * affine.scale(other) ** share
    linear = mean[:, :2] * (size / affine.scale(mean))
    return np.column_stack([linear, image - linear @ center])
