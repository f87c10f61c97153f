"""How much faster do two ranks write the fields of a stage than one?

A small pyramid is trained on sections made for it. Then its fields are written again
and again by one process and by two ranks in turn, both with one thread a rank and
both started before; whole commands are timed once. The sha256 of what is written is
compared, also after one of two ranks was killed by SIGKILL and the command given
again.

Example:
    python benchmarks/field_generation.py --pairs 12 --side_px 256
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np
import torch
from made_run import CHECKPOINT, field_set, make_run, train_command
from side_by_side import median_seconds, parser, report

from metroem import cli
from metroem.demo import Run, environment
from metroem.errors import MetroEMError
from metroem.specs.pyramid import find_modules
from metroem.training import distributed
from metroem.training.generate import FieldJob, generate_fields
from metroem.training.stopping import StopRequest

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
POLL_S = 0.01


def main() -> None:
    """Run the benchmark; the last line is one JSON object."""
    flags = parser(__doc__)
    flags.add_argument("--pairs", type=int, default=12, help="to make fields of (12)")
    flags.add_argument("--side_px", type=int, default=256, help="of a pair (256)")
    flags.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    request = flags.parse_args()
    if request.serve:
        serve(request.serve, request.threads)
        return
    folder = Path(tempfile.mkdtemp(prefix="metroem-generation-"))
    try:
        run = prepare(folder / "one", request.pairs, request.side_px)
        shutil.copytree(folder / "one", folder / "two")
        two = Run(folder / "two", *list(vars(run).values())[1:])
        run_benchmark(run, two, request)
    finally:
        shutil.rmtree(folder)


def run_benchmark(one: Run, two: Run, request: argparse.Namespace) -> None:
    """Time both, compare what they write; MetroEMError if it differs."""
    threads = ["--threads", str(request.threads)]
    with Server(one, threads, []) as first, Server(two, threads, TORCHRUN) as second:
        contenders = {"one rank": first, "two ranks": second}
        seconds = median_seconds(contenders, request.rounds)
        digests = first.digests | second.digests
    whole = [whole_command(one, []), whole_command(two, TORCHRUN)]
    digests |= {digest(one), digest(two)}
    after_kill = killed_and_resumed(two, seconds["two ranks"])
    digests.add(digest(two))
    report(
        seconds,
        {
            "speedup": seconds["one rank"] / seconds["two ranks"],
            "whole_seconds": whole,
            "whole_speedup": whole[0] / whole[1],
            "pairs": request.pairs,
            "kept_at_kill": after_kill,
            "sha256": sorted(digests),
        },
    )
    if len(digests) != 1:
        raise MetroEMError("the fields of the runs differ")


def prepare(folder: Path, pairs: int, side_px: int) -> Run:
    """A pyramid of one stage, trained a little, and no fields yet."""
    run = make_run(
        folder,
        pairs=pairs,
        side_px=side_px,
        phase={
            **{"lr": 1e-3, "num_epochs": 1, "num_samples": 20, "batch_size": 4},
            "crop_size": min(side_px // 2, 128),
        },
    )
    subprocess.run(train_command(run, []), check=True, env=environment())
    field_set(run).unlink()
    return run


def digest(run: Run) -> str:
    """sha256 of all arrays of the field set."""
    found = hashlib.sha256()
    with h5py.File(field_set(run)) as file:
        for key in sorted(file):
            found.update(np.ascontiguousarray(file[key]).tobytes())
    return found.hexdigest()


class Server:
    """Ranks that write the fields each time they are asked, started once."""

    def __init__(self, run: Run, flags: list[str], launch: list[str]) -> None:
        self.run = run
        self.digests: set[str] = set()
        command = [sys.executable, *launch, __file__, "--serve", str(run.folder)]
        self._process = subprocess.Popen(
            [*command, *flags], env=environment(), stdout=subprocess.DEVNULL
        )

    def __call__(self) -> None:
        self._ask("go")
        self.digests.add(digest(self.run))

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._ask("end")
        else:
            (self.run.folder / "end").touch()  # a kill would leave torchrun's ranks
        self._process.wait()

    def _ask(self, what: str) -> None:
        (self.run.folder / what).touch()
        while (self.run.folder / what).exists():
            if self._process.poll():
                raise MetroEMError("the ranks ended early; what they wrote is above")
            time.sleep(POLL_S)


def serve(folder: Path, threads: int) -> None:
    """Write the fields whenever a file "go" is there, until a file "end" is."""
    torch.set_num_threads(threads)
    (module,) = find_modules(folder / "pyramid")
    device = torch.device("cpu")
    job = FieldJob(
        module,
        module.in_mip,
        folder / "dataset",
        folder / "dataset",
        CHECKPOINT,
        device,
    )
    with distributed.process_group(device), StopRequest(None) as stop:
        while True:
            asked = wait_for_either(folder / "go", folder / "end")
            if asked.name == "go" and distributed.rank() == 0:
                for written in job.dataset.glob("field_*.h5"):
                    written.unlink()
            distributed.barrier()
            if asked.name == "go":
                generate_fields(job, stop)
            if distributed.rank() == 0:
                asked.unlink()
            distributed.barrier()
            if asked.name == "end":
                return


def wait_for_either(*files: Path) -> Path:
    """The first of some files to be there; the same on all ranks."""
    while True:
        for file in files:
            if file.exists():
                return file
        time.sleep(POLL_S)


def whole_command(run: Run, launch: list[str]) -> float:
    """Seconds of a whole command, imports and all."""
    field_set(run).unlink(missing_ok=True)
    start = time.perf_counter()
    subprocess.run(
        train_command(run, launch),
        check=True,
        stdout=subprocess.DEVNULL,
        env={**environment(), "OMP_NUM_THREADS": "1"},
    )
    return time.perf_counter() - start


def killed_and_resumed(run: Run, seconds: float) -> int:
    """Kill one of two ranks in the middle, give the command again; fields kept."""
    field_set(run).unlink(missing_ok=True)
    parts = field_set(run).with_name(f".{field_set(run).name}.parts")
    process = subprocess.Popen(
        train_command(run, TORCHRUN),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    while len(list(parts.glob("[0-9]*.h5"))) < 3:
        if process.poll() is not None:
            raise MetroEMError("the run ended before a rank was killed")
        time.sleep(POLL_S)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(int(ranks.split()[-1]), signal.SIGKILL)
    if process.wait(timeout=60 + seconds) == 0:
        raise MetroEMError("a run whose rank was killed ended as if all were well")
    kept = len(list(parts.glob("[0-9]*.h5")))
    again = train_command(run, TORCHRUN)
    subprocess.run(again, check=True, stdout=subprocess.DEVNULL, env=environment())
    return kept


if __name__ == "__main__":
    cli.run(main)
