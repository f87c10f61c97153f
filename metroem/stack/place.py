"""Place sections: find where each lies, from thumbnails, and solve all at once.

<dst>/matches/z0-16.json   how sections match the three before them    (place-match)
<dst>/placement.json       where each section lies                     (place-solve)
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import cv2
import numpy as np

from metroem.errors import DatasetError
from metroem.geometry import affine
from metroem.geometry.grid import Grid
from metroem.io.image_volume import ImageVolume
from metroem.io.volume import iter_sections
from metroem.io.volume_write import Notes
from metroem.stack.match_sections import Section, match, tissue_box
from metroem.stack.solve_placements import Edge, Placed, in_words, solve_placements
from metroem.stack.tasks import Step, parse_sections

logger = logging.getLogger(__name__)

# Sections before it that a section is matched with.
NEIGHBOURS = 3
# Sections of a task, at least. It also reads those that the first ones are matched
# with, and whole layers of chunks: for each of them it has so many of its own.
_BLOCK, _OWN_PER_EXTRA = 16, 4
_NAMED = 10  # matches that a line lists
_FORMAT = 1


@dataclass(frozen=True)
class Placement:
    """Where all sections lie.

    Attributes:
        matrices: by z, (2, 3) pull: (col, row, 1) of the canvas -> the raw section,
            mip-0 pixels of the volume.
        placed: by z, how it was found.
        area: the canvas, at mip 0: it holds the tissue of all sections.
        settings: what the matrices depend on, but for the range of sections.
        kept_end: one past the last section whose place was kept when the stack grew;
            None if it did not grow.
    """

    matrices: Mapping[int, np.ndarray]
    placed: Mapping[int, Placed]
    area: Grid
    settings: Mapping[str, Any] = field(default_factory=dict)
    kept_end: int | None = None

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
                        tuple(about["not_used"]),
                    )
                    for z, about in sections.items()
                },
                Grid(0, *(note["canvas"][key] for key in ("x", "y", "rows", "cols"))),
                note["settings"],
                note["kept_end"],
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
        note = {
            "format": _FORMAT,
            "canvas": canvas,
            "settings": dict(self.settings),
            "kept_end": self.kept_end,
            "sections": sections,
        }
        Notes(destination).write("placement.json", note)

    def describe(self) -> list[str]:
        """Say how many sections were placed by what, and name those that were not."""
        return describe_placed(self.placed)

    def digest(self, sections: range) -> str:
        """Compute a digest of the matrices of some sections."""
        text = json.dumps([self.matrices[z].tolist() for z in sections])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


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
        lines.append(f"sections {in_words(list(group))}: {reason}")
    not_used = [
        f"{z} on {y}" for z, one in placed.items() for y in one.not_used if y < z
    ]
    if not_used:
        more = f" and {len(not_used) - _NAMED} more" if len(not_used) > _NAMED else ""
        lines.append(
            f"matches that are not used, since others contradict them: "
            f"{', '.join(not_used[:_NAMED])}{more}"
        )
    return lines


def check_placed(placement: Placement) -> None:
    """Raise an error that names the sections that match nothing.

    Raises:
        DatasetError: a section with tissue has the place of its neighbours.
    """
    lost = [z for z, one in placement.placed.items() if one.how == "neighbours"]
    if lost:
        raise DatasetError(
            "these sections match no neighbour, and lie where their neighbours do: "
            f"{in_words(lost)}; look at them, and give --allow_unplaced if that is "
            "right"
        )


# ------------------------------------------------------------------------ matching


class Matched(NamedTuple):
    """A thumbnail, and its matches with those before it.

    Attributes:
        z: the section.
        middle: (2,) col and row of the middle of its tissue; None if blank.
        edges: its matches; points are px of the thumbnail.
        outline: (n, 2), col and row of the corners of the convex hull of its tissue;
            None without any.
    """

    z: int
    middle: np.ndarray | None
    edges: list[Edge]
    outline: np.ndarray | None


def match_thumbnails(
    thumbnails: Iterable[tuple[int, np.ndarray]],
    model: str,
    flip: bool,
    first: int,
    thumbnail_px: int,
) -> Iterator[Matched]:
    """Match each thumbnail with those before it.

    Args:
        thumbnails: z and (h, w) grey levels, 0 = no data, in rising order of z.
        model: map that is fitted to a pair.
        flip: whether sections may be mirrored.
        first: sections before it are only matched with.
        thumbnail_px: longest side of what is compared.
    """
    earlier: dict[int, Section] = {}
    found: dict[tuple[int, int], np.ndarray] = {}
    for z, image in thumbnails:
        section = Section(image)
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
            one = match(
                *(section, earlier[y], model, flip),
                guess=next(through, None),
                thumbnail_px=thumbnail_px,
            )
            if one is not None:
                found[z, y] = one.matrix
                is_mirrored = affine.determinant(one.matrix) < 0
                points = one.src_points, one.tgt_points
                edges.append(Edge(z, y, *points, one.how, one.score, is_mirrored))
        earlier[z] = section
        earlier.pop(z - NEIGHBOURS, None)
        box, middle = tissue_box(image), None
        if box is not None and not section.is_blank:
            middle = np.array([(box[2] + box[3] - 1) / 2, (box[0] + box[1] - 1) / 2])
        if z >= first:
            yield Matched(z, middle, edges, tissue_outline(image))


def tissue_outline(image: np.ndarray) -> np.ndarray | None:
    """Find the corners of the convex hull of all tissue: (n, 2), col and row."""
    rows = np.flatnonzero((image != 0).any(1))
    if not len(rows):
        return None
    tissue = image[rows] != 0
    first, last = tissue.argmax(1), tissue.shape[1] - 1 - tissue[:, ::-1].argmax(1)
    ends = np.concatenate([np.stack([cols, rows], 1) for cols in (first, last)])
    return cv2.convexHull(ends.astype(np.int32))[:, 0]


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
    matched = list(match_thumbnails(enumerate(sections), model, flip, 0, 1024))
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
        content: digest of samples of the volume, which may be written again.
        name: name of the step.
    """

    destination: str
    cv_path: str
    sections: range
    model: str
    flip: bool
    thumbnail_px: int
    content: str = ""
    name: str = "place-match"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            "cv_path": self.cv_path,
            "model": self.model,
            "flip": self.flip,
            "thumbnail_px": self.thumbnail_px,
            "content": self.content,
        }

    def tasks(self) -> list[str]:
        """List blocks of sections; they end where layers of stored chunks end."""
        window = self._window
        hull, layer = self._volume.chunks_around(window, self.sections.start)
        thick = max(len(layer), 1)
        extra = -(-NEIGHBOURS // thick) * thick
        size = -(-max(_BLOCK, _OWN_PER_EXTRA * extra) // thick) * thick
        names, start = [], self.sections.start
        while start < self.sections.stop:
            end = min(start - (start - layer.start) % thick + size, self.sections.stop)
            names.append(f"z{start}-{end}")
            start = end
        return names

    def run(self, task: str) -> Mapping[str, Any]:
        sections = parse_sections(task)
        start, stop = sections.start, sections.stop
        read = range(max(start - NEIGHBOURS, self.sections.start), stop)
        window = self._volume.extent()[0].cover(self._mip)
        images = (
            (z, np.where(np.isfinite(image[0]), image[0], 0))
            for z, image in iter_sections(self._volume, dict.fromkeys(read, window))
        )
        note: dict[str, Any] = {}
        for one in match_thumbnails(
            images, self.model, self.flip, start, self.thumbnail_px
        ):
            note[str(one.z)] = {
                "outline": self._to_mip0_outline(one.outline, window),
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
                "middle": None
                if one.middle is None
                else self._to_mip0(one.middle[None], window)[0],
            }
        Notes(f"{self.destination}/matches").write(f"{task}.json", note)
        pixel_bytes = self._volume.dtype.itemsize
        needed = self._window.rows * self._window.cols * (stop - start) * pixel_bytes
        return {"bytes_read": self._bytes_read(read), "bytes_needed": needed}

    def _bytes_read(self, sections: range) -> int:
        """Count the bytes of the stored chunks that hold sections."""
        num_bytes = 0
        for slab in self._volume.slabs(self._mip, list(sections)):
            hull, layer = self._volume.chunks_around(self._window, slab.start)
            num_bytes += hull.rows * hull.cols * len(layer)
        return num_bytes * self._volume.dtype.itemsize

    @property
    def _window(self) -> Grid:
        """The area of the volume, at the stored mip that is read."""
        return self._volume.extent()[0].cover(self._volume.source_mip(self._mip))

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

    def _to_mip0_outline(
        self, outline: np.ndarray | None, window: Grid
    ) -> list[list[int]]:
        """Convert an outline to the pixels at mip 0 that its pixels consist of."""
        if outline is None:
            return []
        last = (1 << window.mip) - 1
        corners = (outline << window.mip) + [window.y, window.x]
        ends = [corners + [col, row] for col in (0, last) for row in (0, last)]
        return cv2.convexHull(np.concatenate(ends).astype(np.int32))[:, 0].tolist()

    @cached_property
    def _volume(self) -> ImageVolume:
        volume = ImageVolume(self.cv_path)
        volume.check_channels(1, "a volume of sections")
        return volume


@dataclass(frozen=True)
class PlaceSolveStep(Step):
    """Place all sections at once, from their matches: one task.

    When a stack grows, sections that were placed before keep their places.

    Attributes:
        match: the step before.
        fix: section that stays where it is; None: the middle one.
        block_px: what the canvas begins and ends at, mip-0 px.
        growth_px: its beginning moves by multiples of this when a stack grows, mip-0
            px.
        ends: one past the last section of the first run, and of each run that made the
            stack grow: sections of earlier runs keep their places. None: those of an
            earlier, shorter range of the same settings do.
        name: name of the step.
    """

    match: PlaceMatchStep
    fix: int | None
    block_px: int
    growth_px: int
    ends: tuple[int, ...] | None = None
    name: str = "place-solve"

    @property
    def destination(self) -> str:  # type: ignore[override]
        """The folder of the stack."""
        return self.match.destination

    @property
    def method(self) -> Mapping[str, Any]:
        """Settings that stay when the stack grows."""
        return {**self.match.settings, "fix": self.fix, "block_px": self.block_px}

    @property
    def settings(self) -> Mapping[str, Any]:
        sections = self.match.sections
        return {**self.method, "sections": [sections.start, sections.stop]}

    def tasks(self) -> list[str]:
        # All runs write one file, so they have one marker.
        return ["all"]

    def run(self, task: str) -> Mapping[str, Any]:
        names = [f"{name}.json" for name in self.match.tasks()]
        notes = Notes(f"{self.destination}/matches").read(names)
        if missing := sorted(set(names) - set(notes)):
            raise DatasetError(
                f"{self.destination}/matches/{missing[0]}: does not exist; run the "
                "step place again: --steps place --again"
            )
        edges, middles, outlines = [], {}, {}
        for note in notes.values():
            for key, about in note.items():
                z, middle = int(key), about["middle"]
                middles[z] = None if middle is None else np.array(middle)
                outlines[z] = about["outline"]
                edges += [
                    Edge(
                        *(z, one["on"], np.array(one["points"], float)),
                        *(np.array(one["others"], float), one["how"], one["score"]),
                        one["is_mirrored"],
                    )
                    for one in about["matches"]
                ]
        middles = dict(sorted(middles.items()))
        before, kept_end = self._earlier(sorted(middles))
        known = {} if before is None else before.matrices
        matrices, placed = solve_placements(
            edges, middles, self.match.model, fix=self.fix, known=known
        )
        if before is not None:
            placed |= before.placed
        area = self._area(matrices, outlines, before)
        placement = Placement(matrices, placed, area, self.method, kept_end)
        placement.write(self.destination)
        for line in placement.describe():
            logger.info("%s", line)
        return {}

    def _earlier(self, sections: list[int]) -> tuple[Placement | None, int | None]:
        """Read the places that sections of an earlier, shorter range keep.

        The same is read when the task is run again, also after it has written the
        places of all sections.

        Returns:
            The placement of the sections that keep theirs, and one past the last of
            them; None for both if all are placed now.
        """
        if "placement.json" not in Notes(self.destination).read(["placement.json"]):
            return None, None
        before = Placement.read(self.destination)
        if before.settings != self.method or min(before.matrices) != sections[0]:
            return None, None
        end = max(before.matrices) + 1
        kept_end = end if end <= sections[-1] else before.kept_end
        if self.ends is not None:
            kept_end = self.ends[-2] if len(self.ends) > 1 else None
        if kept_end is None or kept_end > min(end, sections[-1]):
            return None, None
        kept = range(sections[0], kept_end)
        matrices = {z: before.matrices[z] for z in kept}
        placed = {z: before.placed[z] for z in kept}
        return Placement(matrices, placed, before.area), kept_end

    def _area(
        self,
        matrices: Mapping[int, np.ndarray],
        outlines: Mapping[int, Sequence[Sequence[int]]],
        before: Placement | None,
    ) -> Grid:
        """Find the canvas: the box of the tissue of all placed sections."""
        corners = []
        for z, outline in outlines.items():
            if outline:
                to_canvas = affine.invert(matrices[z])
                corners.append(affine.apply(to_canvas, np.array(outline, float)))
        found = np.concatenate(corners)
        low = np.floor(found.min(0)).astype(int)[::-1]
        high = np.ceil(found.max(0)).astype(int)[::-1] + 1
        unit = self.block_px
        start, stop = low // unit * unit, -(-high // unit) * unit
        if before is not None:
            # Chunks keep their names if the canvas begins whole chunks earlier.
            area = before.area
            first, last = np.array([area.x, area.y]), np.array(area.end)
            steps = np.maximum(-(-(first - start) // self.growth_px), 0)
            start, stop = first - steps * self.growth_px, np.maximum(stop, last)
        return Grid(0, *start.tolist(), *(stop - start).tolist())
