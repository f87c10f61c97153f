"""How much memory does a training step take, beside the network's own?

For each template, with and without --checkpoint_activations, a fresh process each:
the peak of the bare network (forward and backward pass of one pair), and the peak of
the training of a stage on crops of the same size: reading, augmenting, losses, Adam.
Both are peaks of resident memory (VmHWM) above what the process had before. Then a
training of many steps on small crops: what it holds after 100 steps and at the end.

Example:
    python benchmarks/training_memory.py --side 2048 --steps 1000
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from metroem import cli
from metroem.aligner import Aligner
from metroem.data.dataset import Split, find_pairs
from metroem.grid import Grid
from metroem.io.h5 import ImageSetMeta, Pair, PairFrame, write_image_set
from metroem.scaffold import init_pyramid
from metroem.specs.pyramid import find_modules
from metroem.specs.schedule import load_schedule
from metroem.training import stage
from metroem.training.activations import checkpoint_activations
from metroem.training.checkpoint import RunFolder
from metroem.training.job import StageJob, TrainingSettings
from metroem.training.memory import keep_freed_memory
from metroem.training.stopping import StopRequest

TEMPLATES = ("correlation", "scalenet")
LONG_SIDE_PX, EARLY_STEPS = 96, 100
MIB = 2**20


@dataclass(frozen=True)
class MemoryRequest:
    """A call of this script, one field a flag."""

    side: int = 2048
    steps: int = 1000
    templates: tuple[str, ...] = TEMPLATES
    part: str | None = None
    checkpointed: bool = False


def main() -> None:
    """Run the benchmark; the last line is one JSON object."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--side", type=int, default=2048, help="of the crop, px (2048)")
    add("--steps", type=int, default=1000, help="of the long training (1000)")
    add("--templates", nargs="+", default=TEMPLATES, choices=TEMPLATES)
    add("--part", choices=("network", "training", "long"), help="one alone, here")
    add("--checkpointed", action="store_true", help="of that part")
    request = MemoryRequest(**vars(parser.parse_args()))
    if request.part is not None:
        print(json.dumps(measured(request, request.templates[0])))
        return
    figures = {name: figures_of(request, name) for name in request.templates}
    print(json.dumps({"side_px": request.side, "steps": request.steps, **figures}))


def figures_of(request: MemoryRequest, template: str) -> dict[str, float]:
    """All figures of one template, MiB and ratios, each from a process of its own."""
    found: dict[str, float] = {}
    for flag in ([], ["--checkpointed"]):
        end = "_checkpointed" if flag else ""
        network, training = (
            in_process(request, template, part, flag)["peak_mib"]
            for part in ("network", "training")
        )
        found |= {f"network_mib{end}": network, f"training_mib{end}": training}
        found[f"training_per_network{end}"] = training / network
    found |= in_process(request, template, "long", [])
    for name, value in found.items():
        print(f"{template} {name}: {value:.3f}", flush=True)
    return found


def in_process(
    request: MemoryRequest, template: str, part: str, more: list[str]
) -> dict[str, float]:
    """What one part measures in a fresh process."""
    sizes = ["--side", str(request.side), "--steps", str(request.steps)]
    command = [sys.executable, __file__, "--part", part, "--templates", template]
    done = subprocess.run(
        [*command, *sizes, *more], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measured(request: MemoryRequest, template: str) -> dict[str, float]:
    """Measure one part in this process."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if request.part == "long":
            return long_training(folder, template, request.steps)
        if request.part == "network":
            return {"peak_mib": peak_of_network(folder, template, request)}
        job, run = make_job(folder, template, request.side, 1)
        job = with_checkpoints(job) if request.checkpointed else job
        return {"peak_mib": peak_of_training(job, run)}


def peak_of_network(folder: Path, template: str, request: MemoryRequest) -> float:
    """Peak of forward and backward pass of a pair, MiB, with its gradients."""
    (module,) = init_pyramid(folder / "pyramid", [0], template)
    aligner = Aligner(module / "model", operators="corrected")
    if request.checkpointed:
        checkpoint_activations(aligner.net)
    before = reset_peak()
    pair = torch.randn(1, 2, request.side, request.side)
    aligner.net(x=pair, in_field=None).square().mean().backward()
    return peak() - before


def peak_of_training(job: StageJob, run: RunFolder) -> float:
    """Peak of the training of a stage, MiB, above what its network has."""
    with StopRequest(None) as stop:
        trainer = stage.StageTrainer(job, run, stop, None)
        before = reset_peak()
        trainer.train()
        return peak() - before


def long_training(folder: Path, template: str, steps: int) -> dict[str, float]:
    """Resident memory after the first steps and after all, MiB."""
    job, run = make_job(folder, template, LONG_SIDE_PX, steps)
    job = replace(job, phases=job.phases[:1])
    noted = []
    with StopRequest(None) as stop:
        trainer = stage.StageTrainer(job, run, stop, None)
        note = trainer._note

        def noting(*given: object) -> None:
            note(*given)  # type: ignore[arg-type]
            noted.append(status("VmRSS"))

        trainer._note = noting  # type: ignore[method-assign]
        trainer.train()
    early, late = noted[min(EARLY_STEPS, steps // 2) - 1], noted[-1]
    return {"early_mib": early, "late_mib": late, "late_per_early": late / early}


def make_job(
    folder: Path, template: str, side: int, steps: int
) -> tuple[StageJob, RunFolder]:
    """Pairs of noise, a fresh module, and the default schedule on crops of a side."""
    chance = np.random.default_rng(0)
    pairs = [
        Pair(*chance.standard_normal((2, side, side), np.float32)) for _ in range(2)
    ]
    frames = [PairFrame(Grid(0, 0, 0, side, side), (1 + z, z)) for z in range(2)]
    meta = ImageSetMeta(frames, "noise", "", {}, normalization={"kind": "tissue"})
    write_image_set(folder / "x0_y0_z1_MIP0.h5", pairs, meta)
    init_pyramid(folder / "pyramid", [0], template)
    (module,) = find_modules(folder / "pyramid")
    sizes = {"num_epochs": 1, "num_samples": steps, "crop_size": side, "batch_size": 1}
    phases = load_schedule("scratch", None).for_mip(0)
    refs = find_pairs(folder, 0, stage=0, checkpoint_name="ck")
    settings = TrainingSettings("ck", torch.device("cpu"), 0, None, 0, "fp32")
    run = RunFolder.of(folder / "pyramid", "ck")
    run.make()
    shortened = tuple(replace(phase, **sizes) for phase in phases)  # type: ignore
    return StageJob(module, shortened, Split(refs, []), settings), run


def with_checkpoints(job: StageJob) -> StageJob:
    """The job with --checkpoint_activations."""
    return replace(job, settings=replace(job.settings, checkpoints_activations=True))


def reset_peak() -> float:
    """Let the peak begin anew from what is resident now, MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> float:
    """Most memory that was resident since `reset_peak`, MiB."""
    return status("VmHWM")


def status(key: str) -> float:
    """A figure of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024 / MIB


if __name__ == "__main__":
    cli.run(main)
