"""Small report pages that tests make and read."""

import json
from html.parser import HTMLParser

import torch

from metroem.data.sample import Sample
from metroem.evaluation.evaluate import Coverage
from metroem.evaluation.report.curves import Curve
from metroem.evaluation.report.page import pair_origin, report_page
from metroem.evaluation.report.pair_pictures import draw_pair
from metroem.evaluation.scores import (
    CHUNK_PX,
    AlignedPair,
    SetResult,
    Spot,
    WarpedSection,
    Where,
    mean_score,
    score_aligned,
    score_known,
)
from metroem.io.h5 import ImageSet
from metroem.synthetic.distortion import GroundTruth
from tests.pairs import SHIFT_PX, shifted_pair, write_pairs

ROWS, COLS = 96, 160
NAN = float("nan")
# What would run, or break the page, if it were not escaped.
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&'\"<!--"
ABOUT = {
    "pyramid_path": "pyramid",
    "dataset_path": "data",
    "checkpoint_name": "checkpoint",
    "no_finetune": False,
    "chunk_px": CHUNK_PX,
    "coverage": Coverage(3, 3, 3, False),
    "made": "2026-11-24 12:00",
    "version": "1.0.0",
    "stages": ["stage 0 (mip 1)", "stage 1 (mip 0)"],
    "curves": [
        Curve(0, "loss", (1.0, 2.5, 3.0), (0, 0, 1), {"training": (3.0, NAN, 0.5)}),
        Curve(1, "EPE, px", (1.0,), (0,), {"training": (0.0,), "validation": (2.0,)}),
    ],
}


class Scripts(HTMLParser):
    """The scripts of a page as a browser finds them, and all other tags."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.tags, self._open = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._open = [dict(attrs), ""]
            self.scripts.append(self._open)

    def handle_data(self, data):
        if self._open is not None:
            self._open[1] += data

    def handle_endtag(self, tag):
        self._open = None


def blocks(path):
    """The blocks of data of a page, by id."""
    scripts = Scripts(path.read_text()).scripts
    return {
        attributes["id"]: json.loads(text)
        for attributes, text in scripts
        if attributes.get("type") == "application/json"
    }


def make_page(
    path,
    *,
    shares=(0.0, 0.5, 1.0),
    source=None,
    about=ABOUT,
    suffix="",
    roles=("", "", ""),
    known=(),
):
    """A page of pairs, each aligned by a share of the field that is right.

    Args:
        path: of the page.
        shares: one a pair.
        source: path of the volume; that of the tests' pairs if None.
        about: what is said of the run.
        suffix: of the name of the image set, with its underscore.
        roles: of the pairs in the training.
        known: shares of sections warped by a known field.
    """
    folder = path.parent / "data"
    write_pairs(folder, mips=(1,), num_pairs=len(shares), shape=(2 * ROWS, 2 * COLS))
    file = folder / "x0_y0_z1_MIP1.h5"
    images = ImageSet(file.rename(folder / f"x0_y0_z1_MIP1{suffix}.h5"))
    if source is not None:
        images.attributes["source_path"] = source
    pairs = []
    with report_page(path) as page:
        for index, share in enumerate(shares):
            defects = torch.zeros(1, 1, ROWS, COLS, dtype=torch.bool)
            sample = Sample(*shifted_pair(ROWS, COLS, index), None, (), *[defects] * 2)
            field = torch.zeros(1, 2, ROWS, COLS)
            field[:, 0] = share * SHIFT_PX
            score, worst = score_aligned(sample, field, -field)
            assert worst is not None
            spot = Spot(worst.figure, 2 * worst.row, 2 * worst.col)
            where = Where(images.path.name, index, index + 1, index, spot)
            pairs.append(AlignedPair(where, score, roles[index]))
            page.add(
                pair_origin(images, pairs[-1].where.pair),
                pairs[-1],
                draw_pair(sample, [field / 2, field]),
            )
        for index, share in enumerate(known):
            page.add(pair_origin(images, index), *warped_section(images, index, share))
        mean = mean_score([pair.score for pair in pairs])
        result = SetResult(images.path.name, 1, ROWS, COLS, mean, tuple(pairs))
        page.finish(about, [result])
    return path


def warped_section(images, index, share):
    """A section warped by a field of `SHIFT_PX`, aligned by a share of that field."""
    defects = torch.zeros(1, 1, ROWS, COLS, dtype=torch.bool)
    sample = Sample(*shifted_pair(ROWS, COLS, index), None, (), *[defects] * 2)
    true_field = torch.zeros(1, 2, ROWS, COLS)
    true_field[:, 0] = SHIFT_PX
    field = share * true_field
    truth = GroundTruth(true_field, ~defects)
    score, worst = score_known(field, truth, defects, 0 * field)
    assert worst is not None
    spot = Spot(worst.figure, 2 * worst.row, 2 * worst.col)
    where = Where(images.path.name, index, index, index, spot)
    return WarpedSection(where, score), draw_pair(sample, [field])
