"""Write small files with an earlier commit of this project, for a test to read.

For each commit of `EARLIER`, in this project's environment:

    git worktree add --detach ../old-<sha> <sha>
    PYTHONPATH=../old-<sha> python tests/compatibility/make_earlier.py <sha>

A training is stopped after its first step, so that its state is one to go on from,
and the weights are those that it then has. Another gives the lines of an epoch. Of two
networks there are weights by formula, and the fields that the commit made of them.
"""

import inspect
import json
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import train
from metroem.aligner import Aligner
from metroem.grid import Grid
from metroem.io.h5 import (
    FieldSetMeta,
    ImageSetMeta,
    Pair,
    PairFrame,
    write_field_set,
    write_image_set,
)
from metroem.nets.checkpoint import checkpoint_path, save_weights
from metroem.scaffold import init_pyramid

# What each was the first, or the last, to write is said in docs/versions.md.
EARLIER = ("a702686", "8016db9", "2c41c25", "cd6cc5d", "8ed16c9", "4104529")
FIXTURES = Path(__file__).parent / "fixtures" / "earlier"
ROWS, COLS, PAIRS = 48, 64, 6
VECTORS = (1.5, -2.25)  # along cols, along rows: whole hundredths of a pixel


def section(z: int) -> np.ndarray:
    """(ROWS, COLS) float32: pixels by formula, in few distinct values; none is 0."""
    rows, cols = np.meshgrid(np.arange(ROWS), np.arange(COLS), indexing="ij")
    return ((rows + 2 * cols + 3 * z) % 7 / 4 - 0.8).astype(np.float32)


def small_network() -> dict:
    """A network of two levels, as the original has them, of a few weights."""

    def convolutions(*channels: int) -> dict:
        return {"type": "convblock", "arch_desc": {"fms": list(channels), "k": 3}}

    down = {
        "type": "warp_with_input_downmodule",
        "arch_desc": {"inner_module": convolutions(4, 2)},
    }
    ups = {
        str(level): {
            "type": "fm_range_apply",
            "fm_range": before,
            "module": convolutions(before, 2),
        }
        for level, before in enumerate((1, 2))
    }
    combine = {"type": "rollback_warp", "arch_desc": {"rollback": 0}}
    return {
        "type": "scalenet",
        "max_level": 2,
        "upmodules": ups,
        "downmodules": {"0": down, "1": down},
        "downlinks": {"all": {"type": "upsample_residuals"}},
        "combiners": {"all": combine},
    }


def correlation_network() -> dict:
    """A network that searches, of two levels and a few weights."""
    level = {"features": 2, "blocks": 1, "radius": [1], "hidden": 3, "dilations": [1]}
    return {"type": "correlation", "levels": [level, level]}


def write_sets(folder: Path) -> None:
    """Images at mip 1, a downloaded field, and one as written between stages."""
    frames = [
        PairFrame(Grid(1, 8, -4, ROWS, COLS), (5 + i, 4 + i)) for i in range(PAIRS)
    ]
    pairs = [Pair(section(5 + i), section(4 + i)) for i in range(PAIRS)]
    masks = {}
    if "defects" in inspect.signature(write_image_set).parameters:
        mask = np.zeros((ROWS, COLS), bool)
        mask[3:5, 7:12] = True
        masks = {"defects": [Pair(mask, mask[::-1])] * PAIRS}
    meta = ImageSetMeta(frames, "made", "", {}, normalization={"kind": "tissue"})
    write_image_set(folder / "x8_y-4_z5_MIP1_a.h5", pairs, meta, **masks)
    field = np.empty((2, ROWS, COLS), np.float32)
    field[0], field[1] = VECTORS
    for tag, sides in (("between", 1), ("down", 2)):
        meta = FieldSetMeta(frames, "made", "", {}, stage=0, tag=tag, num_sides=sides)
        fields = [field if sides == 1 else np.stack([field, -field])] * PAIRS
        write_field_set(folder / f"field_0_x8_y-4_z5_a_MIP1_{tag}.h5", fields, meta)


def arguments(folder: Path) -> list[str]:
    """Of the training, on one thread."""
    return [
        *("--pyramid_path", str(folder / "pyramid")),
        *("--dataset_path", str(folder / "data")),
        *("--train_mode", "custom"),
        *("--train_params_path", str(folder / "schedule.json")),
        *("--device", "cpu", "--checkpoint_name", "ck", "--val_pairs", "1"),
    ]


def train_one_step(folder: Path) -> None:
    """Leave a training that was stopped after its first step, and lines of another."""
    phase = {"lr": 1e-3, "num_epochs": 2, "smoothness": 5, "crop_size": 48}
    phases = [{**phase, "augmentations": [{"type": "random_transpose"}]}] * 2
    schedule = folder / "schedule.json"
    schedule.write_text(json.dumps({"1": phases}))
    twin = folder / "twin"
    for name in ("data", "pyramid"):
        shutil.copytree(folder / name, twin / name)
    shutil.copy(schedule, twin)
    train.main([*arguments(twin), "--max_epochs", "1"])
    shutil.copy(twin / "pyramid" / ".train" / "ck" / "metrics.jsonl", folder)
    shutil.rmtree(twin)
    train.main([*arguments(folder), "--max_minutes", "1e-9"])


def save_given_weights(folder: Path, spec: dict) -> None:
    """Keep weights called "given", and the field that the network makes of a pair.

    Each layer rises evenly from -0.1 to 0.1. Of the field there is each fourth pixel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_spec.json").write_text(json.dumps(spec))
    net = Aligner(folder, operators="corrected").net
    for weight in net.parameters():
        weight.data = torch.linspace(-0.1, 0.1, weight.numel()).reshape(weight.shape)
    save_weights(net, checkpoint_path(folder, "given"))
    np.save(folder / "given.npy", given_field(folder)[..., ::4, ::4])


def given_field(folder: Path) -> np.ndarray:
    """(2, ROWS, COLS) float32, pixels: of the weights "given" and the first pair."""
    aligner = Aligner(folder, checkpoint_name="given", operators="corrected")
    src, tgt = (torch.from_numpy(section(z))[None, None] for z in (5, 4))
    with torch.no_grad():
        return aligner.predict(src, tgt).field[0].numpy()


def main(commit: str) -> None:
    """Write the fixture of the commit that is imported."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "data").mkdir()
        write_sets(folder / "data")
        init_pyramid(folder / "pyramid", [1])
        (module,) = (folder / "pyramid").glob("0_*")
        spec = module / "model" / "model_spec.json"
        spec.write_text(json.dumps(small_network()))
        train_one_step(folder)
        save_given_weights(module / "model", small_network())
        if find_spec("metroem.nets.correlation") is not None:
            save_given_weights(folder / "correlation", correlation_network())
        # h5 files are mostly empty where they are so small.
        shutil.make_archive(str(FIXTURES / commit), "zip", folder)


if __name__ == "__main__":
    main(sys.argv[1])
