r"""Train the weights that come with the package, and write them into it.

Real sections whose licence allows it, and artificial tissue, are resampled to several
pixel sizes and written as CloudVolumes. download-image, init and train are run on them
as by a user. A copy of the networks is then trained on, with pseudo-labels that the
networks make of clean pairs in any orientation: it learns their mean. A copy of that
copy is trained on in the same way. Its weights of both stages are stored, in half
precision, in `metroem/models/pretrained`. docs/pretrained.md is their model card.

Sections that the benchmarks score are left out: 50 and later of `fib25_a.npy`, 0 to 40
of `atum_cortex_a.npy`, and all other stacks.

Example:
    python benchmarks/pretrain.py --data ../shared/data --out pretrain
"""

import argparse
import io
import logging
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from metroem.demo import run_steps
from metroem.errors import UsageError
from metroem.evaluation.tables import print_json
from metroem.io.files import make_folder, replace_file
from metroem.io.volume_write import write_volume
from metroem.models.requests import PRETRAINED
from metroem.models.weights import checkpoint_path
from metroem.specs.modules import find_modules
from metroem.synthetic.tissue import SmoothNoise, TissueRecipe, make_tissue
from metroem.utils import cli

logger = logging.getLogger("metroem.benchmarks.pretrain")

PARTS = ("data", "train", "distil", "weights")
MIPS = (2, 0)
SCHEDULE = Path(__file__).with_name("pretrain.json")
DISTIL_SCHEDULE = Path(__file__).with_name("pretrain_distil.json")
# A pyramid, and the copies of it that are trained one after the other.
PYRAMIDS = ("pyramid", "distilled_1", "distilled_2")


@dataclass(frozen=True)
class Tissue:
    """Sections to train on.

    Attributes:
        name: "synthetic": made by `make_tissue`; "spots": by `make_spots`.
        file: their .npy file, uint8 [section, rows, cols]; None if they are made.
        sections: first, and one past the last.
        nm: size of a pixel.
        wanted_nm: pixel sizes to resample it to.
    """

    name: str
    file: str | None
    sections: tuple[int, int]
    nm: float
    wanted_nm: tuple[int, ...]


TISSUES = (
    Tissue("fib25", "fib25_a.npy", (0, 45), 10, (5, 8, 10, 16)),
    Tissue("atum", "atum_cortex_a.npy", (46, 90), 24, (12, 18, 24, 32)),
    Tissue("synthetic", None, (0, 24), 11, (6, 11)),
    Tissue("spots", None, (0, 24), 100, (60, 100, 140)),
)


def main() -> None:
    """Do the parts; the last line printed is one JSON object."""
    parser = cli.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the stacks")
    parser.add_argument("--out", type=Path, required=True, help="folder for all files")
    parser.add_argument("--seed", type=int, default=0, help="of the training (0)")
    help_text = "parts to do (all); earlier ones are read from --out"
    parser.add_argument("--parts", nargs="+", choices=PARTS, help=help_text)
    flags = parser.parse_args()
    parts = [part for part in PARTS if flags.parts is None or part in flags.parts]
    figures: dict[str, object] = {"parts": parts}
    if "data" in parts:
        figures["pairs"] = make_data(flags)
    if "train" in parts:
        init = ["init", "--pyramid_path", str(flags.out / "pyramid")]
        init += ["--mip", *map(str, MIPS)]
        figures["seconds"] = train(flags, init, PYRAMIDS[0], SCHEDULE)
    if "distil" in parts:
        took = []
        for teacher, copy in pairwise(PYRAMIDS):
            fetch = ["fetch", str(flags.out / teacher)]
            fetch += ["--pyramid_path", str(flags.out / copy)]
            took.append(train(flags, fetch, copy, DISTIL_SCHEDULE))
        figures["seconds_distil"] = took
    if "weights" in parts:
        figures["bytes"] = store_weights(flags)
    print_json(figures)


def make_data(flags: argparse.Namespace) -> int:
    """Write a volume for each tissue and pixel size, and its image sets."""
    (flags.out / "volumes").mkdir(parents=True, exist_ok=True)
    num_pairs = 0
    for tissue in TISSUES:
        sections = read_sections(tissue, flags.data)
        for index, nm in enumerate(tissue.wanted_nm):
            resized = resize(sections, tissue.nm / nm)
            side = min(resized.shape[1:]) >> max(MIPS) << max(MIPS)
            # One patch a pixel size, at the first or the last columns in turn.
            left = (resized.shape[2] - side) >> max(MIPS) << max(MIPS)
            volume = flags.out / "volumes" / f"{tissue.name}_{nm}nm"
            write_volume(volume, resized, max(MIPS) + 1, resolution=(nm, nm, 40))
            command = ["download-image", "--cv_path", str(volume), "--normalize"]
            command += ["--dst_folder", str(flags.out / "dataset")]
            command += ["--mip", *map(str, MIPS), "--suffix", volume.name]
            command += ["--patch_size", *(str(side >> mip) for mip in MIPS)]
            command += ["--y_offset", str(left if index % 2 else 0)]
            command += ["--z_start", "1", "--z_end", str(len(resized))]
            run_steps([command])
            num_pairs += len(resized) - 1
    return num_pairs


