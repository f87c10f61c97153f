"""Draw the pictures of README and docs/.

    make demo
    python docs/make_pictures.py
    python docs/make_pictures.py --stack FOLDER

The grids of docs/fields.md are computed with `metroem.geometry.field`. The other
pictures show sections 23 to 27 of the demo, which were not trained on. With --stack,
only those of docs/stack.md are drawn, of a stack that `align-stack` wrote to a folder.
They need Chromium.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from cloudvolume import CloudVolume
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import metroem
from metroem.geometry.field import compose, upsample_field, warp
from metroem.io.image_volume import ImageVolume
from metroem.io.pictures import overlay
from metroem.stack.check_page.pictures import even_sections

FOLDER = Path(__file__).parent
PICTURES = FOLDER / "pictures"
ROOT = FOLDER.parent
sys.path.insert(0, str(ROOT))
from tests.browser import Browser  # noqa: E402  # Chromium without a driver

DEMO = ROOT / "demo"
SRC_Z = 26  # src of the pair that is shown before and after
VIEW = (slice(40, 440), slice(64, 424))  # rows and cols shown of a section
# Commands that make the report; `{folder}` is a temporary folder.
REPORT_COMMANDS = """\
download_image.py --cv_path {demo}/sections --dst_folder {folder}/unseen --mip 2 0
    --patch_size 112 448 --x_offset 32 --y_offset 0 --z_start 23 --z_end 28 --normalize
-m metroem evaluate --pyramid_path pyramid --dataset_path unseen --known_warps
    --report report.html
"""
STACK_Z = 5  # section that is shown over the one before it, of a stack
CUT_AT, CUT_PX = 0.6, (2, 12)  # where x is cut; size of a pixel along y and z
SHORT_PATHS = """\
for (const path of document.querySelectorAll("#about dd"))
    path.textContent = path.textContent.split("/").slice(-2).join("/")
"""
CELL = 44  # px of the picture per pixel of the finest grid
ROWS, COLS = 8, 10
INK, GREY, LINE = "#1c2733", "#5f6f80", "#c9d2dc"
BLUE, ORANGE, GREEN = "#1f6fb4", "#f0963c", "#2f8f5b"
P = (1, 2)  # row and col of the pixel that is explained
D_COLS, D_ROWS = 5.0, 3.0


class Panel(NamedTuple):
    """A grid of pixels somewhere in a picture."""

    left: int
    top: int
    rows: int = ROWS
    cols: int = COLS
    cell: int = CELL

    def centre(self, row: float, col: float) -> tuple[float, float]:
        """Find the centre of a pixel in the picture."""
        return (
            self.left + (col + 0.5) * self.cell,
            self.top + (row + 0.5) * self.cell,
        )

    def box(self, row: int, col: int) -> tuple[int, int, int, int]:
        """Find the square of a pixel in the picture."""
        x, y = self.left + col * self.cell, self.top + row * self.cell
        return x, y, x + self.cell, y + self.cell


class Canvas:
    """A picture to draw on."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self, x: float, y: float, words: str, colour: str = INK, size: int = 19
    ) -> float:
        """Write words from (x, y) on; return the length of the last line."""
        font = ImageFont.load_default(size)
        self.draw.multiline_text((x, y), words, fill=colour, font=font, spacing=6)
        return font.getlength(words.splitlines()[-1])

    def grid(self, panel: Panel, title: str, axes: tuple[str, str]) -> None:
        """Draw an empty grid, its title, and the names of its axes: down and right."""
        for row in range(panel.rows):
            for col in range(panel.cols):
                self.draw.rectangle(panel.box(row, col), outline=LINE)
        self.text(panel.left, panel.top - 78, title, size=21)
        down, right = axes
        length = self.text(panel.left, panel.top - 36, right, GREY)
        start = panel.left + length + 10, panel.top - 24
        self.arrow(start, (start[0] + 40, start[1]), GREY, width=2)
        length = self._text_down(panel.left - 38, panel.top, down)
        start = panel.left - 26, panel.top + length + 10
        self.arrow(start, (start[0], start[1] + 40), GREY, width=2)

    def _text_down(self, x: int, y: int, words: str) -> float:
        """Write words downwards, in grey; return their length."""
        length = round(ImageFont.load_default(19).getlength(words))
        label = Canvas(length, 26)
        label.text(0, 0, words, GREY)
        self.image.paste(label.image.rotate(270, expand=True), (x, y))
        return length

    def image_on(self, panel: Panel, image: Tensor) -> None:
        """Colour the pixels of an (rows, cols) image that are not 0."""
        for row, col in image.round().nonzero().tolist():
            self.draw.rectangle(panel.box(row, col), fill=ORANGE, outline=LINE)

    def outline(self, panel: Panel, row: int, col: int) -> None:
        """Mark a pixel."""
        self.draw.rectangle(panel.box(row, col), outline=BLUE, width=4)

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        colour: str = BLUE,
        width: int = 4,
    ) -> None:
        """Draw a line with a head at its end."""
        self.draw.line((*start, *end), fill=colour, width=width)
        tip = torch.tensor(end, dtype=torch.float32)
        along = tip - torch.tensor(start, dtype=torch.float32)
        along = along / along.norm() * (8 + 2 * width)
        across = torch.stack((-along[1], along[0])) * 0.45
        corners = [tip, tip - along + across, tip - along - across]
        self.draw.polygon([tuple(c.tolist()) for c in corners], fill=colour)

    def save(self, name: str) -> None:
        """Write the picture beside this script."""
        self.image.save(FOLDER / name, optimize=True)


