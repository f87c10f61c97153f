"""Pairs that cover the same pixels of a section: refused, or one of them chosen."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from metroem.errors import DatasetError
from metroem.export.field_sets import ExportedSet
from metroem.export.requests import ExportRequest
from metroem.geometry.grid import Grid
from metroem.io.volume import crop_array

# Field sets are rounded to 0.01 px: two of one field differ by no more.
_EQUAL_PX = 0.02


class Part(NamedTuple):
    """One section of one pair."""

    exported: ExportedSet
    index: int
    side: int

    @property
    def grid(self) -> Grid:
        """Where its field lies."""
        return self.exported.fields.grid(self.index)

    @property
    def z(self) -> int:
        """Its section."""
        return self.exported.fields.sections(self.index)[self.side]

    @property
    def has_field(self) -> bool:
        """Whether there is a field for it."""
        return self.exported.has_field(self.side)

    @property
    def tgt(self) -> int | None:
        """The section that its field aligns it to; None: of a downloaded field."""
        is_of_pair = self.exported.fields.num_sides == 1
        return self.exported.fields.sections(self.index)[1] if is_of_pair else None

    def displacements(self) -> np.ndarray:
        """(2, H, W) on its grid, see `ExportedSet.displacements`."""
        return self.exported.displacements(self.index, self.side)

    def __str__(self) -> str:
        onto = "" if self.tgt is None else f" onto {self.tgt}"
        return f"{self.exported.fields.path.name} pair {self.index}{onto}"


class Overlaps:
    """All that is exported, by section; a pixel gets the value of one pair alone.

    Attributes:
        parts: of all sets, in their order.
    """

    def __init__(self, request: ExportRequest, sets: Sequence[ExportedSet]) -> None:
        self._request = request
        self.parts = [Part(one, *at) for one in sets for at in one.sides()]
        # The last of a section counts: without a field, only where nothing else is.
        ordered = self.parts if request.overlap == "last" else self.parts[::-1]
        self._by_z: dict[int, list[Part]] = {}
        for part in sorted(ordered, key=lambda part: part.has_field):
            self._by_z.setdefault(part.z, []).append(part)

    def check(self) -> None:
        """Refuse fields that would be lost, since there is room for one alone.

        Raises:
            DatasetError: a section has several in one place; the flag that chooses is
                named.
        """
        for z in sorted(self._by_z):
            fields = [part for part in self._by_z[z] if part.has_field]
            for at, one in enumerate(fields):
                for other in fields[:at]:
                    shared = _shared(one.grid, other.grid)
                    if shared is not None and self._is_one_place(one, other):
                        self._check_pair(one, other, shared)

    def paint(
        self,
        part: Part,
        values: Callable[[Part], np.ndarray],
        grid: Callable[[Part], Grid],
    ) -> np.ndarray:
        """The values of a part, with those of the pairs that count before it.

        Args:
            part: one of `parts`.
            values: (C, H, W) of a part.
            grid: where they lie.

        Returns:
            (C, H, W) on the grid of `part`; the same at every pixel that it shares
            with others, whichever of them is asked for.
        """
        painted, here = values(part), grid(part)
        section = self._by_z[part.z]
        for other in section[section.index(part) + 1 :]:
            there = grid(other)
            shared = _shared(here, there)
            if shared is not None:
                painted = painted.copy()
                crop_array(painted, here, shared)[:] = crop_array(
                    values(other), there, shared
                )
        return painted

    def _is_one_place(self, one: Part, other: Part) -> bool:
        """Whether what is written has room for only one of two fields.

        Files have it for each set, place and distance of tgt.
        """
        if self._request.format == "cloudvolume":
            return True
        same_set = one.exported is other.exported
        return same_set and one.grid == other.grid and one.tgt == other.tgt

    def _check_pair(self, one: Part, other: Part, shared: Grid) -> None:
        offsets = [p.tgt - p.z for p in (one, other) if p.tgt is not None]
        if len(set(offsets)) > 1:
            onto = " or ".join(f"--tgt_offset {o}" for o in sorted(offsets)[::-1])
            raise DatasetError(
                f"{self._two_fields(one, other, shared)}; a volume holds one: give "
                f"{onto}, and each a --dst_path of its own"
            )
        if self._request.overlap is not None:
            return
        apart = np.abs(
            crop_array(one.displacements(), one.grid, shared)
            - crop_array(other.displacements(), other.grid, shared)
        ).max()
        if apart > _EQUAL_PX:
            raise DatasetError(
                f"{self._two_fields(one, other, shared)}, up to {apart:.2f} px apart; "
                "one of them counts there: give --overlap first or --overlap last"
            )

    def _two_fields(self, one: Part, other: Part, shared: Grid) -> str:
        first, second = sorted((one, other), key=self.parts.index)
        return (
            f"{self._request.dataset_path}: section {one.z} has two fields at x "
            f"{shared.x}...{shared.end[0]}, y {shared.y}...{shared.end[1]} (mip-0 "
            f"pixels), {first} and {second}"
        )


def _shared(one: Grid, other: Grid) -> Grid | None:
    """Where two grids of one mip overlap."""
    x, y = max(one.x, other.x), max(one.y, other.y)
    x_end, y_end = (min(ends) for ends in zip(one.end, other.end, strict=True))
    if x >= x_end or y >= y_end:
        return None
    return Grid(one.mip, x, y, (x_end - x) >> one.mip, (y_end - y) >> one.mip)
