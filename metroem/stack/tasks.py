"""Split a step into tasks, and run them: here, in shards or from a queue."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metroem.errors import UsageError
from metroem.geometry.grid import Grid

_NAME = re.compile(r"z(-?\d+)-(-?\d+)_x(-?\d+)-(-?\d+)_y(-?\d+)-(-?\d+)_mip(\d+)")


@dataclass(frozen=True)
class Block:
    """An area of consecutive sections: what one task writes.

    Attributes:
        sections: range of z.
        grid: the area.
    """

    sections: range
    grid: Grid

    @property
    def name(self) -> str:
        """Name of the task: its z, and its x and y in mip-0 pixels, ends excluded."""
        (x_end, y_end), grid = self.grid.end, self.grid
        return (
            f"z{self.sections.start}-{self.sections.stop}_x{grid.x}-{x_end}"
            f"_y{grid.y}-{y_end}_mip{grid.mip}"
        )

    @classmethod
    def parse(cls, name: str) -> "Block":
        """Read a name.

        Raises:
            UsageError: it is not the name of a block.
        """
        found = _NAME.fullmatch(name)
        if not found:
            raise UsageError(f"task {name!r}: expected a name such as {_EXAMPLE}")
        z, z_end, x, x_end, y, y_end, mip = map(int, found.groups())
        grid = Grid(mip, x, y, (x_end - x) >> mip, (y_end - y) >> mip)
        return cls(range(z, z_end), grid)


_EXAMPLE = "z0-16_x0-2048_y0-2048_mip0"


def split_blocks(
    area: Grid, sections: range, chunk_px: int, block_sections: int
) -> list[Block]:
    """Split sections into blocks; those at the far borders may be smaller.

    Args:
        area: the area of all sections.
        sections: range of z.
        chunk_px: side of a block, px of the area's mip.
        block_sections: sections of a block.
    """
    return [
        Block(
            range(z, min(z + block_sections, sections.stop)),
            area.crop(
                row,
                col,
                min(chunk_px, area.rows - row),
                min(chunk_px, area.cols - col),
            ),
        )
        for z in range(sections.start, sections.stop, block_sections)
        for row in range(0, area.rows, chunk_px)
        for col in range(0, area.cols, chunk_px)
    ]


class Step(ABC):
    """A list of independent tasks that write files below a destination.

    A step can be pickled: worker processes get a copy. It opens volumes when a task
    first needs them.

    Attributes:
        name: "place-match", "pairs", ...; also the folder of its done-markers.
        destination: the folder of the stack.
        settings: what the results depend on, JSON-able; with the settings of the steps
            before. A task that was done with other settings is done again.
    """

    name: str
    destination: str
    settings: Mapping[str, Any]

    @abstractmethod
    def tasks(self) -> Sequence[str]:
        """List the names of all tasks: the same list in every process."""

    @abstractmethod
    def run(self, task: str) -> Mapping[str, Any]:
        """Do one task. Doing it again, also at the same time, writes the same bytes.

        Returns:
            Figures of the task for its done-marker, JSON-able, for example
            {"bytes_read": 1000, "bytes_needed": 900}.

        Raises:
            MetroEMError: it cannot be done; the message says why.
        """
