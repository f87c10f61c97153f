"""Draw the pictures of the page of a check, reading only what they show.

Pictures are upright: x runs to the right and y, or z, down. Sections in cuts are one
pixel thick; the page enlarges them.
"""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from metroem.geometry.grid import Grid
from metroem.io.image_volume import ImageVolume
from metroem.io.pictures import stretched
from metroem.io.volume import iter_sections
from metroem.stack.check_plan import PLACE_PX, CheckPlan

# A crop shows a place and its surroundings; a cut through it, so many sections before
# and after.
_CROP_PX, _CUT_SECTIONS = PLACE_PX + 64, 12
# Longest side of a cut through the whole volume, px, and its most sections.
_CUT_PX, _MAX_SECTIONS = 1600, 800
# Colours of maps, from the lowest to the highest value: dark to bright, so that they
# can be told apart without colours. Source: viridis of matplotlib, at 0, 1/4, ... 1.
_COLORS = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)],
    np.float32,
)


def draw_place(
    plan: CheckPlan, image: ImageVolume, place: Mapping[str, Any]
) -> dict[str, Any]:
    """Draw one of the worst places.

    Args:
        plan: what is measured.
        image: the aligned volume.
        place: the fields of a `Place`.

    Returns:
        "section", "reference": data URIs of grey levels, the same area; "cut": the same
        along z, with the axis "cut_axis" to the right, along which the two are more
        displaced; "cut_z": its first section and one past its last; "width", "height":
        px of the crop.
    """
    crop = _around(plan, place["x"], place["y"], _CROP_PX, _CROP_PX)
    zs = sorted({place["against"], place["z"]})
    pair = dict(iter_sections(image, dict.fromkeys(zs, crop)))
    along_x, along_y = (abs(place[f"jump_{axis}_px"] or 0) for axis in "xy")
    size = (1, _CROP_PX) if along_y > along_x else (_CROP_PX, 1)
    line = _around(plan, place["x"], place["y"], *size)
    first = max(place["z"] - _CUT_SECTIONS, plan.sections.start)
    sections = range(first, min(place["z"] + _CUT_SECTIONS + 1, plan.sections.stop))
    cut = _read_cut(image, line, sections)
    return {
        "section": _uri(stretched(_finite(pair[place["z"]][0])).T),
        "reference": _uri(stretched(_finite(pair[place["against"]][0])).T),
        "cut": _uri(stretched(even_sections(cut))),
        "cut_axis": "y" if along_y > along_x else "x",
        "cut_z": [sections.start, sections.stop],
        "width": crop.rows,
        "height": crop.cols,
    }


def draw_cuts(plan: CheckPlan, image: ImageVolume) -> list[dict[str, Any]]:
    """Draw cuts through the middle of the volume: z down, and y or x to the right.

    Large volumes are read at a coarser mip that they store. If that is still too large,
    the middle is shown, and of many sections every second, third ...

    Returns:
        For each: "axis" "y" or "x"; "at": where it cuts the other axis; "start", "end":
        what it shows, mip-0 pixels; "step": every how many sections; "picture": a data
        URI, one row a section.
    """
    step = -(-len(plan.sections) // _MAX_SECTIONS)
    cuts = []
    for axis in ("y", "x"):
        line = _middle_line(plan, image, axis)
        cut = _read_cut(image, line, plan.sections[::step])
        if not cut.any() and line.mip != plan.mip:  # a mip that was never written
            line = _line(plan.area, axis)
            cut = _read_cut(image, line, plan.sections[::step])
        start, end = (line.y, line.end[1]) if axis == "y" else (line.x, line.end[0])
        cuts.append(
            {
                "axis": axis,
                "at": line.x if axis == "y" else line.y,
                "start": start,
                "end": end,
                "step": step,
                "picture": _uri(stretched(even_sections(cut))),
            }
        )
    return cuts


def draw_map(values: np.ndarray, low: float, high: float) -> str:
    """Colour a map from its lowest to its highest value; NaN is transparent.

    Args:
        values: (rows, cols).
        low: value of the darkest colour.
        high: value of the brightest colour.

    Returns:
        A data URI.
    """
    position = np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 4
    position = np.nan_to_num(position)
    index = np.minimum(position.astype(int), 3)
    share = (position - index)[..., None]
    colors = (1 - share) * _COLORS[index] + share * _COLORS[index + 1]
    alpha = np.where(np.isfinite(values), 255, 0)[..., None]
    return _uri(np.concatenate([np.rint(colors), alpha], -1).astype(np.uint8))


def color_stops() -> list[str]:
    """Return the colours of maps, lowest value first, as CSS."""
    return [f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in _COLORS]


def _around(plan: CheckPlan, x: int, y: int, rows: int, cols: int) -> Grid:
    """Return the area of a size around a point, shifted into the volume."""
    area = plan.area
    rows, cols = min(rows, area.rows), min(cols, area.cols)
    row = ((x - area.x) >> plan.mip) - rows // 2
    col = ((y - area.y) >> plan.mip) - cols // 2
    row, col = min(max(row, 0), area.rows - rows), min(max(col, 0), area.cols - cols)
    return area.crop(row, col, rows, cols)


def _middle_line(plan: CheckPlan, image: ImageVolume, axis: str) -> Grid:
    """Choose the line of a cut: at a stored mip at which it is short enough."""
    for mip in (mip for mip in image.mips if mip >= plan.mip):
        area = image.clip(plan.area.cover(mip))
        if area is not None and max(area.shape) <= _CUT_PX:
            return _line(area, axis)
    return _line(plan.area, axis)


def _line(area: Grid, axis: str) -> Grid:
    """Return the middle row (axis "y") or column ("x") of an area, or its middle."""
    rows, cols = (1, area.cols) if axis == "y" else (area.rows, 1)
    rows, cols = min(rows, _CUT_PX), min(cols, _CUT_PX)
    return area.crop((area.rows - rows) // 2, (area.cols - cols) // 2, rows, cols)


def _read_cut(image: ImageVolume, line: Grid, sections: range) -> np.ndarray:
    """Read a line of each section: (num_sections, px)."""
    windows = dict.fromkeys(sections, line)
    return np.stack([_finite(s[0]).ravel() for _, s in iter_sections(image, windows)])


def even_sections(cut: np.ndarray) -> np.ndarray:
    """Give all sections of a cut one mean and one standard deviation.

    Sections that were imaged brighter or darker hide whether borders run on.

    Args:
        cut: (num_sections, px), 0 = no data.

    Returns:
        The same shape, float32, around 128; tissue is at least 1.
    """
    evened = np.zeros(cut.shape, np.float32)
    for z, greys in enumerate(cut.astype(np.float32)):
        tissue = greys != 0
        if tissue.any():
            values = greys[tissue] - greys[tissue].mean()
            values *= 40 / max(float(values.std()), 1e-6)
            evened[z, tissue] = np.maximum(128 + values, 1)
    return evened


def _finite(section: np.ndarray) -> np.ndarray:
    """Convert to float32; NaN and infinite pixels become 0, no data."""
    values = section.astype(np.float32)
    return np.where(np.isfinite(values), values, 0)


def _uri(picture: np.ndarray) -> str:
    """Encode (rows, cols) grey levels or (rows, cols, 4) colours as a PNG."""
    buffer = io.BytesIO()
    picture = np.ascontiguousarray(picture)
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