def constant(d_cols: float, d_rows: float, rows: int, cols: int) -> Tensor:
    """Make a field, (1, 2, rows, cols), of one vector everywhere."""
    return torch.tensor([d_cols, d_rows]).view(1, 2, 1, 1).repeat(1, 1, rows, cols)


def draw_field() -> None:
    """Draw the vector of one pixel, in the order of arrays and of neuroglancer."""
    src = torch.zeros(1, 1, ROWS, COLS)
    target = P[0] + int(D_ROWS), P[1] + int(D_COLS)
    src[0, 0, target[0], target[1]] = 1.0
    field = constant(D_COLS, D_ROWS, ROWS, COLS)
    warped = warp(src, field)

    step = COLS * CELL + 90
    canvas = Canvas(3 * step - 80, 580)
    left, middle = Panel(60, 96), Panel(60 + step, 96)
    right = Panel(60 + 2 * step, 96, COLS, ROWS)
    axes = ("rows = x", "cols = y")
    canvas.grid(left, "src, as files and networks have it", axes)
    canvas.grid(middle, "warped[p] = src[p + field[p]]", axes)
    canvas.grid(right, "src, as neuroglancer shows it", ("y", "x"))
    canvas.image_on(left, src[0, 0])
    canvas.image_on(middle, warped[0, 0])
    canvas.image_on(right, src[0, 0].T)
    for panel, start, end in (
        (left, P, target),
        (right, P[::-1], target[::-1]),
    ):
        canvas.outline(panel, *start)
        canvas.arrow(panel.centre(*start), panel.centre(*end))
    canvas.outline(middle, *P)
    _draw_legs(canvas, left, target)
    canvas.text(60, 470, f"p = (row {P[0]}, col {P[1]}); field[:, 1, 2] = (5, 3)")
    canvas.text(60, 502, "blue: the arrow starts at p and ends where src is read", GREY)
    canvas.text(60 + step, 470, f"warped[{P[0]}, {P[1]}] = src[1 + 3, 2 + 5]")
    canvas.save("field.png")


def _draw_legs(canvas: Canvas, panel: Panel, target: tuple[int, int]) -> None:
    """Draw the two channels of the vector, as the legs of a triangle."""
    start, end = panel.centre(*P), panel.centre(*target)
    corner = end[0], start[1]
    canvas.draw.line((*start, *corner), fill=GREEN, width=2)
    canvas.draw.line((*corner, *end), fill=GREEN, width=2)
    canvas.text(corner[0] - 190, corner[1] - 34, "channel 0: 5 cols", GREEN, 18)
    canvas.text(corner[0] + 8, corner[1] + 40, "channel 1:\n3 rows", GREEN, 18)


