"""Put the figures of all tasks of a check together: sections, maps, worst places.

Results are added one by one, and only sums are kept. So memory grows with the number of
sections, by some kB each, and not with their size.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from metroem.stack.block_figures import CORRELATION_STEP, PX_STEP
from metroem.stack.check_plan import CheckPlan
from metroem.stack.histogram import Histogram
from metroem.stack.jumps import SEARCH_PX
from metroem.stack.tasks import Block

NUM_WORST = 12
# At most so many of the worst places lie in one section: else one bad section hides all
# others.
_WORST_PER_SECTION = 2
# Places that are kept in memory before the best ones are dropped.
_MAX_PLACES = 50_000
# Rows and columns of a map; larger ones are made smaller, the worst cell of each kept.
_MAP_ROWS, _MAP_COLS = 1500, 1024
# A section stands out if its median jump is so many px above that of the stack, and so
# many robust deviations; if its correlation is below so large a fraction of the
# stack's; or if so large a fraction of its windows does not match.
_JUMP_PX, _DEVIATIONS, _CORRELATION_FRACTION, _LOST_FRACTION = 1.0, 5.0, 0.5, 0.5
# Sections that the verdict names.
_NUM_NAMED = 4
# From the median absolute deviation to the standard deviation of a normal distribution.
_ROBUST = 1.4826
_NAN = float("nan")


class Place(NamedTuple):
    """The worst place of one cell of the map in one section.

    Attributes:
        z: the section.
        against: the section that it was compared with.
        x: middle of the place, mip-0 pixels.
        y: the same along y.
        correlation: mean of the cell; None if it is not known.
        error_px: mean over the windows of the place: how far they are displaced, or
            `SEARCH_PX` if they do not match at all. None if nothing is known.
        jump_px: median displacement of the windows that match; None if none does.
        jump_x_px: the same along x: where this section lies, seen from the other.
        jump_y_px: the same along y.
    """

    z: int
    against: int
    x: int
    y: int
    correlation: float | None
    error_px: float | None
    jump_px: float | None
    jump_x_px: float | None
    jump_y_px: float | None


@dataclass
class _Sums:
    """What is summed up of one section, or of all."""

    pixels: int = 0
    tissue: int = 0
    windows: np.ndarray = field(default_factory=lambda: np.zeros(8, int))
    lost: int = 0
    alone: int = 0
    correlation: Histogram = field(default_factory=lambda: Histogram(CORRELATION_STEP))
    jump: Histogram = field(default_factory=lambda: Histogram(PX_STEP))
    jitter: Histogram = field(default_factory=lambda: Histogram(PX_STEP))
    residual: Histogram = field(default_factory=lambda: Histogram(PX_STEP))
    signs: np.ndarray = field(default_factory=lambda: np.zeros(3, int))
    num_folds: int = 0
    num_moved: int = 0
    still: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Add the figures of a block."""
        self.pixels += record["pixels"]
        self.tissue += record["tissue"]
        self.lost += record["lost"]
        self.alone += record["alone"]
        self.windows[: len(record["windows"])] += record["windows"]
        for name in ("correlation", "jump", "jitter", "residual"):
            getattr(self, name).merge(record.get(name, ()))
        if folds := record.get("folds"):
            self.signs += folds["signs"]
            self.still += folds["still"]

    def merge(self, other: "_Sums") -> None:
        """Add the sums of a section."""
        self.pixels += other.pixels
        self.tissue += other.tissue
        self.lost += other.lost
        self.alone += other.alone
        self.windows += other.windows
        for name in ("correlation", "jump", "jitter", "residual"):
            getattr(self, name).merge(getattr(other, name).pairs())
        # Signs are not summed: each section may be mirrored or not.
        self.num_folds += other.count_folds()
        self.num_moved += int(other.signs.sum())
        self.still += other.still

    def count_folds(self) -> int:
        """Count pixels of a section's field that fold: 0, or of the rarer sign."""
        negative, zero, positive = self.signs.tolist()
        return zero + min(negative, positive)

    @property
    def compared(self) -> int:
        """Number of windows that were compared with another section."""
        return int(self.windows[1:].sum())

    def figures(self) -> dict[str, Any]:
        """Return the figures that `check.json` names; NaN where nothing is known."""
        return {
            "tissue": self.tissue / self.pixels if self.pixels else 0.0,
            "correlation": self.correlation.mean(),
            "correlation_p05": self.correlation.percentile(0.05),
            "jump_median_px": self.jump.percentile(0.5),
            "jump_p95_px": self.jump.percentile(0.95),
            "jitter_median_px": self.jitter.percentile(0.5),
            "jitter_p95_px": self.jitter.percentile(0.95),
            "lost": self.lost / self.compared if self.compared else _NAN,
        }

    def residuals(self) -> dict[str, float]:
        """Return the figures of the pyramid's own field."""
        return {
            "residual_median_px": self.residual.percentile(0.5),
            "residual_p95_px": self.residual.percentile(0.95),
        }


