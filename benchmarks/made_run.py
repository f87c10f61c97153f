"""Pairs made for a benchmark and a pyramid of one stage, ready to be trained."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from metroem.demo import DemoRequest, Run, make_sections, script
from metroem.grid import Grid
from metroem.io.h5 import ImageSetMeta, Pair, PairFrame, write_image_set
from metroem.normalize import normalize
from metroem.scaffold import init_pyramid

CHECKPOINT = "checkpoint"
WARP = {"type": "known_warp", "aligned": True, "peak_px": 6}
PHASE = {"smoothness": 0, "loss_spec": {"type": "known_warp"}, "augmentations": [WARP]}


def make_run(
    folder: Path, *, pairs: int, side_px: int, phase: Mapping[str, Any]
) -> Run:
    """Image sets at mip 0, an untrained pyramid and a schedule of one phase.

    Args:
        folder: holds all of it.
        pairs: neighbouring sections of one place.
        side_px: of each.
        phase: keys of the schedule beside those of `PHASE`.
    """
    schedule = folder / "schedule.json"
    run = Run(folder, range(pairs + 1), (0, 0), side_px, (0,), schedule)
    request = DemoRequest(folder, max(pairs + 1, 8), side_px, side_px, 1)
    images = [
        normalize(torch.from_numpy(section.image)[None, None].float())[0, 0].numpy()
        for section in make_sections(request)
    ]
    shape = images[0].shape
    meta = ImageSetMeta(
        frames=[PairFrame(Grid(0, 0, 0, *shape), (i + 1, i)) for i in range(pairs)],
        source="made by a benchmark",
        command=" ".join(sys.argv),
        request={},
        normalization={"kind": "tissue"},
    )
    data = folder / "dataset"
    made = [Pair(images[i + 1], images[i]) for i in range(pairs)]
    write_image_set(data / "x0_y0_z1_MIP0.h5", made, meta)
    init_pyramid(run.pyramid, [0])
    write_schedule(run, phase)
    return run


def write_schedule(run: Run, phase: Mapping[str, Any]) -> None:
    """Let a run be trained by one phase, its keys beside those of `PHASE`."""
    run.train_params_path.write_text(json.dumps({"0": [{**PHASE, **phase}]}))


def train_command(run: Run, launch: list[str]) -> list[str]:
    """The command that trains a run and writes its fields.

    Args:
        run: made by `make_run`.
        launch: what python is to run it with, such as torchrun's module.
    """
    train = [script("train.py"), "--pyramid_path", str(run.pyramid)]
    train += ["--dataset_path", str(run.folder / "dataset"), "--train_mode", "custom"]
    train += ["--train_params_path", str(run.train_params_path), "--device", "cpu"]
    return [sys.executable, *launch, *train]


def field_set(run: Run) -> Path:
    """The field set that a run writes."""
    return run.folder / "dataset" / f"field_0_x0_y0_z1_MIP0_{CHECKPOINT}.h5"
