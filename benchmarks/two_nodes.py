"""Does a run on two nodes, of which one is killed, end with the weights of a calm one?

Two network namespaces of this machine are the nodes, joined by a virtual cable; each
has a torchrun agent and two gloo ranks, and they share the disk. While they train,
the agent and the ranks of the second node get SIGKILL; it is started again. A calm
run of one process, with the same batch size, says which weights and fields are right.
Needs Linux, root, and `ip` (iproute2).

Example:
    python benchmarks/two_nodes.py
"""

import argparse
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch
from made_run import field_set, make_run, train_command, write_schedule

from metroem import cli
from metroem.demo import Run, environment
from metroem.errors import MetroEMError, UsageError
from metroem.report.scores import print_json

logger = logging.getLogger("metroem.benchmarks.two_nodes")

BATCH = 4
STEPS = 4
LEARNING_SAMPLES = 400
# So small since Adam turns the rounding of a gradient near 0 into a step of up to
# the whole rate: weights may come apart by twice the rate a step.
RATE = 1e-6
# Names of their own, so that two of these may run; an interface has 15 letters.
NODES = tuple(f"metroem-{os.getpid()}-{end}" for end in "ab")
INTERFACES = tuple(f"mem{os.getpid() % 10**7}{end}" for end in "ab")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29517
# Half of the weights are apart by their rounding at the most; other samples would
# move them apart by about the rate a step.
WEIGHTS_APART, HALF_APART = 1e-5, 1e-7
# Of values in a file, with its rounding.
STEP_PX = 0.0101
# Files below a pyramid: those of the best epoch write the fields.
WEIGHTS = {
    "last": ".train/checkpoint/stage_0_last.state.pth.tar",
    "best": "0_*/model/checkpoint.state.pth.tar",
}
LIMIT_S = 600


def main() -> None:
    """Run the benchmark; the last line is one JSON object."""
    parser = cli.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=10, help="of sections (10)")
    parser.add_argument("--side_px", type=int, default=128, help="of a pair (128)")
    parser.add_argument("--epochs", type=int, default=6, help="of training (6)")
    request = parser.parse_args()
    if missing := why_not():
        raise UsageError(missing)
    folder = Path(tempfile.mkdtemp(prefix="metroem-nodes-"))
    try:
        run_benchmark(request, folder)
    finally:
        shutil.rmtree(folder)


