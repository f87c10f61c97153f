"""The main job on real sections, where METROEM_SHARED names a folder with them."""

import os
from pathlib import Path

import numpy as np
import pytest

import download_image
import train
from metroem import Pyramid
from metroem.demo import MARGIN_PX, Run, distort_sections, score_sections
from metroem.io.volume_write import write_volume
from metroem.models.module_folders import init_pyramid
from metroem.synthetic.distortion import Distortion
from metroem.synthetic.requests import SCHEDULE

SHARED = os.environ.get("METROEM_SHARED")
NUM_TRAIN, SIDE_PX = 12, 192

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        SHARED is None, reason="METROEM_SHARED names no folder with real sections"
    ),
]


@pytest.mark.long  # a minute or two, which CI does not have yet
def test_a_small_pyramid_aligns_later_sections_of_a_real_stack(tmp_path):
    stack = np.load(Path(SHARED or "") / "data" / "fib25_a.npy", mmap_mode="r")
    part = slice(100 - MARGIN_PX, 100 + SIDE_PX + MARGIN_PX)
    # FIB-SEM neighbours are aligned as imaged, so the distortion is all the truth.
    tissue = np.concatenate([stack[:NUM_TRAIN, part, part], stack[50:54, part, part]])
    sections = distort_sections(tissue, Distortion(), MARGIN_PX, seed=1)
    run = Run(tmp_path, range(NUM_TRAIN), (0, 0), SIDE_PX, (2, 1), SCHEDULE)
    write_volume(run.volume, np.stack([s.image for s in sections]), 3)

    _, download, init, training = run.commands()
    download_image.main(download[1:])
    init_pyramid(run.pyramid, run.mips)
    train.main([*training[1:], "--max_epochs", "2"])

    pairs = range(NUM_TRAIN + 1, len(sections))
    score = score_sections(Pyramid.load(run.pyramid), sections, pairs)
    assert score.epe[-1] < 0.5 * score.epe_none
    assert score.cpc[-1] > score.cpc_none
