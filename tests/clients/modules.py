"""Small trained pyramids and stacks for the clients of modules."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train
from metroem.geometry.field import warp
from metroem.models.module_folders import init_pyramid
from tests.models.specs import CORRELATION, write_spec
from tests.pairs import SHIFT_PX, texture, write_pairs

_PHASE = {
    "lr": 2e-3,
    "num_epochs": 6,
    "num_samples": 32,
    "smoothness": 5,
    "crop_size": 64,
    "batch_size": 4,
}
# Pairs that all lie SHIFT_PX apart are learned by heart, which is all that is needed
# here. A client's chunks have no data around the volume.
_SCHEDULES = {
    "correlation": {
        **_PHASE,
        "smoothness": 0,
        "loss_spec": {"type": "known_warp"},
        "augmentations": [
            {"type": "known_warp", "peak_px": 3, "shift_px": 3, "tear": 0, "same": 1},
            {"type": "missing"},
        ],
    },
    "scalenet": _PHASE,
}


def trained_module(folder: Path, template: str) -> Path:
    """A module at mip 0 that finds shifts of some pixels."""
    write_pairs(folder / "data", mips=(0,), num_pairs=4, shape=(192, 256))
    (module,) = init_pyramid(folder / "pyramid", (0,), template)
    if template == "correlation":
        write_spec(module / "model", CORRELATION)
    (folder / "schedule.json").write_text(json.dumps({"0": [_SCHEDULES[template]]}))
    train.main(
        [
            *("--pyramid_path", str(folder / "pyramid")),
            *("--dataset_path", str(folder / "data")),
            *("--train_mode", "custom"),
            *("--train_params_path", str(folder / "schedule.json")),
            *("--device", "cpu", "--val_pairs", "1"),
        ]
    )
    return module


def pyramid_of(path: Path, module: Path, mips: tuple[int, ...]) -> Path:
    """A pyramid whose modules all have the weights of one."""
    for stage in init_pyramid(path, mips, "correlation"):
        shutil.copytree(module / "model", stage / "model", dirs_exist_ok=True)
    return path


def shifted_stack(
    num_sections: int, rows: int, cols: int, *, grain: int = 1
) -> np.ndarray:
    """Sections, each SHIFT_PX along cols from the one before, as in the pairs.

    Args:
        num_sections: how many.
        rows: of a section; a multiple of 4 * grain.
        cols: likewise.
        grain: the texture is so many times as coarse as that of the pairs.

    Returns:
        (num_sections, rows, cols) uint8; the field that warps a section onto the
        one before is SHIFT_PX along cols.
    """
    image = texture(rows // grain, cols // grain, seed=0)
    image = F.interpolate(image, size=(rows, cols), mode="bilinear")
    field = torch.zeros(num_sections, 2, rows, cols)
    field[:, 0] = -SHIFT_PX * torch.arange(float(num_sections)).view(-1, 1, 1)
    image = image.expand(num_sections, -1, -1, -1)
    return warp(image, field, padding="border")[:, 0].byte().numpy()
