"""Resolve overlaps: refuse or choose where several pairs cover the same pixels."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from metroem.errors import DatasetError
from metroem.export.field_sets import ExportedSet
from metroem.export.requests import ExportRequest
from metroem.geometry.grid import Grid
from metroem.io.volume import crop_array

# Two fields that differ by no more count as copies of one field: field sets are rounded
# to 0.01 px.
_EQUAL_PX = 0.02


class PairSection(NamedTuple):
    """One section of one pair: its src or its tgt."""

    exported: ExportedSet
    index: int
    side: int

    @property
    def grid(self) -> Grid:
        """The area of its field."""
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
        """The section that its field aligns it to; None if src and tgt have fields."""
        is_of_pair = self.exported.fields.num_sides == 1
        return self.exported.fields.sections(self.index)[1] if is_of_pair else None

    def displacements(self) -> np.ndarray:
        """(2, H, W) on its grid, see `ExportedSet.displacements`."""
        return self.exported.displacements(self.index, self.side)

    def __str__(self) -> str:
        onto = "" if self.tgt is None else f" onto {self.tgt}"
        return f"{self.exported.fields.path.name} pair {self.index}{onto}"


class Overlaps:
    """All sections of pairs to export, by z; each pixel gets the value of one.

    Attributes:
        sections: of the pairs of all sets, in their order.
    """

    def __init__(self, request: ExportRequest, sets: Sequence[ExportedSet]) -> None:
        self._request = request
        self.sections = [PairSection(one, *at) for one in sets for at in one.sides()]
        # The last section of each list wins. Sections without a field come first, so
        # that their values are kept only where no section with a field lies.
        ordered = self.sections if request.overlap == "last" else self.sections[::-1]
        self._by_z: dict[int, list[PairSection]] = {}
        for section in sorted(ordered, key=lambda section: section.has_field):
            self._by_z.setdefault(section.z, []).append(section)

    def check(self) -> None:
        """Refuse fields that would overwrite one another.

        Raises:
            DatasetError: a section has two different fields at the same pixels; the
                message names the flag that chooses one.
        """
        for z in sorted(self._by_z):
            fields = [section for section in self._by_z[z] if section.has_field]
            for at, one in enumerate(fields):
                for other in fields[:at]:
                    shared = _shared(one.grid, other.grid)
                    if shared is not None and self._compete(one, other):
                        self._check_pair(one, other, shared)

    def paint(
        self,
        section: PairSection,
        values: Callable[[PairSection], np.ndarray],
        grid: Callable[[PairSection], Grid],
    ) -> np.ndarray:
        """Take the values of a section, and paint those that win over it on top.

        Args:
            section: one of `sections`.
            values: reads the (C, H, W) values of one.
            grid: gives their area.

        Returns:
            (C, H, W) on the grid of `section`. Pixels shared by several sections
            of pairs get the same value from each of them.
        """
        painted, area = values(section), grid(section)
        same_z = self._by_z[section.z]
        for other in same_z[same_z.index(section) + 1 :]:
            other_area = grid(other)
            shared = _shared(area, other_area)
            if shared is not None:
                painted = painted.copy()
                crop_array(painted, area, shared)[:] = crop_array(
                    values(other), other_area, shared
                )
        return painted

    def _compete(self, one: PairSection, other: PairSection) -> bool:
        """Whether the result has room for only one of two overlapping fields.

        A volume has one value per pixel. Files have a stack for each set, grid and
        tgt.
        """
        if self._request.format == "cloudvolume":
            return True
        same_set = one.exported is other.exported
        return same_set and one.grid == other.grid and one.tgt == other.tgt

    def _check_pair(self, one: PairSection, other: PairSection, shared: Grid) -> None:
        """Refuse two competing fields: of different tgt offsets, or that differ.

        `--overlap` allows fields that differ, but not different tgt offsets.
        """
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
                "only one can be written: give --overlap first or --overlap last"
            )

    def _two_fields(self, one: PairSection, other: PairSection, shared: Grid) -> str:
        """Name two fields and the pixels that they share, for messages."""
        first, second = sorted((one, other), key=self.sections.index)
        return (
            f"{self._request.dataset_path}: section {one.z} has two fields at x "
            f"{shared.x}...{shared.end[0]}, y {shared.y}...{shared.end[1]} (mip-0 "
            f"pixels), {first} and {second}"
        )


def _shared(one: Grid, other: Grid) -> Grid | None:
    """The overlap of two grids of one mip, or None."""
    x, y = max(one.x, other.x), max(one.y, other.y)
    x_end, y_end = (min(ends) for ends in zip(one.end, other.end, strict=True))
    if x >= x_end or y >= y_end:
        return None
    return Grid(one.mip, x, y, (x_end - x) >> one.mip, (y_end - y) >> one.mip)
