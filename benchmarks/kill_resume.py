"""Does a training that is killed end with the bytes of one that is not?

A small pyramid is trained twice on the same sections: once undisturbed, once
killed by SIGKILL at random moments and started again with the same command. The
sha256 of each stage's final weights is printed for both.

Example:
    python benchmarks/kill_resume.py --kills 5
"""

import hashlib
import json
import logging
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from metroem import cli
from metroem.demo import DemoRequest, Run, environment, make_sections, run_steps
from metroem.errors import MetroEMError
from metroem.io.volume_write import write_volume
from metroem.report.scores import print_json

logger = logging.getLogger("metroem.benchmarks.kill_resume")

MIPS = (1, 0)
SIDE_PX = 128
PHASE = {"lr": 1e-3, "smoothness": 20, "crop_size": 64}
WARP = [{"type": "warp", "min_disp": -3, "max_disp": 3}, {"type": "random_transpose"}]
METRIC = {"type": "metric", "params": {"pre_align_sample": 8}}
SCHEDULE = {
    "0": [
        {**PHASE, "num_epochs": 16, "augmentations": WARP},
        {**PHASE, "num_epochs": 8, "loss_spec": METRIC},
    ]
}


@dataclass(frozen=True)
class KillRequest:
    """A call of this script, one field a flag."""

    kills: int = 5
    seed: int = 0


def main() -> None:
    """Run the benchmark; the last line is one JSON object."""
    parser = cli.parser(__doc__)
    parser.add_argument("--kills", type=int, default=5, help="how often (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    request = KillRequest(**vars(parser.parse_args()))
    folder = Path(tempfile.mkdtemp(prefix="metroem-kill-"))
    try:
        run_benchmark(request, folder)
    finally:
        shutil.rmtree(folder)


def run_benchmark(request: KillRequest, folder: Path) -> None:
    """Train twice and compare; MetroEMError if the weights differ."""
    calm = prepare(folder / "calm")
    killed = replace(calm, folder=folder / "killed")
    shutil.copytree(calm.folder, killed.folder)
    (undisturbed,) = run_steps([calm.commands()[2]])
    train_killed(killed, request, undisturbed)
    digests = [weight_digests(run) for run in (calm, killed)]
    print_json({"kills": request.kills, "calm": digests[0], "killed": digests[1]})
    if digests[0] != digests[1]:
        raise MetroEMError("the weights of the two runs differ")


def prepare(folder: Path) -> Run:
    """Sections, image sets and an untrained pyramid."""
    sections = make_sections(DemoRequest(folder, 10, SIDE_PX, SIDE_PX, 1))
    schedule = folder / "schedule.json"
    run = Run(folder, range(8), (0, 0), SIDE_PX, MIPS, schedule)
    images = np.stack([section.image for section in sections])
    write_volume(run.volume, images, max(MIPS) + 1)
    schedule.write_text(json.dumps(SCHEDULE))
    run_steps(run.commands()[:2])
    return run


def train_killed(run: Run, request: KillRequest, undisturbed: float) -> None:
    """Kill the training at random moments, then let it end."""
    chance = random.Random(request.seed)
    command = run.commands()[2]
    for kill in range(request.kills):
        process = subprocess.Popen(
            [sys.executable, *command], env=environment(), stdout=subprocess.DEVNULL
        )
        seconds = undisturbed * chance.uniform(0.15, 0.35)
        time.sleep(seconds)
        if process.poll() is not None:
            raise MetroEMError(f"the training ended before kill {kill + 1}")
        process.kill()
        process.wait()
        logger.info(
            "killed for the %d. time, %.1f s after its start", kill + 1, seconds
        )
    run_steps([command])


def weight_digests(run: Run) -> dict[str, str]:
    """sha256 of each module's checkpoint and of the last weights of each stage."""
    files = [
        *sorted(run.pyramid.glob("*/model/*.state.pth.tar")),
        *sorted(run.pyramid.glob(".train/*/*_last.state.pth.tar")),
    ]
    return {
        str(path.relative_to(run.pyramid)): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in files
    }


if __name__ == "__main__":
    cli.run(main)
