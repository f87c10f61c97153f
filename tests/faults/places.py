"""Make folders that commands run in, and check that their files are complete."""

import hashlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from metroem.io.h5 import verify
from metroem.models.module_folders import init_pyramid
from tests.models.specs import scalenet, write_spec
from tests.pairs import write_pairs
from tests.prepare.make_dataset.conftest import OFFSET, PAIRS, SHAPE
from tests.volumes import make_volume

# (fault, command) -> how often tried, how often survived.
TRIED: dict[tuple[str, str], list[int]] = {}
TRAIN = ("--train_mode", "custom", "--train_params_path", "schedule.json")
TRAIN = ("train.py", *TRAIN, "--dataset_path", "data", "--device", "cpu")
TRAIN = (*TRAIN, "--checkpoint_name", "ck", "--val_pairs", "1")
PHASE = {"lr": 1e-3, "num_epochs": 3, "smoothness": 5, "crop_size": 32}


@contextmanager
def counted(fault, command, times=1):
    """Count a fault as tried, and as survived if nothing is raised."""
    counts = TRIED.setdefault((fault, command), [0, 0])
    counts[0] += times
    yield
    counts[1] += times


@dataclass
class Calm:
    """An undisturbed run of a command."""

    command: list[str]
    start: Path  # folder that it starts from
    seconds: float
    contents: dict[str, str]
    end: Path  # folder that it left


@dataclass
class Place:
    """Where runs are made.

    Attributes:
        folder: of all of them.
        calm: undisturbed runs, by name.
    """

    folder: Path
    calm: dict[str, Calm]
    _number: int = 0

    def fresh(self, name):
        """Make a new folder with the inputs of a command."""
        self._number += 1
        folder = self.folder / f"run{self._number}"
        shutil.copytree(self.calm[name].start, folder)
        return folder


def make_place(zygote, folder):
    """Make volumes, pairs and a pyramid, and run each command once."""
    place = Place(folder, {})
    starts = {name: folder / name for name in ("empty", "untrained", "trained")}
    starts["empty"].mkdir()
    commands = _downloads(folder)
    begin = starts["untrained"]
    write_pairs(begin / "data", mips=(2, 1), num_pairs=4, shape=(96, 128))
    for name, mips in (("one", [2]), ("two", [2, 1])):
        for module in init_pyramid(begin / name, mips, "scalenet"):
            write_spec(module / "model", scalenet(4, 6))
    warp = {"type": "warp", "min_disp": -3, "max_disp": 3}
    phases = [{**PHASE, "augmentations": [warp]}, {**PHASE, "num_epochs": 2}]
    (begin / "schedule.json").write_text(json.dumps({"1": phases}))
    commands["training"] = [*TRAIN, "--pyramid_path", "one"]
    commands["generation"] = [*TRAIN, "--pyramid_path", "two"]
    evaluate = "metroem evaluate --pyramid_path two --checkpoint_name ck --no_finetune"
    commands["evaluate"] = f"{evaluate} --dataset_path large --json out.json".split()
    for name, command in commands.items():
        start = starts["untrained" if name == "training" else "empty"]
        if name in ("generation", "evaluate"):
            start = starts["trained"]
        if name == "generation":
            shutil.copytree(begin, start)
            done = zygote.run(start, command)
            assert done["status"] == 0, done["output"]
            for path in start.glob("data/field_*"):
                path.unlink()
            write_pairs(start / "large", mips=(2, 1), num_pairs=2, shape=(192, 256))
        run = folder / f"calm-{name}"
        shutil.copytree(start, run)
        done = zygote.run(run, command)
        assert done["status"] == 0, done["output"]
        place.calm[name] = Calm(command, start, done["seconds"], contents(run), run)
    return place


def _downloads(folder):
    """Make volumes, and the commands that read them."""
    random = np.random.default_rng(0)
    images = random.integers(1, 255, (10, 1, 512, 448), dtype=np.uint8)
    em = make_volume(folder / "em", [images, images[..., ::2, ::2]], chunk=(64, 64, 1))
    vectors = random.random((10, 2, 128, 112), dtype=np.float32) * 4 + 30
    finer = np.zeros((10, 2, 512, 448), np.float32)
    field = make_volume(folder / "fields", [finer, None, vectors], chunk=(64, 64, 1))
    common = "--z_start 1 --z_end 9 --dst_folder out".split()
    images_of = "--mip 1 0 --patch_size 160 320 --normalize".split()
    fields_of = "--src_mip 2 --dst_mip 1 --patch_size 160 --suffix ck".split()
    spec = _spec(folder)
    return {
        "download_image": ["download_image.py", "--cv_path", em, *common, *images_of],
        "download_field": ["download_field.py", "--cv_path", field, *common]
        + fields_of,
        "make-dataset": ["metroem", "make-dataset", "--spec_path", spec]
        + ["--dst_path", "out"],
    }