class Summary:
    """The figures of a stack while results are added; see `figures`.

    Args:
        plan: what is measured.
    """

    def __init__(self, plan: CheckPlan) -> None:
        self.plan = plan
        self._open: dict[int, tuple[_Sums, _Sums]] = {}
        self._all, self._all_before = _Sums(), _Sums()
        self._sections: list[dict[str, Any]] = []
        self._worst: list[Place] = []
        self._folded: list[dict[str, Any]] = []
        rows, cols = plan.num_cells
        shape = min(len(plan.sections), _MAP_ROWS), min(rows * cols, _MAP_COLS)
        self._maps = {
            name: np.full(shape, np.nan, np.float32)
            for name in ("error", "correlation")
        }

    def add(self, block: Block, record: Mapping[str, Any]) -> None:
        """Add the figures of one section in one block."""
        z = record["z"]
        after, before = self._open.setdefault(z, (_Sums(), _Sums()))
        after.add(record)
        if "before" in record:
            before.add(record["before"])
        cells = [place and Place(z, *place) for place in record["cells"]]
        self._draw_cells(block, z, cells)
        self._worst += [
            place for place in cells if place and place.error_px is not None
        ]
        if len(self._worst) > _MAX_PLACES:
            self._worst = _keep_worst(self._worst)
        if (folds := record.get("folds")) and folds["at"] is not None:
            negative, zero, positive = folds["signs"]
            num = zero + min(negative, positive)
            self._folded.append({"z": z, **folds["at"], "pixels": num})
            self._folded.sort(key=lambda at: (-at["pixels"], at["z"], at["x"], at["y"]))
            del self._folded[NUM_WORST:]

    def close(self, sections: range) -> None:
        """Finish sections to which nothing will be added any more."""
        for z in sections:
            after, before = self._open.pop(z, (_Sums(), _Sums()))
            figures = {"z": z, "against": z - _most(after.windows), **after.figures()}
            if not after.compared:
                figures["against"] = None
            if self.plan.pyramid_path is not None:
                figures |= after.residuals()
            if self.plan.field_path is not None:
                total = int(after.signs.sum()) + after.still
                figures["folds"] = after.count_folds() / total if total else _NAN
            if self.plan.before is not None:
                figures["before"] = before.figures()
            figures["is_blank"] = not after.tissue
            # The first section of a volume has none before it: that is no fault.
            is_first = z == self.plan.sections.start
            figures["is_alone"] = bool(after.alone and not (after.compared or is_first))
            self._sections.append(figures)
            self._all.merge(after)
            self._all_before.merge(before)

    @property
    def has_data(self) -> bool:
        """Whether any section has data."""
        return self._all.tissue > 0

    @property
    def field_is_zero(self) -> bool:
        """Whether there are fields, and all vectors of all fields are 0."""
        return self.plan.field_path is not None and not self._all.num_moved

    @property
    def maps(self) -> dict[str, np.ndarray]:
        """By figure, (rows, cols): sections down, cells across; NaN: unknown."""
        return self._maps

    def figures(self) -> dict[str, Any]:
        """Return what check.json holds of the stack, its sections and places."""
        sections = self._sections
        stack = self._all.figures() | _of_sections(sections, None)
        if self.plan.pyramid_path is not None:
            stack |= self._all.residuals()
        if self.plan.field_path is not None:
            total = self._all.num_moved + self._all.still
            is_known = not self.field_is_zero
            stack["folds"] = self._all.num_folds / total if is_known else _NAN
        if self.plan.before is not None:
            stack["before"] = self._all_before.figures()
            stack["before"] |= _of_sections(sections, "before")
        found = {
            "stack": stack,
            "blank": [one["z"] for one in sections if one["is_blank"]],
            "alone": [one["z"] for one in sections if one["is_alone"]],
            "unplaced": list(self.plan.unplaced),
            "stand_out": _stand_out(sections),
            "worst": [one._asdict() for one in _keep_worst(self._worst)[:NUM_WORST]],
            "folded": self._folded,
        }
        for one in sections:
            del one["is_blank"], one["is_alone"]
        return found | {"sections": sections}

    def _draw_cells(
        self, block: Block, z: int, cells: Sequence["Place | None"]
    ) -> None:
        """Enter the cells of a block into the maps."""
        plan, (rows, cols) = self.plan, self.plan.num_cells
        row = ((block.grid.x - plan.area.x) >> plan.mip) // plan.cell_px
        col = ((block.grid.y - plan.area.y) >> plan.mip) // plan.cell_px
        across = -(-block.grid.cols // plan.cell_px)
        num_rows, num_cols = self._maps["error"].shape
        at_row = (z - plan.sections.start) * num_rows // len(plan.sections)
        for number, place in enumerate(cells):
            if place is None:
                continue
            cell = (row + number // across) * cols + col + number % across
            at = at_row, cell * num_cols // (rows * cols)
            for name, value, worse in (
                ("correlation", place.correlation, np.fmin),
                ("error", place.error_px, np.fmax),
            ):
                if value is not None:
                    self._maps[name][at] = worse(self._maps[name][at], value)


def _keep_worst(places: Sequence[Place]) -> list[Place]:
    """Sort places, worst first, and keep a few of each section."""
    kept: Counter[int] = Counter()
    worst = []
    for place in sorted(places, key=_badness):
        kept[place.z] += 1
        if kept[place.z] <= _WORST_PER_SECTION:
            worst.append(place)
    return worst


def _badness(place: Place) -> tuple[float, ...]:
    assert place.error_px is not None
    correlation = 1.0 if place.correlation is None else place.correlation
    return -place.error_px, correlation, place.z, place.x, place.y


def _most(windows: np.ndarray) -> int:
    """Return how many sections back most windows were compared."""
    return int(windows[1:].argmax()) + 1


def _of_sections(
    sections: Sequence[Mapping[str, Any]], part: str | None
) -> dict[str, Any]:
    """Return the median correlation of sections, and the worst of them."""
    found = [
        (one[part]["correlation"] if part else one["correlation"], one["z"])
        for one in sections
    ]
    known = [one for one in found if not math.isnan(one[0])]
    if not known:
        return {"correlation_median": _NAN, "correlation_worst": _NAN, "worst_z": None}
    lowest, z = min(known)
    median = statistics.median(value for value, _ in known)
    return {"correlation_median": median, "correlation_worst": lowest, "worst_z": z}


def _stand_out(sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Find the sections that are much worse than the stack, and say why."""
    jumps = _known(sections, "jump_median_px")
    usual_jump = statistics.median(jumps) if jumps else 0.0
    spread = _ROBUST * statistics.median([abs(v - usual_jump) for v in jumps] or [0.0])
    limit = usual_jump + max(_JUMP_PX, _DEVIATIONS * spread)
    correlations = _known(sections, "correlation")
    usual = statistics.median(correlations) if correlations else 0.0
    found: list[dict[str, Any]] = []
    for one in sections:
        reason = None
        if one["is_blank"]:
            reason = "is blank"
        elif one["is_alone"]:
            reason = "has no section with data before it"
        elif one["lost"] > _LOST_FRACTION:
            reason = (
                f"does not match z {one['against']} within {SEARCH_PX} px in "
                f"{one['lost']:.0%} of its windows"
            )
        elif one["jump_median_px"] > limit:
            reason = f"jumps by {one['jump_median_px']:.1f} px from z {one['against']}"
        elif one["correlation"] < _CORRELATION_FRACTION * usual:
            reason = (
                f"correlates {one['correlation']:.2f} with z {one['against']}, the "
                f"stack {usual:.2f}"
            )
        if reason is not None:
            # Its neighbour may be the bad one.
            if one["against"] in (other["z"] for other in found):
                reason += f", but z {one['against']} stands out itself"
            found.append({"z": one["z"], "reason": reason})
    return found


def _known(sections: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [one[name] for one in sections if not math.isnan(one[name])]


def verdict(figures: Mapping[str, Any]) -> str:
    """Say in a sentence which sections stand out.

    Args:
        figures: see `Summary.figures`.
    """
    found, total = figures["stand_out"], len(figures["sections"])
    if not found:
        return f"No section stands out, of {total}."
    named = [f"z {one['z']} {one['reason']}" for one in found[:_NUM_NAMED]]
    if len(found) > _NUM_NAMED:
        named.append(f"and {len(found) - _NUM_NAMED} more")
    verb = "stands" if len(found) == 1 else "stand"
    return f"{len(found)} of {total} sections {verb} out: {'; '.join(named)}."


def describe_place(place: Mapping[str, Any]) -> str:
    """Describe one of the worst places in a line.

    Args:
        place: the fields of a `Place`.
    """
    if place["jump_px"] is None:
        what = f"no match within {SEARCH_PX} px"
    else:
        what = f"off by {place['error_px']:.1f} px"
    correlation = place["correlation"]
    if correlation is not None:
        what += f", correlation {round(correlation, 2) + 0.0:.2f}"  # not -0.00
    where = f"x {place['x']}, y {place['y']}, z {place['z']} on {place['against']}"
    return f"{where}: {what}"
