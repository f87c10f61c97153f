"""Write one HTML file that shows the results of `metroem evaluate`, pair by pair.

The page is complete: it loads nothing from a network. Names, paths and figures of a
data set are stored in blocks of JSON. The page shows them as text and never runs them:
its policy allows only the one script whose hash it names. The pictures of each pair are
a separate block. The block is written as soon as the pair is aligned, and decoded when
the pair is opened.
"""

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Traversable
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from metroem.evaluation.report.pair_pictures import (
    MASKS,
    NUM_CROPS,
    Crop,
    Drawn,
    draw_wheel,
)
from metroem.evaluation.scores import AlignedPair, SetResult, WarpedSection
from metroem.evaluation.tables import plain
from metroem.io.files import atomic_write, make_folder
from metroem.io.h5 import ImageSet

# The folder of what pages consist of; other pages take base.css and elements.js, too.
FOLDER: Traversable = files("metroem.evaluation.report")
_STYLES = ("base.css", "page.css")
_SCRIPTS = ("elements.js", "overview.js", "viewer.js", "page.js")
_DATA = "<!-- data -->"
_CROPS_PER_PAIR = 3  # among the worst of all, if there are enough pairs
# Sources that neuroglancer can open from anywhere; a local path is none of them.
_SOURCE = re.compile(
    r"(?:(?P<format>precomputed|n5|zarr|zarr2|zarr3)://)?"
    r"(?P<url>(?:gs|s3|https?)://\S.*)"
)


class Origin(NamedTuple):
    """Where the images of a pair come from.

    Attributes:
        file: name of the image set, or of both image files.
        source: path of the volume, or of the file of src.
        corner: (x, y) mip-0 pixel of the first pixel of tgt.
        resolution: nm of a mip-0 pixel along x, y, z; None if it is not known.
    """

    file: str
    source: str
    corner: tuple[int, int]
    resolution: Sequence[float] | None


def pair_origin(images: ImageSet, index: int) -> Origin:
    """Tell where a pair of an image set comes from."""
    x, y, *_ = images.box(index, 1)
    return Origin(
        images.path.name,
        str(images.attributes.get("source_path", "")),
        (x, y),
        images.attributes.get("resolution"),
    )


class ReportPage:
    """Write a page piece by piece; `report_page` opens one.

    Pairs are numbered in the order in which they are added.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._sets: dict[str, dict[str, Any]] = {}
        self._rows: list[dict[str, Any]] = []
        self._known: list[dict[str, Any]] = []
        self._crops: list[tuple[float, int, Crop]] = []  # CPC, number of the pair
        head, self._tail = fill_template(
            FOLDER / "page.html",
            [FOLDER / name for name in _STYLES],
            [FOLDER / name for name in _SCRIPTS],
        )
        file.write(head)

    def add(
        self, origin: Origin, pair: AlignedPair | WarpedSection, drawn: Drawn
    ) -> None:
        """Write the pictures of a pair, and keep its figures for the table.

        Args:
            origin: where the images of the finest mip come from.
            pair: the figures of a pair, or of a section warped by a known field.
            drawn: its pictures.
        """
        self._sets.setdefault(
            origin.file,
            {
                "source": origin.source,
                "neuroglancer": neuroglancer_source(origin.source),
                "resolution": origin.resolution,
            },
        )
        if isinstance(pair, WarpedSection):
            self._write_json(f"known-{len(self._known)}", drawn.pictures)
            more = {"corner": origin.corner, "thumb": drawn.thumb}
            self._known.append(plain(pair) | plain(more))
            return
        self._write_json(f"pair-{len(self._rows)}", drawn.pictures)
        has_value = not math.isnan(pair.score.made_worse)
        stage_cpc = drawn.stage_cpc if has_value else [None] * len(drawn.stage_cpc)
        more = {
            "corner": origin.corner,
            "thumb": drawn.thumb,
            "stage_cpc": stage_cpc,
        }
        if has_value:
            number = len(self._rows)
            self._crops += [(crop.cpc, number, crop) for crop in drawn.crops]
        self._rows.append(plain(pair) | plain(more))

    def finish(self, about: Mapping[str, Any], results: Sequence[SetResult]) -> None:
        """Write the summary of all pairs, and the end of the page.

        Args:
            about: the request, the settings, "stages" and "curves".
            results: one per image set.
        """
        sets = [
            self._sets[result.file] | plain(result._replace(pairs=(), known=()))
            for result in results
        ]
        masks = {
            name: f"rgb({red} {green} {blue} / {alpha / 255:.2f})"
            for name, (red, green, blue, alpha) in MASKS.items()
        }
        legend = {"masks": masks, "wheel": draw_wheel()}
        rows = {"pairs": self._rows, "known": self._known, "worst": self._worst()}
        self._write_json("summary", {"about": about, "sets": sets} | rows | legend)
        self._file.write(self._tail)

    def _worst(self) -> list[dict[str, Any]]:
        """Choose the worst chunks of all pairs, so that one pair does not fill them."""
        most = max(_CROPS_PER_PAIR, -(-NUM_CROPS // max(len(self._rows), 1)))
        worst, per_pair = [], Counter[int]()
        for _, number, crop in sorted(self._crops, key=lambda one: one[:2]):
            per_pair[number] += 1
            if per_pair[number] <= most:
                worst.append({"pair": number} | plain(crop))
        return worst[:NUM_CROPS]

    def _write_json(self, name: str, value: Any) -> None:
        self._file.write(data_block(name, value))


@contextmanager
def report_page(path: Path) -> Iterator[ReportPage]:
    """Open a page to add pairs to; the file appears complete or not at all.

    Args:
        path: of the page; its folder is created.
    """
    make_folder(path.parent)
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        yield ReportPage(file)


def neuroglancer_source(source_path: str) -> str | None:
    """Return the URL by which neuroglancer opens a volume; None if it cannot.

    Args:
        source_path: the volume as cloud-volume opens it, "gs://bucket/em".
    """
    match = _SOURCE.fullmatch(source_path)
    if match is None:
        return None
    return f"{match['format'] or 'precomputed'}://{match['url']}"


def data_block(name: str, value: Any) -> str:
    """Make the block of a page that holds JSON, which its script finds by name."""
    text = json.dumps(plain(value), separators=(",", ":"))
    # So that HTML sees no end of the block and no comment in it.
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def fill_template(
    page: Traversable, styles: Sequence[Traversable], scripts: Sequence[Traversable]
) -> tuple[str, str]:
    """Put styles and scripts into a page, and allow them and no others.

    Args:
        page: the HTML, with marks for what is put in.
        styles: CSS files, in order.
        scripts: JavaScript files, in order.

    Returns:
        The page before and after its data.
    """
    style, script = (
        "\n".join(part.read_text(encoding="utf-8") for part in parts)
        for parts in (styles, scripts)
    )
    script = '"use strict";\n' + script
    text = page.read_text(encoding="utf-8")
    for mark, content in (
        ("STYLE_HASH", _hash(style)),
        ("SCRIPT_HASH", _hash(script)),
        ("/* style */", style),
        ("/* script */", script),
    ):
        text = text.replace(mark, content)
    head, tail = text.split(_DATA)
    return head, tail


def _hash(text: str) -> str:
    """Return the hash by which a content security policy allows a style or script."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
