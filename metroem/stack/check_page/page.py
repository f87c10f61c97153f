"""Make the page of a check: one HTML file that loads nothing from a network."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np

from metroem.evaluation.report.page import FOLDER, data_block, fill_template
from metroem.stack.check_page.pictures import (
    color_stops,
    draw_cuts,
    draw_map,
    draw_place,
)
from metroem.stack.check_plan import CheckPlan
from metroem.stack.check_summary import describe_place, verdict
from metroem.stack.jumps import SEARCH_PX

_HERE = files("metroem.stack.check_page")
# Of each map: title, unit, and which end is bad.
_MAPS = {
    "error": ("Off by", "px", "high"),
    "correlation": ("Correlation", "", "low"),
}


def draw_page(
    plan: CheckPlan, figures: Mapping[str, Any], maps: Mapping[str, np.ndarray]
) -> str:
    """Make the page; it reads the worst places and two cuts from the volume.

    Args:
        plan: what was measured.
        figures: what check.json holds.
        maps: see `Summary.maps`.

    Returns:
        The HTML.

    Raises:
        DatasetError: the volume cannot be read.
    """
    image = plan.open_image()
    places = [
        {
            **place,
            "words": describe_place(place),
            "on_map": _on_map(plan, place),
            **draw_place(plan, image, place),
        }
        for place in figures["worst"]
    ]
    page = {
        **figures,
        "verdict": verdict(figures),
        "worst": places,
        "num_cells": plan.num_cells,
        "maps": [_describe_map(name, values) for name, values in maps.items()],
        "colors": color_stops(),
        "cuts": draw_cuts(plan, image),
    }
    head, tail = fill_template(
        _HERE / "check.html",
        [FOLDER / "base.css", _HERE / "check.css"],
        [FOLDER / "elements.js", _HERE / "check.js"],
    )
    return head + data_block("figures", page) + tail


def _describe_map(name: str, values: np.ndarray) -> dict[str, Any]:
    """Return the picture of a map, and what its colours mean."""
    title, unit, bad = _MAPS[name]
    low, high = (0.0, float(SEARCH_PX)) if name == "error" else (0.0, 1.0)
    known = values[np.isfinite(values)]
    if name == "error" and known.size:  # small errors are seen, too
        high = float(np.clip(known.max(), 2.0, SEARCH_PX))
    return {
        **{"title": title, "unit": unit, "bad": bad, "low": low, "high": high},
        "rows": values.shape[0],
        "picture": draw_map(values, low, high),
    }


def _on_map(plan: CheckPlan, place: Mapping[str, Any]) -> list[float]:
    """Return where a place is on a map: fractions of its width and height."""
    rows, cols = plan.num_cells
    row = ((place["x"] - plan.area.x) >> plan.mip) // plan.cell_px
    col = ((place["y"] - plan.area.y) >> plan.mip) // plan.cell_px
    down = place["z"] - plan.sections.start + 0.5
    return [(row * cols + col + 0.5) / (rows * cols), down / len(plan.sections)]
