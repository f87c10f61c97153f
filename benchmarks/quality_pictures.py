"""Pictures of the page: pairs with their fields and errors, and loss curves."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from quality_cases import Solved

from metroem.report.curves import Curve
from metroem.report.pictures import color_field, overlay

PANEL_PX, GAP_PX, TITLE_PX = 236, 6, 18
ERROR_PX = 8.0  # drawn white
_UNSCORED = (70, 90, 110)
_COLORS = 256  # of a picture; noise compresses badly
_PLOT, _PLOT_MARGIN = (420, 260), (52, 34, 12, 22)  # left, bottom, right, top
_LINES = {"training": (200, 90, 20), "validation": (20, 90, 180)}
_TICKS = [digit * 10.0**power for power in range(-6, 4) for digit in (1, 2, 5)]


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
    small = {title: _shrunk(panel) for title, panel in panels.items()}
    width, height = next(iter(small.values())).size
    size = (len(small) * (width + GAP_PX) - GAP_PX, height + TITLE_PX)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for place, (title, panel) in enumerate(small.items()):
        left = place * (width + GAP_PX)
        draw.text((left, 1), title, "black", _font())
        sheet.paste(panel, (left, TITLE_PX))
    _save(path, sheet)


def save_curves(path: Path, curves: Sequence[Curve]) -> None:
    """Save the curves side by side, on axes of minutes and of logarithms."""
    width, height = _PLOT
    sheet = Image.new("RGB", (width * len(curves), height), "white")
    for place, curve in enumerate(curves):
        plot = Image.new("RGB", _PLOT, "white")
        _plot(ImageDraw.Draw(plot), curve)
        sheet.paste(plot, (place * width, 0))
    _save(path, sheet)


def _plot(draw: ImageDraw.ImageDraw, curve: Curve) -> None:
    left, bottom, right, top = _PLOT_MARGIN
    width, height = _PLOT[0] - left - right, _PLOT[1] - bottom - top
    known = [v for values in curve.values.values() for v in values if v > 0]
    low, high = math.log(0.9 * min(known)), math.log(1.1 * max(known))
    span = max(curve.minutes[-1], 1e-9)

    def at(minutes: float, value: float) -> tuple[float, float]:
        share = (math.log(max(value, math.exp(low))) - low) / (high - low)
        return left + width * minutes / span, top + height * (1 - share)

    draw.rectangle((left, top, left + width, top + height), outline="black")
    draw.text((left, 3), f"stage {curve.stage}: {curve.figure}", "black", _font())
    for tick in _TICKS:
        if low <= math.log(tick) <= high:
            x, y = at(0, tick)
            draw.line((x, y, x + width, y), (225, 225, 225))
            draw.text((x - 6, y), f"{tick:g}", "black", _font(), anchor="rm")
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = left + share * width, top + height
        draw.text((x, y + 4), f"{share * span:.2g}", "black", _font(), anchor="mt")
    draw.text(
        (left + width / 2, _PLOT[1] - 2), "minutes", "black", _font(), anchor="mb"
    )
    for place, (name, values) in enumerate(curve.values.items()):
        points = [at(*point) for point in zip(curve.minutes, values, strict=True)]
        draw.line(points, _LINES[name], 2)
        draw.text(
            (left + width - 8, top + 6 + 14 * place),
            *(name, _LINES[name], _font()),
            anchor="rt",
        )


def _heat(error: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: black over red and yellow to white at ERROR_PX."""
    level = np.clip(error / ERROR_PX, 0, 1)[..., None]
    color = np.clip(3 * level - np.arange(3), 0, 1)
    return np.where(valid[..., None], 255 * color, _UNSCORED).astype(np.uint8)


def _shrunk(panel: np.ndarray) -> Image.Image:
    image = Image.fromarray(panel)
    image.thumbnail((PANEL_PX, PANEL_PX), Image.Resampling.BOX)
    return image


def _font() -> Any:
    return ImageFont.load_default(12)


def _save(path: Path, sheet: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    few = sheet.quantize(_COLORS, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
