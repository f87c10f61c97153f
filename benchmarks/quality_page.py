"""Write the page of quality.py: its figures, pictures of pairs, and loss curves."""

import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from quality_cases import Solved
from quality_results import METHODS, NONE, STAGE0, UNWARPED, Bar, Results

from metroem.evaluation.report.curves import Curve
from metroem.io.pictures import color_field, overlay

_LOG = "What was tried on the way to these figures is in [docs/log.md](../docs/log.md)."
_NAMES = {NONE: "no alignment", **{m: name for m, (_, name) in METHODS.items()}}

PANEL_PX, GAP_PX, TITLE_PX = 236, 6, 18
ERROR_PX = 8.0  # drawn white
_UNSCORED = (70, 90, 110)
_COLORS = 256  # per picture, since noise compresses badly
_PLOT, _PLOT_MARGIN = (420, 260), (52, 34, 12, 22)  # left, bottom, right, top
_LINES = {"training": (200, 90, 20), "validation": (20, 90, 180)}
_TICKS = [digit * 10.0**power for power in range(-6, 4) for digit in (1, 2, 5)]


class Pair(NamedTuple):
    """One picture of a pair."""

    which: str  # best, median or worst
    case: str
    epe_px: float
    file: str  # relative to the page


class Page(NamedTuple):
    """The content of the page."""

    command: str
    bars: Sequence[Bar]
    results: Results
    other: Results | None  # of another tissue
    curves: str | None  # picture, relative to the page
    pairs: Mapping[str, Sequence[Pair]]  # by family
    notes: Sequence[str]


def write_page(path: Path, page: Page) -> None:
    """Write the page; it replaces an existing one."""
    parts = [
        "# How well a trained pyramid aligns",
        _intro(page),
        "## The bars",
        "Found is with finetuning, where the row does not say otherwise; bars are "
        "factors of what the best of the peers leaves on the same cases.",
        _bars(page.bars),
        "## All methods",
        "Means over the cases of a family; near: near a defect; > 8 px: share of "
        "pixels further off; folds over all scored pixels, those at tears included.",
        _methods(page.results),
        _left_out(page.results),
        _unwarped(page.results),
    ]
    if page.other is not None:
        parts += [
            "## Another tissue",
            f"The same checkpoint on sections of {_size(page.other)} px that show "
            "another tissue by another microscope, each against itself warped. "
            "Mean EPE, px:",
            _by_label(page.other, "A"),
            _left_out(page.other),
        ]
    if page.curves is not None:
        parts += ["## Training", f"![loss curves]({page.curves})"]
    parts += ["## Pairs", *_pictures(page.pairs), "## What was tried", _LOG]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n")


def _intro(page: Page) -> str:
    meta = page.results.meta
    machine = (
        f"{meta['cpu']}, {meta['cores']} cores, {platform.machine()}, torch "
        f"{torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    first = (
        f"{meta['sections']} sections of {_size(page.results)} px that were not "
        f"trained on; pairs per kind of case: {meta['limit']}, seed "
        f"{meta['seed']}, {meta['threads']} thread. A: a section against "
        "itself, B: against its neighbour, C: with a defect; each warped by a known "
        "field."
    )
    lines = [
        f"Made by\n\n```sh\n{page.command}\n```\n\non {machine}.",
        first,
        *page.notes,
    ]
    return "\n\n".join(lines)


def _bars(bars: Sequence[Bar]) -> str:
    rows = []
    for bar in bars:
        best = bar.best
        ratio = "" if not best or bar.found is None else f"{bar.found / best:.2f}"
        figures = (bar.limit, bar.found, bar.networks)
        cells = [_number(figure, bar.digits) for figure in figures]
        met = {True: "yes", False: "**no**", None: "not measured"}[bar.is_met]
        rows.append([bar.what, bar.bar, *cells, ratio, met])
    head = ["what", "bar", "at most", "found", "networks alone", "of best peer", "met"]
    return _table(head, rows)


def _methods(results: Results) -> str:
    keys = (
        *(("epe_mean", family, 1, 2) for family in "ABC"),
        ("near_mean", "C", 1, 2),
        *(("epe_outliers", family, 100, 2) for family in "ABC"),
        ("cpc64", "B", 1, 3),
        ("cycle_p95", "B", 1, 2),
        ("fold_frac", "ABC", 1e6, 0),
        ("wall_s", "ABC", 1, 2),
    )
    rows = []
    for method in _ordered(results):
        means = [results.mean(method, key, where) for key, where, *_ in keys]
        cells = [
            _number(scale * mean, digits)
            for mean, (*_, scale, digits) in zip(means, keys, strict=True)
        ]
        rows.append([_NAMES.get(method, method), *cells])
    truth = _number(results.mean(NONE, "cpc64_truth", "B"), 3)
    rows.append(["true field", *["0"] * 7, truth, "0", "0", ""])
    head = "method,A,B,C,near,A > 8 px %,B > 8 px %,C > 8 px %,CPC 64 (B)"
    return _table([*head.split(","), "cycle p95", "folds, ppm", "seconds"], rows)


def _unwarped(results: Results) -> str:
    if not results.of(NONE, "B", UNWARPED):
        return ""
    found = {
        _NAMES.get(method, method): results.mean(method, "epe_mean", "B", UNWARPED)
        for method in _ordered(results)
        if method not in (NONE, STAGE0)
    }
    listed = ", ".join(f"{name} {epe:.2f}" for name, epe in found.items())
    return (
        "B's unwarped pairs are in none of these figures: their true field is exactly "
        "0, so that no method can be better than no alignment there. Mean EPE on "
        f"them, px: {listed}."
    )


def _left_out(results: Results) -> str:
    if not results.failed:
        return ""
    return f"Left out, since they failed in some case: {', '.join(results.failed)}."


