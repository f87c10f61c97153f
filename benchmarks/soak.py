"""Does a long training keep its memory and its files?

train.py trains a tiny network on tiny sections for many steps, in a process that is
looked at from outside: resident memory and open file handles. After a warm-up a line
is fitted to the memory, whose slope is the figure, and no handle may have been added.

Example:
    python benchmarks/soak.py --steps 20000
"""

import argparse
import json
import logging
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from made_run import make_run, train_command
from scipy.stats import theilslopes

from metroem import cli
from metroem.demo import Run, environment
from metroem.errors import MetroEMError
from metroem.report.scores import print_json
from metroem.training.checkpoint import RunFolder

logger = logging.getLogger("metroem.benchmarks.soak")

PAIRS, SIDE_PX, CROP_PX = 6, 64, 32
EPOCH_STEPS = 100
# The smallest network that trains: one level that is searched.
LEVEL = {"features": 2, "blocks": 0, "radius": [1], "hidden": 2, "dilations": [1]}
NET = {"type": "correlation", "levels": [LEVEL]}
LOG_EVERY_S = 30.0
# Of the slope, KiB in 1,000 steps: 20,000 steps then add less than 1 MiB.
FLAT_KIB = 50.0


class Look(NamedTuple):
    """What the process had at one moment."""

    steps: int  # done, in whole epochs
    rss_kib: int  # resident memory
    handles: int  # open files, pipes and sockets


def main() -> None:
    """Run the benchmark; the last line is one JSON object."""
    parser = cli.parser(__doc__)
    parser.add_argument("--steps", type=int, default=20_000, help="of training (20000)")
    warm_up = "share of the steps that does not count (0.2)"
    parser.add_argument("--warm_up", type=float, default=0.2, help=warm_up)
    workers = "processes that read beside it (0)"
    parser.add_argument("--num_workers", type=int, default=0, help=workers)
    request = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="metroem-soak-"))
    try:
        run_benchmark(request, folder)
    finally:
        shutil.rmtree(folder)


def run_benchmark(request: argparse.Namespace, folder: Path) -> None:
    """Train and look; MetroEMError if memory grows or a handle is left open."""
    started = time.monotonic()
    looks = watched(prepare(folder, request.steps), request.num_workers)
    counted = [look for look in looks if look.steps >= request.warm_up * request.steps]
    if len(counted) < 3 or looks[-1].steps < request.steps - 2 * EPOCH_STEPS:
        raise MetroEMError(
            f"{len(counted)} looks after the warm-up, the last at step "
            f"{looks[-1].steps if looks else 0}: too few; give more --steps"
        )
    steps, kib, handles = (np.array(column) for column in zip(*counted, strict=True))
    # The median of the slopes between all points: a few far off do not count.
    slope = float(theilslopes(kib, steps).slope) * 1000
    figures = {
        "steps": request.steps,
        "looks": len(counted),
        "seconds": round(time.monotonic() - started, 1),
        "rss_mib": [round(kib[end] / 1024, 2) for end in (0, -1)],
        "rss_mib_most": round(kib.max() / 1024, 2),
        "slope_kib_per_1000_steps": round(slope, 2),
        "handles": [int(handles.min()), int(handles.max())],
        "handles_added": int(np.median(handles[-3:]) - np.median(handles[:3])),
    }
    print_json(figures)
    if slope > FLAT_KIB:
        raise MetroEMError(f"memory grows by {slope:.1f} KiB in 1,000 steps")
    if figures["handles_added"] > 0:
        raise MetroEMError(f"{figures['handles_added']} handles were left open")


def prepare(folder: Path, steps: int) -> Run:
    """Pairs, a pyramid of one tiny module, and a schedule of so many steps."""
    epochs = {"num_epochs": -(-steps // EPOCH_STEPS), "num_samples": EPOCH_STEPS}
    phase = {"lr": 1e-4, "batch_size": 1, "crop_size": CROP_PX, **epochs}
    run = make_run(folder, pairs=PAIRS, side_px=SIDE_PX, phase=phase)
    (module,) = run.pyramid.glob("0_*")
    (module / "model" / "model_spec.json").write_text(json.dumps(NET))
    return run


def watched(run: Run, num_workers: int) -> list[Look]:
    """Train a run; what its process had at the end of each epoch."""
    command = [*train_command(run, []), "--num_workers", str(num_workers)]
    looks: list[Look] = []
    told = time.monotonic()
    with (run.folder / "train.log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**environment(), "OMP_NUM_THREADS": "1"},
        )
    try:
        while process.poll() is None:
            time.sleep(0.2)
            look = look_at(process.pid, run)
            if look is not None and (not looks or look.steps > looks[-1].steps):
                looks.append(look)
            if looks and time.monotonic() - told > LOG_EVERY_S:
                told = time.monotonic()
                logger.info("step %d: %d KiB, %d handles", *looks[-1])
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        tail = (run.folder / "train.log").read_text()[-2000:]
        raise MetroEMError(f"the training ended with {process.returncode}:\n{tail}")
    return looks


def look_at(pid: int, run: Run) -> Look | None:
    """What a process has now; None when it has ended or trains no more."""
    metrics = RunFolder.of(run.pyramid, "checkpoint").metrics
    if not metrics.is_file():
        return None
    epochs = metrics.read_bytes().count(b"\n")
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        handles = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return None
    resident = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    if not resident:  # it is ending
        return None
    return Look(epochs * EPOCH_STEPS, int(resident[0].split()[1]), handles)


if __name__ == "__main__":
    cli.run(main)