def read_sections(tissue: Tissue, folder: Path) -> np.ndarray:
    """Read or make the sections of a tissue, (n, H, W) uint8 without 0."""
    first, end = tissue.sections
    if tissue.name == "spots":
        return make_spots(end - first, 640, seed=2)
    if tissue.name == "synthetic":
        return make_tissue(TissueRecipe(end - first, 640, 640, seed=1))
    assert tissue.file is not None
    path = folder / tissue.file
    if not path.is_file():
        raise UsageError(f"--data {folder}: expected {tissue.file} in it")
    # All pixels of these stacks are tissue, and 0 means no data.
    return np.maximum(np.load(path, mmap_mode="r")[first:end], 1)


def make_spots(num_sections: int, side: int, seed: int) -> np.ndarray:
    """Make sections as light microscopes show them: bright spots in haze.

    Spots are blurred points in a volume, more of them in some places than in others.
    Most are in two or three sections. Grain is drawn anew for each section.

    Returns:
        (num_sections, side, side) uint8 without 0.
    """
    rng = np.random.default_rng(seed)
    count = num_sections * side**2 // 40
    noise = SmoothNoise(rng, (num_sections, side, side), (4.0, 48.0))
    density = np.stack([noise.section(section) for section in range(num_sections)])
    z = rng.uniform(-1, num_sections, count)
    rows, cols = rng.integers(0, side, (2, count))
    nearest = np.clip(z.round().astype(int), 0, num_sections - 1)
    chance = np.exp(np.clip(density[nearest, rows, cols], -2, 1.5) - 2)
    kept = rng.random(count) < chance
    z, rows, cols = z[kept], rows[kept], cols[kept]
    thickness = rng.uniform(0.4, 1.0, len(z))  # deviation, sections
    bright = rng.lognormal(0, 0.7, len(z))
    size = rng.integers(0, 3, len(z))  # of three
    sections = np.empty((num_sections, side, side), np.uint8)
    for section in range(num_sections):
        light = np.zeros((side, side))
        seen = bright * np.exp(-(((z - section) / thickness) ** 2) / 2)
        for index, sigma in enumerate((1.2, 1.8, 2.6)):
            points = np.zeros((side, side))
            of_size = size == index
            np.add.at(points, (rows[of_size], cols[of_size]), seen[of_size])
            light += sigma * ndimage.gaussian_filter(points, sigma) * 500
        light += 2 * ndimage.gaussian_filter(light, 20)
        # A camera's curve: bright spots are not a hundred times as bright as haze.
        grey = 60 + 195 * (1 - np.exp(-light / 250)) + rng.normal(0, 6, light.shape)
        sections[section] = np.clip(grey, 1, 255)
    return sections


def resize(sections: np.ndarray, scale: float) -> np.ndarray:
    """Resample sections, (n, H, W) uint8, by a factor; 1 is the lowest grey level."""
    if scale == 1:
        return sections
    size = [round(px * scale) for px in sections.shape[1:]]
    values = torch.from_numpy(sections.astype(np.float32))[:, None]
    resized = F.interpolate(values, size, mode="bicubic", antialias=True)[:, 0]
    return resized.round().clamp(1, 255).to(torch.uint8).numpy()


def train(
    flags: argparse.Namespace, make: list[str], name: str, schedule: Path
) -> float:
    """Make a pyramid by a command, and train it; the seconds of the training."""
    training = ["train", "--pyramid_path", str(flags.out / name), "--val_pairs", "0"]
    training += ["--dataset_path", str(flags.out / "dataset")]
    training += ["--fields_path", str(flags.out / f"{name}_fields")]
    training += ["--train_mode", "custom", "--train_params_path", str(schedule)]
    training += ["--generate_field_stages", "0", "--seed", str(flags.seed)]
    return run_steps([make, training])[1]


def store_weights(flags: argparse.Namespace) -> int:
    """Store the weights of all modules in half precision; their size in bytes."""
    make_folder(PRETRAINED)
    num_bytes = 0
    for module in find_modules(flags.out / PYRAMIDS[-1]):
        state = torch.load(
            checkpoint_path(module.weights_folder, "checkpoint"), weights_only=True
        )
        half = {
            key: value.half() if value.is_floating_point() else value
            for key, value in state.items()
        }
        path = checkpoint_path(PRETRAINED, f"stage{module.stage}")
        buffer = io.BytesIO()  # equal weights give equal bytes
        torch.save(half, buffer)
        replace_file(path, buffer.getbuffer())
        num_bytes += path.stat().st_size
        logger.info("wrote %s", path)
    return num_bytes


if __name__ == "__main__":
    cli.run(main)