def _by_label(results: Results, family: str) -> str:
    labels = list(dict.fromkeys(r["label"] for r in results.of(NONE, family)))
    rows = []
    for method in _ordered(results):
        means = [results.mean(method, "epe_mean", family, lab) for lab in labels]
        means.append(results.mean(method, "epe_mean", family))
        means.append(results.mean(method, "wall_s", family))
        name = _NAMES.get(method, method)
        rows.append([name, *(_number(mean, 2) for mean in means)])
    return _table(["method", *labels, "all", "seconds"], rows)


def _pictures(pairs: Mapping[str, Sequence[Pair]]) -> list[str]:
    parts = [
        "The best, the median and the worst pair of each family, by the mean EPE of "
        "the finetuned field. In the overlays src is red and tgt cyan, so that what "
        "fits is grey. Error: black 0, white 8 px or more, blue not scored."
    ]
    for family, shown in pairs.items():
        parts.append(f"### {family}")
        for pair in shown:
            parts.append(f"{pair.which}: {pair.case}, mean EPE {pair.epe_px:.2f} px")
            parts.append(f"![{pair.case}]({pair.file})")
    return parts


def _ordered(results: Results) -> list[str]:
    """Sort the methods by their mean error, no alignment first."""
    rest = [method for method in results.methods if method != NONE]
    return [NONE, *sorted(rest, key=lambda m: results.mean(m, "epe_mean"))]


def _size(results: Results) -> str:
    return " x ".join(str(side) for side in results.meta["shape"])


def _number(figure: float | None, digits: int) -> str:
    return "" if figure is None or figure != figure else f"{figure:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    aligned = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, aligned, *rows))


def save_pair(path: Path, solved: Solved) -> None:
    """Save src, tgt, both overlays, the field and its error as one small PNG."""
    length = np.hypot(*solved.truth)[solved.valid]
    full_px = float(np.percentile(length, 99))
    error = np.hypot(*(solved.field - solved.truth))
    panels = {
        "src": overlay(solved.src, solved.src),
        "tgt": overlay(solved.tgt, solved.tgt),
        "before (src red, tgt cyan)": overlay(solved.src, solved.tgt),
        "after": overlay(solved.warped_src, solved.tgt),
        f"field (full colour {full_px:.0f} px)": color_field(solved.field, full_px),
        f"error, 0 to {ERROR_PX:g} px": _heat(error, solved.valid),
    }
    small = {title: _shrink(panel) for title, panel in panels.items()}
    width, height = next(iter(small.values())).size
    size = (len(small) * (width + GAP_PX) - GAP_PX, height + TITLE_PX)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, (title, panel) in enumerate(small.items()):
        left = index * (width + GAP_PX)
        draw.text((left, 1), title, "black", _font())
        sheet.paste(panel, (left, TITLE_PX))
    _save(path, sheet)


def save_curves(path: Path, curves: Sequence[Curve]) -> None:
    """Save the curves side by side; x is minutes, y is logarithmic."""
    width, height = _PLOT
    sheet = Image.new("RGB", (width * len(curves), height), "white")
    for index, curve in enumerate(curves):
        plot = Image.new("RGB", _PLOT, "white")
        _plot(ImageDraw.Draw(plot), curve)
        sheet.paste(plot, (index * width, 0))
    _save(path, sheet)


def _plot(draw: ImageDraw.ImageDraw, curve: Curve) -> None:
    left, bottom, right, top = _PLOT_MARGIN
    width, height = _PLOT[0] - left - right, _PLOT[1] - bottom - top
    known = [v for values in curve.values.values() for v in values if v > 0]
    low, high = math.log(0.9 * min(known)), math.log(1.1 * max(known))
    span = max(curve.minutes[-1], 1e-9)

    def at(minutes: float, value: float) -> tuple[float, float]:
        fraction = (math.log(max(value, math.exp(low))) - low) / (high - low)
        return left + width * minutes / span, top + height * (1 - fraction)

    draw.rectangle((left, top, left + width, top + height), outline="black")
    draw.text((left, 3), f"stage {curve.stage}: {curve.figure}", "black", _font())
    for tick in _TICKS:
        if low <= math.log(tick) <= high:
            x, y = at(0, tick)
            draw.line((x, y, x + width, y), (225, 225, 225))
            draw.text((x - 6, y), f"{tick:g}", "black", _font(), anchor="rm")
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        x, y = left + fraction * width, top + height
        draw.text((x, y + 4), f"{fraction * span:.2g}", "black", _font(), anchor="mt")
    draw.text(
        (left + width / 2, _PLOT[1] - 2), "minutes", "black", _font(), anchor="mb"
    )
    for index, (name, values) in enumerate(curve.values.items()):
        points = [at(*point) for point in zip(curve.minutes, values, strict=True)]
        draw.line(points, _LINES[name], 2)
        draw.text(
            (left + width - 8, top + 6 + 14 * index),
            *(name, _LINES[name], _font()),
            anchor="rt",
        )


def _heat(error: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Colour errors, (H, W, 3) uint8: black, red, yellow, white at ERROR_PX."""
    level = np.clip(error / ERROR_PX, 0, 1)[..., None]
    color = np.clip(3 * level - np.arange(3), 0, 1)
    return np.where(valid[..., None], 255 * color, _UNSCORED).astype(np.uint8)


def _shrink(panel: np.ndarray) -> Image.Image:
    image = Image.fromarray(panel)
    image.thumbnail((PANEL_PX, PANEL_PX), Image.Resampling.BOX)
    return image


def _font() -> Any:
    return ImageFont.load_default(12)


def _save(path: Path, sheet: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    few = sheet.quantize(_COLORS, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