def why_not() -> str | None:
    """What this machine lacks for network namespaces; None if it has them."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "no `ip` here; install iproute2"
    made = subprocess.run(["ip", "netns", "add", NODES[0]], capture_output=True)
    subprocess.run(["ip", "netns", "del", NODES[0]], capture_output=True)
    if made.returncode:
        return f"network namespaces are not permitted: {made.stderr.decode().strip()}"
    return None


def run_benchmark(request: argparse.Namespace, folder: Path) -> None:
    """Train calm and on two nodes; MetroEMError if what they made is apart.

    Last and best weights are compared with those of the calm run, and the fields with
    those that one process makes of the nodes' weights: they must be equal. How far
    they are from the calm run's is printed alone: the finetuner makes up to 0.1 px of
    weights that are 2e-8 apart, and a file's steps of 0.01 px begin at its lowest
    value, so that nearly all values are apart by less than a step.
    """
    calm = prepare(folder / "calm", request)
    nodes = replace(calm, folder=folder / "nodes")
    shutil.copytree(calm.folder, nodes.folder)
    calm_command = train_command(calm, [])
    subprocess.run(calm_command, check=True, env=environment())
    kills = train_on_nodes(nodes, request.epochs)
    apart = {which: weights_apart(calm, nodes, which) for which in WEIGHTS}
    fields, alone = fields_apart(calm, nodes), made_alone(nodes, folder / "alone")
    again = fields_apart(alone, nodes)["largest"]
    print_json(
        {
            **{f"{which}_weights_apart": figures for which, figures in apart.items()},
            **{"fields_apart_px": fields, "fields_of_one_process_apart_px": again},
            **kills,
        }
    )
    for which, weights in apart.items():
        if weights["largest"] > WEIGHTS_APART or weights["median"] > HALF_APART:
            raise MetroEMError(f"the two runs made different {which} weights")
    if again > 0:
        raise MetroEMError("of the nodes' weights one process makes different fields")
    if not kills["killed_at_epoch"] < request.epochs:
        raise MetroEMError("the node was killed after the training had ended")


def made_alone(nodes: Run, folder: Path) -> Run:
    """The fields that one process makes of the weights that two nodes trained."""
    alone = replace(nodes, folder=folder)
    shutil.copytree(nodes.folder, folder)
    field_set(alone).unlink()
    one_thread = {**environment(), "OMP_NUM_THREADS": "1"}  # as a rank has
    subprocess.run(train_command(alone, []), check=True, env=one_thread)
    return alone


def prepare(folder: Path, request: argparse.Namespace) -> Run:
    """Pairs, and a pyramid of one stage that has learned something.

    What the finetuner makes of a network that has not hangs on the last bit.
    """
    crop = {"batch_size": BATCH, "crop_size": request.side_px // 2}
    learning = {**crop, "lr": 1e-3, "num_epochs": 1, "num_samples": LEARNING_SAMPLES}
    size = {"pairs": request.pairs, "side_px": request.side_px}
    run = make_run(folder, **size, phase=learning)
    subprocess.run(train_command(run, []), check=True, env=environment())
    shutil.rmtree(run.pyramid / ".train")
    field_set(run).unlink()
    epochs = {"num_epochs": request.epochs, "num_samples": STEPS * BATCH}
    write_schedule(run, {**crop, **epochs, "lr": RATE})
    return run


def train_on_nodes(run: Run, epochs: int) -> dict[str, float]:
    """Train on two nodes, the second killed and started again; what happened."""
    with ExitStack() as stack:
        stack.enter_context(namespaces())
        nodes = [stack.enter_context(node(run, which)) for which in (0, 1)]
        wait_for_epochs(run, nodes, max(epochs // 3, 1))
        kill_node(1)
        nodes[1].wait()
        at, killed = len(metrics(run)), time.monotonic()
        logger.info("killed the second node after epoch %d", at)
        time.sleep(2)
        again = stack.enter_context(node(run, 1))
        wait_for_epochs(run, [nodes[0], again], at + 1)
        recovered = time.monotonic() - killed
        for process in (nodes[0], again):
            if process.wait(timeout=LIMIT_S):
                raise MetroEMError(f"a node ended with status {process.returncode}")
    return {"killed_at_epoch": at, "seconds_to_next_epoch": round(recovered, 1)}


@contextmanager
def namespaces() -> Iterator[None]:
    """The two nodes and the cable between them."""
    try:
        for name in NODES:
            ip("netns", "add", name)
        ip("link", "add", INTERFACES[0], "type", "veth", "peer", "name", INTERFACES[1])
        for name, end, address in zip(NODES, INTERFACES, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*arguments: str) -> None:
    """Run iproute2's `ip`."""
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def node(run: Run, which: int) -> Iterator[subprocess.Popen]:
    """A torchrun agent with two ranks in one of the namespaces."""
    launch = ["-m", "torch.distributed.run", "--nnodes=2"]
    launch += ["--nproc_per_node=2", "--max_restarts=3", "--rdzv_backend=c10d"]
    launch += [f"--rdzv_endpoint={ADDRESSES[0]}:{PORT}", "--rdzv_id=metroem"]
    # torchrun finds out by its host name, which the nodes of one machine share.
    launch += [f"--local_addr={ADDRESSES[which]}", f"--rdzv_conf=is_host={1 - which}"]
    with (run.folder / f"node_{which}.log").open("a") as log:
        process = subprocess.Popen(
            ["ip", "netns", "exec", NODES[which], *train_command(run, launch)],
            env={
                **environment(),
                "GLOO_SOCKET_IFNAME": INTERFACES[which],
                # With a store that outlives a restart, a node that comes back waits
                # for an address that nobody writes again (torch 2.13).
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                "OMP_NUM_THREADS": "1",
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill_node(which)
        process.wait()


def kill_node(which: int) -> None:
    """SIGKILL to all that runs on a node: torchrun puts ranks in sessions apart."""
    listed = subprocess.run(
        ["ip", "netns", "pids", NODES[which]], capture_output=True, text=True
    )
    for pid in listed.stdout.split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue


def metrics(run: Run) -> list[str]:
    """Lines of the metrics file: epochs that are done."""
    path = run.pyramid / ".train" / "checkpoint" / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def wait_for_epochs(run: Run, nodes: Sequence[subprocess.Popen], at_least: int) -> None:
    """Wait until so many epochs are done; MetroEMError if a node ends before."""
    deadline = time.monotonic() + LIMIT_S
    while len(metrics(run)) < at_least:
        ended = [n.returncode for n in nodes if n.poll() not in (None, 0)]
        if ended or time.monotonic() > deadline:
            logs = [run.folder / f"node_{i}.log" for i in (0, 1)]
            tails = "\n".join(log.read_text()[-3000:] for log in logs)
            raise MetroEMError(f"a node ended early, or nothing happens:\n{tails}")
        time.sleep(0.1)


def weights_apart(a: Run, b: Run, which: str) -> dict[str, float]:
    """How far the last or the best weights of two runs are apart: largest, median."""
    (one,), (other,) = (list(run.pyramid.glob(WEIGHTS[which])) for run in (a, b))
    first, second = (torch.load(path, weights_only=True) for path in (one, other))
    apart = [(first[k] - second[k]).abs().flatten().double() for k in first]
    every = torch.cat(apart)
    return {"largest": every.max().item(), "median": every.median().item()}


def fields_apart(a: Run, b: Run) -> dict[str, float]:
    """How far the fields of two runs are apart, px, and the share by over a step."""
    with h5py.File(field_set(a)) as one, h5py.File(field_set(b)) as other:
        apart = np.abs(one["main"][:] - other["main"][:])  # type: ignore[index]
    share = float((apart > STEP_PX).mean())
    median = float(np.median(apart))
    return {"largest": float(apart.max()), "median": median, "share": share}


if __name__ == "__main__":
    cli.run(main)
