"""Do bf16 and torch.compile train as well as float32 in eager mode?

Each template is trained for the same steps on the same sections that the program
makes, in each of the four ways, and its endpoint error on held-out known warps is
compared with that of float32 in eager mode.

Example:
    python benchmarks/precision.py --steps 300 --seeds 0 1 2
"""

import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metroem import cli
from metroem.demo import environment
from metroem.grid import Grid
from metroem.io.h5 import ImageSetMeta, Pair, PairFrame, write_image_set
from metroem.scaffold import init_pyramid
from metroem.tissue import TissueRecipe, make_tissue

TEMPLATES = ("correlation", "scalenet")
WAYS = {
    "fp32": [],
    "bf16": ["--precision", "bf16"],
    "compile": ["--compile"],
    "bf16+compile": ["--precision", "bf16", "--compile"],
}
ROOT = Path(__file__).parents[1]
BATCH, EPOCHS = 2, 4


@dataclass(frozen=True)
class PrecisionRequest:
    """A call of this script, one field a flag."""

    steps: int = 300
    side: int = 128
    crop: int = 96
    templates: tuple[str, ...] = TEMPLATES
    ways: tuple[str, ...] = tuple(WAYS)
    seeds: tuple[int, ...] = (0,)
    device: str = "cpu"
    jobs: int = 1


def main() -> None:
    """Run the benchmark; the last line is one JSON object."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=300, help="of each training (300)")
    add("--side", type=int, default=128, help="of a section, px (128)")
    add("--crop", type=int, default=96, help="of a sample, px (96)")
    add("--templates", nargs="+", choices=TEMPLATES, default=TEMPLATES)
    add("--ways", nargs="+", choices=WAYS, default=tuple(WAYS))
    add("--seeds", type=int, nargs="+", default=(0,), help="of trainings (0)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    add("--jobs", type=int, default=1, help="trainings at a time (1)")
    request = PrecisionRequest(**vars(parser.parse_args()))
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(request.jobs) as all:
        for template in request.templates:
            tasks = {
                way: [
                    all.submit(trained, Path(name), (template, way, seed), request)
                    for seed in request.seeds
                ]
                for way in request.ways
            }
            found[template] = {}
            for way, runs in tasks.items():
                errors = found[template][way] = [run.result() for run in runs]
                first = statistics.mean(next(iter(found[template].values())))
                mean = statistics.mean(errors)
                of_seeds = ", ".join(f"{epe:.4f}" for epe in errors)
                said = f"{mean:.4f} px ({of_seeds}), {mean / first:.4f}"
                print(f"{template} {way}: {said}", flush=True)
    print(json.dumps({"steps": request.steps, "epe_px": found}))


def write_sections(folder: Path, side: int) -> None:
    """An image set of pairs of made sections."""
    stack = make_tissue(TissueRecipe(13, side, side)).astype(np.float32)
    stack = (stack - stack.mean()) / stack.std()
    pairs = [Pair(*pair) for pair in zip(stack[1:], stack[:-1], strict=True)]
    frames = [PairFrame(Grid(0, 0, 0, side, side), (1 + z, z)) for z in range(12)]
    meta = ImageSetMeta(frames, "made", "", {}, normalization={"kind": "tissue"})
    folder.mkdir(parents=True)
    write_image_set(folder / "x0_y0_z1_MIP0.h5", pairs, meta)


def trained(
    folder: Path, which: tuple[str, str, int], request: PrecisionRequest
) -> float:
    """Endpoint error on held-out pairs after a training, px.

    Args:
        folder: for a folder of its own.
        which: template, way and seed.
        request: what all have in common.
    """
    template, way, seed = which
    folder = folder / f"{template}-{way}-{seed}"
    pyramid, schedule = folder / "pyramid", folder / "schedule.json"
    write_sections(folder / "data", request.side)
    schedule.write_text(json.dumps({"0": [phase_of(request)]}))
    init_pyramid(pyramid, [0], template)
    command = [sys.executable, str(ROOT / "train.py"), "--device", request.device]
    command += ["--pyramid_path", str(pyramid), "--dataset_path", str(folder / "data")]
    command += ["--train_mode", "custom", "--train_params_path", str(schedule)]
    command += ["--seed", str(seed), "--no_redirect_stdout", *WAYS[way]]
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    lines = (pyramid / ".train/checkpoint/metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["validation"]["epe_px"]


def phase_of(request: PrecisionRequest) -> dict[str, object]:
    """A phase of known warps that small networks learn from in minutes."""
    warp = {"type": "known_warp", "same": 1.0, "peak_px": 6, "shift_px": 4, "tear": 0}
    return {
        "lr": 1e-3,
        "num_epochs": EPOCHS,
        "num_samples": BATCH * request.steps // EPOCHS,
        "smoothness": 0,
        "crop_size": request.crop,
        "batch_size": BATCH,
        "lr_schedule": "cosine",
        "warmup_steps": request.steps // 20,
        "max_grad_norm": 1.0,
        "loss_spec": {"type": "known_warp"},
        "augmentations": [{"type": "random_flip"}, warp, {"type": "photometric"}],
    }


if __name__ == "__main__":
    cli.run(main)