def draw_algebra() -> None:
    """Draw two fields composed, and one field at two mips."""
    f, g = constant(3.0, 1.0, ROWS, COLS), constant(2.0, 4.0, ROWS, COLS)
    step = COLS * CELL + 90
    canvas = Canvas(3 * step, 540)
    axes = ("rows", "cols")
    panel = Panel(60, 96)
    canvas.grid(panel, "compose(f, g) = f(p) + g(p + f(p))", axes)
    _draw_path(canvas, panel, f, g)
    coarse = constant(2.5, 1.5, ROWS // 2, COLS // 2)
    fields = (coarse, upsample_field(coarse, 1))
    for number, (name, field) in enumerate(
        zip(("mip 1", "mip 0"), fields, strict=True)
    ):
        d_cols, d_rows = (float(v) for v in field[0, :, 0, 0])
        rows, cols = field.shape[-2:]
        cell = CELL * ROWS // rows
        grid = Panel(60 + (number + 1) * step, 96, rows, cols, cell)
        canvas.grid(grid, f"at {name}: ({d_cols:g}, {d_rows:g}) px", axes)
        start = (1.0, 1.0) if number == 0 else (2.5, 2.5)
        end = start[0] + d_rows, start[1] + d_cols
        canvas.arrow(grid.centre(*start), grid.centre(*end))
    canvas.text(60 + step, 470, "one place, one displacement in nm: a mip finer, twice")
    canvas.text(60 + step, 500, "as many rows and cols, and twice the values")
    canvas.save("algebra.png")


def _draw_path(canvas: Canvas, panel: Panel, f: Tensor, g: Tensor) -> None:
    """Draw the arrows from p along f, then along g, and along both at once."""
    positions = [P]
    for field in (f, g):
        row, col = positions[-1]
        d_cols, d_rows = (int(v) for v in field[0, :, row, col])
        positions.append((row + d_rows, col + d_cols))
    whole = compose(f, g)[0, :, P[0], P[1]]
    end = P[0] + int(whole[1]), P[1] + int(whole[0])
    canvas.outline(panel, *P)
    middle = panel.centre(*positions[1])
    canvas.arrow(panel.centre(*P), middle, GREEN)
    canvas.arrow(middle, panel.centre(*positions[2]), ORANGE)
    canvas.arrow(panel.centre(*P), panel.centre(*end))
    canvas.text(middle[0] - 60, middle[1] - 50, "f(p)", GREEN)
    canvas.text(middle[0] + 58, middle[1] + 60, "g(p + f(p))", "#b46a17")
    canvas.text(panel.left, 470, "invert(f) is the field h with compose(h, f) = 0")


def draw_before_after() -> None:
    """Draw one pair of the demo before and after alignment, with captions."""
    src, tgt = read_section(SRC_Z), read_section(SRC_Z - 1)
    pyramid = metroem.Pyramid.load(DEMO / "pyramid")
    field = torch.from_numpy(pyramid.align(src, tgt, mip=0))[None]
    image = torch.from_numpy(src.astype(np.float32))[None, None]
    warped = warp(image, field)[0, 0].numpy()
    overlays = [overlay(side, tgt)[VIEW].swapaxes(0, 1) for side in (src, warped)]
    height, width = overlays[0].shape[:2]
    canvas = Canvas(2 * width + 12, height + 34)
    captions = (
        "Before: a section (red) on its neighbour (cyan)",
        "After: what fits is grey",
    )
    for number, (caption, pixels) in enumerate(zip(captions, overlays, strict=True)):
        left = number * (width + 12)
        canvas.text(left + 2, 4, caption, size=17)
        canvas.image.paste(Image.fromarray(pixels), (left, 34))
    canvas.image = fewer_colours(canvas.image)
    canvas.save("pictures/before_after.png")


def fewer_colours(image: Image.Image) -> Image.Image:
    """Reduce to 64 colours: enough for red, cyan and grey, a third of the bytes."""
    return image.quantize(64, dither=Image.Dither.NONE)


def read_section(z: int) -> np.ndarray:
    """Read a section of the demo's volume at mip 0, rows along x."""
    volume = CloudVolume(f"file://{DEMO / 'sections'}", progress=False)
    return np.asarray(volume[:, :, z])[..., 0, 0]


def draw_report() -> None:
    """Take pictures of the report on the demo: its table, and one open pair."""
    with tempfile.TemporaryDirectory() as name, Browser(1100, 640) as browser:
        folder = Path(name)
        (folder / "pyramid").symlink_to(DEMO / "pyramid")
        for line in REPORT_COMMANDS.replace("\n    ", " ").splitlines():
            words = shlex.split(line.format(demo=DEMO, folder=folder))
            if words[0].endswith(".py"):
                words[0] = str(ROOT / words[0])
            subprocess.run([sys.executable, *words], cwd=folder, check=True)
        browser.load(folder / "report.html")
        save_screenshot(browser, "report_overview.png")
        browser.run("document.querySelector('#pairs tbody tr').click()")
        browser.wait("byId('canvas').dataset.shows")
        browser.press("o")  # src red, tgt cyan
        browser.run("new Promise((done) => requestAnimationFrame(done))")
        save_screenshot(browser, "report_pair.png")


def save_screenshot(browser: Browser, name: str) -> None:
    """Save a screenshot of the browser."""
    path = PICTURES / name
    browser.screenshot(path)
    with Image.open(path) as image:
        fewer_colours(image.convert("RGB")).save(path, optimize=True)


def draw_stack(folder: Path) -> None:
    """Draw an aligned stack: cuts along z, a pair of sections, and the report."""
    figures = json.loads((folder / "check.json").read_text())
    raw = ImageVolume(figures["before_path"])
    volumes = {"raw": raw, "aligned": ImageVolume(str(folder / "image"))}
    extent, sections = raw.extent()
    line = extent.crop(round(CUT_AT * extent.rows), 0, 1, extent.cols)
    cuts = {
        name: even_sections(volume.read(line, sections)[:, 0, 0]).clip(0, 255)
        for name, volume in volumes.items()
    }
    height, width = len(sections) * CUT_PX[1], extent.cols * CUT_PX[0]
    canvas = Canvas(width, 2 * (height + 34))
    for number, (name, cut) in enumerate(cuts.items()):
        top = number * (height + 34)
        canvas.text(2, top + 4, f"{name}: z down, y to the right", size=17)
        pixels = cut.astype(np.uint8).repeat(CUT_PX[0], 1).repeat(CUT_PX[1], 0)
        canvas.image.paste(Image.fromarray(pixels), (0, top + 34))
    canvas.image = canvas.image.convert("L")
    canvas.save("pictures/stack_cut.png")

    rows, cols = (min(360, side) for side in extent.shape)
    window = extent.crop(
        (extent.rows - rows) // 2, (extent.cols - cols) // 2, rows, cols
    )
    canvas = Canvas(2 * rows + 12, cols + 34)
    for number, (name, volume) in enumerate(volumes.items()):
        tgt, src = volume.read(window, range(STACK_Z - 1, STACK_Z + 1))[:, 0]
        left = number * (rows + 12)
        caption = f"{name}: z {STACK_Z} red, {STACK_Z - 1} cyan"
        canvas.text(left + 2, 4, caption, size=17)
        pixels = np.ascontiguousarray(overlay(src, tgt).swapaxes(0, 1))
        canvas.image.paste(Image.fromarray(pixels), (left, 34))
    canvas.image.save(PICTURES / "stack_pair.jpg", quality=80)

    with Browser(1100, 760) as browser:
        browser.load(folder / "report.html")
        browser.run(SHORT_PATHS)
        path = folder / "report.png"
        browser.screenshot(path)
        with Image.open(path) as image:
            image.convert("RGB").save(PICTURES / "stack_report.jpg", quality=65)
        path.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the pictures of the pages.")
    parser.add_argument("--stack", type=Path, help="folder that align-stack wrote")
    stack = parser.parse_args().stack
    if stack is not None:
        draw_stack(stack)
    else:
        draw_field()
        draw_algebra()
        draw_before_after()
        draw_report()
