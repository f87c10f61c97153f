"""Small report pages that tests make."""

import torch

from metroem.data.sample import Sample
from metroem.io.h5 import ImageSet
from metroem.report.curves import Curve
from metroem.report.page import report_page
from metroem.scoring import (
    CHUNK_PX,
    AlignedPair,
    SetResult,
    Spot,
    Where,
    mean_score,
    score_aligned,
)
from tests.pairs import SHIFT_PX, shifted_pair, write_pairs

ROWS, COLS = 96, 160
NAN = float("nan")
ABOUT = {
    "pyramid_path": "pyramid",
    "dataset_path": "data",
    "checkpoint_name": "checkpoint",
    "no_finetune": False,
    "chunk_px": CHUNK_PX,
    "made": "2026-11-24 12:00",
    "version": "1.0.0",
    "stages": ["stage 0 (mip 1)", "stage 1 (mip 0)"],
    "curves": [
        Curve(0, "loss", (1.0, 2.5, 3.0), (0, 0, 1), {"training": (3.0, NAN, 0.5)}),
        Curve(1, "EPE, px", (1.0,), (0,), {"training": (0.0,), "validation": (2.0,)}),
    ],
}


def make_page(path, *, shares=(0.0, 0.5, 1.0), source=None, about=ABOUT, suffix=""):
    """A page of pairs, each aligned by a share of the field that is right.

    Args:
        path: of the page.
        shares: one a pair.
        source: path of the volume; that of the tests' pairs if None.
        about: what is said of the run.
        suffix: of the name of the image set, with its underscore.
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
            pairs.append(AlignedPair(where, score))
            page.add(images, pairs[-1], sample, [field / 2, field])
        mean = mean_score([pair.score for pair in pairs])
        result = SetResult(images.path.name, 1, ROWS, COLS, mean, tuple(pairs))
        page.finish(about, [result])
    return path