def _spec(folder):
    """Make a spec of pairs with fields, masks and a reference."""
    random = np.random.default_rng(1)
    sections = random.integers(1, 255, SHAPE, dtype=np.uint8)
    coarse = sections[..., ::2, ::2]
    image = make_volume(folder / "points", [sections, coarse], offset=OFFSET)
    vectors = random.random((SHAPE[0], 2, *SHAPE[2:]), dtype=np.float32)
    field = make_volume(folder / "pfield", [vectors + 8], offset=OFFSET)
    marked = (random.random(SHAPE) < 0.02).astype(np.uint8)
    mask = make_volume(folder / "pmask", [marked], offset=OFFSET)
    reference = {"path": image, "src_mip": 0, "dst_mip": 1, "x_size": 32, "y_size": 28}
    moves = [(dx, dy) for dx in (0, 4, -8) for dy in (0, 4)]
    pairs = [
        [{"x": x + dx, "y": y + dy, "z": z} for x, y, z in pair]
        for pair in PAIRS
        for dx, dy in moves
    ]
    spec = {
        "image": {"path": image, "src_mip": 0, "reference": reference},
        "field": {"path": field, "src_mip": 0},
        "masks": [{"path": mask, "src_mip": 0, "threshold": 1}],
        **{"max_mip": 2, "dst_mip": 0, "x_size": 48, "y_size": 32, "pairs": pairs},
    }
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    return str(path)


def interrupted(zygote, place, name, number, share, **more):
    """Run a command and send a signal after a fraction of its usual time.

    Returns:
        Its folder, and how it ended. On a machine that is faster by now than it was,
        runs are done before; then another one is sent its signal earlier.
    """
    calm, seconds = place.calm[name], place.calm[name].seconds
    for _ in range(8):
        folder = place.fresh(name)
        after = share * seconds
        asked = {"command": calm.command, "signal": number, "after": after} | more
        done = zygote.run(folder, **asked)
        if done["status"] != 0:
            return folder, done
        seconds = 0.8 * min(seconds, done["seconds"])
    raise AssertionError(f"{name}: always done before its signal")


def visible(folder):
    """List files with their final name, including files of .train."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") and part != ".train" for part in parts)
        if path.is_file() and not hidden:
            yield path


def contents(folder, but=()):
    """Read the content that runs must agree in: h5 datasets and attributes, else bytes.

    Logs and metrics have times in them.

    Args:
        folder: of the run.
        but: attributes that may differ.
    """
    return {
        str(path.relative_to(folder)): _digest(path, but)
        for path in visible(folder)
        if path.suffix not in (".log", ".jsonl")
    }


def _digest(path, but):
    sha = hashlib.sha256()
    if path.suffix != ".h5":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with h5py.File(path) as file:
        for key in sorted(file):
            sha.update(f"{key} {file[key].dtype} {file[key].shape}".encode())
            sha.update(file[key][()].tobytes())
        for key in sorted(set(file.attrs) - set(but)):
            sha.update(f"{key} {file.attrs[key]!r}".encode())
    return sha.hexdigest()


def agree(folder, calm):
    """Whether a run with other flags made the same as an undisturbed one."""
    return contents(folder, ["command"]) == contents(calm.end, ["command"])


def check_whole(folder):
    """Check that every file with a final name is complete."""
    for path in visible(folder):
        if path.suffix == ".h5":
            assert verify(path) == [], path
            with h5py.File(path) as file:
                assert {"box", "checksum"} <= set(file) and "request" in file.attrs
        elif path.suffix in (".tar", ".pt"):
            assert torch.load(path, weights_only=True), path
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                json.loads(line)


def left_over(folder):
    """List hidden files and folders that a run should have removed."""
    kept = (".train", ".evaluate")
    hidden = [p for p in folder.rglob(".*") if p.name not in kept]
    return sorted(str(p.relative_to(folder)) for p in hidden)
