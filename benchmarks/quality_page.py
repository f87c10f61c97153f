"""The page of figures and pictures that quality.py writes."""

import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from quality_bars import Bar
from quality_results import METHODS, NONE, STAGE0, UNWARPED, Results

BEGIN, END = "<!-- by hand: begin -->", "<!-- by hand: end -->"
_BY_HAND = "\nNothing was noted yet.\n"
_NAMES = {NONE: "no alignment", **{m: name for m, (_, name) in METHODS.items()}}


class Pair(NamedTuple):
    """One picture of a pair."""

    which: str  # best, median or worst
    case: str
    epe_px: float
    file: str  # relative to the page


class Page(NamedTuple):
    """What the page shows."""

    command: str
    bars: Sequence[Bar]
    results: Results
    other: Results | None  # of another tissue
    curves: str | None  # picture, relative to the page
    pairs: Mapping[str, Sequence[Pair]]  # by family
    notes: Sequence[str]


def write_page(path: Path, page: Page) -> None:
    """Write the page; what was written into it by hand stays."""
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
    parts += ["## Pairs", *_pictures(page.pairs), "## What was tried"]
    parts.append(f"{BEGIN}{_kept(path)}{END}")
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
    """The methods by their mean error, no alignment first."""
    rest = [method for method in results.methods if method != NONE]
    return [NONE, *sorted(rest, key=lambda m: results.mean(m, "epe_mean"))]


def _kept(path: Path) -> str:
    """What stands between the marks of the page that is there."""
    text = path.read_text() if path.is_file() else ""
    if BEGIN not in text or END not in text:
        return _BY_HAND
    return text.split(BEGIN, 1)[1].rsplit(END, 1)[0]


def _size(results: Results) -> str:
    return " x ".join(str(side) for side in results.meta["shape"])


def _number(figure: float | None, digits: int) -> str:
    return "" if figure is None or figure != figure else f"{figure:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    aligned = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, aligned, *rows))
