"""Launch the ranks of a run, choose their GPUs, and exchange values between them.

The same code runs in one process and under torchrun. Without torchrun's environment
there is one rank, and these functions do nothing.
"""

import os
import signal
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from metroem.errors import ResourceError, UsageError, first_line
from metroem.utils.cli import INTERRUPTED, TERMINATED
from metroem.utils.ranks import is_launched, rank, ranks_of_machine, world_size

# How long ranks wait for a rank that does not answer: longer than any pair takes. The
# death of a process is noticed at once, the loss of a machine after this time.
TIMEOUT = timedelta(minutes=30)
# Messages of gloo and of the ranks' store when a rank is gone.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
# Network storage may show a new file to other machines only after a minute.
SEEN_WITHIN_S = 90.0


def launch(
    script: str, arguments: Sequence[str], *, ranks: int, port: int | None
) -> int:
    """Run a script as several ranks on this machine, as torchrun would.

    Args:
        script: path of a script, or name of a package to run with `python -m`.
        arguments: its command line.
        ranks: number of processes.
        port: port through which the ranks connect; None takes a free one.

    Returns:
        Exit status of the run: 0, 130 or 143.

    Raises:
        ResourceError: a rank failed or was killed; the others were stopped.
        UsageError: the port is in use.
    """
    if port is not None:
        _check_port(port)
    # All options, since torchrun takes missing ones from the environment.
    where = [f"--nproc_per_node={ranks}", "--nnodes=1", "--local_addr=127.0.0.1"]
    where += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port or 0}"]
    where += [f"--rdzv_id={uuid.uuid4().hex}"]
    kind = [] if script.endswith(".py") else ["--module"]
    command = [*where, *kind, script, *arguments]
    try:
        torchrun.run(torchrun.parse_args(command))
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        # The other ranks fail in turn, sometimes at the same time. Report a killed rank
        # before one that exited, and the earliest first.
        number, failure = min(
            failed.failures.items(),
            key=lambda of_rank: (of_rank[1].exitcode >= 0, of_rank[1].timestamp),
        )
        if failure.exitcode in (INTERRUPTED, TERMINATED):
            return failure.exitcode
        message = _describe_failed_rank(number, failure.pid, failure.exitcode)
        raise ResourceError(message) from None
    return 0


def _check_port(port: int) -> None:
    """Raise UsageError for a port that another program listens on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageError(
                f"--port {port}: cannot be used ({error.strerror}); give another, or "
                "leave the flag out, which takes one that is free"
            ) from error


def _describe_failed_rank(number: int, pid: int, code: int) -> str:
    """Say how a rank ended, and that the others were stopped."""
    how = f"ended with exit code {code}; its own message is above"
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += (
                ", as systems do when memory is short: then lower --num_workers, "
                "--batch_size or crop_size, or give --checkpoint_activations"
            )
    return (
        f"rank {number} (process {pid}) {how}. The other ranks were stopped; the same "
        "command resumes from the last save"
    )


def choose_device(device: str, gpus: Sequence[int]) -> torch.device:
    """Choose the device of this rank.

    Args:
        device: "auto" (a GPU if this machine has one or `gpus` are given), "cpu" or
            "cuda".
        gpus: GPUs of this machine, one per rank, by nvidia-smi's numbers. If empty,
            rank i takes GPU i.

    Raises:
        UsageError: this machine lacks such a GPU, or `gpus` is not one per rank.
    """
    ranks, local_rank = ranks_of_machine(), int(os.environ.get("LOCAL_RANK", "0"))
    if gpus and is_launched() and len(gpus) != ranks:
        raise UsageError(
            f"--gpu {_listed(gpus)}: names {len(gpus)} GPUs, but {ranks} ranks run on "
            "this machine; name one a rank, or leave the flag out"
        )
    # CUDA reads this at its start. By default it lists the fastest GPU first.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    available = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not gpus and not available):
        return torch.device("cpu")
    wanted = gpus or range(local_rank, local_rank + 1)
    if max(wanted) >= available:
        raise UsageError(
            f"--device {device} --gpu {_listed(wanted)}: this machine has {available} "
            "GPUs that torch can use; give --device cpu to train without"
        )
    return torch.device("cuda", wanted[local_rank if gpus else 0])


def describe(device: torch.device) -> str:
    """Say which device and how many threads this rank has, and how many ranks run."""
    name = str(device)
    if device.type == "cuda":
        name += f" ({torch.cuda.get_device_name(device)})"
    threads, ranks = torch.get_num_threads(), world_size()
    return f"device {name}, threads {threads} a rank, ranks {ranks}"


def _listed(gpus: Sequence[int]) -> str:
    return ",".join(map(str, gpus))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connect to the other ranks: nccl on GPUs, gloo on CPUs.

    Raises:
        UsageError: the environment lacks the address of the other ranks.
        ResourceError: another rank has ended.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else threads that pin samples use GPU 0
    if not is_launched():
        yield
        return
    missing = [n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise UsageError(
            f"RANK and WORLD_SIZE {world_size()} are set in the environment, but not "
            f"{' and '.join(missing)}: start ranks with torchrun or --gpu 0,1, or "
            "unset them for one process alone"
        )
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _LOST):
            raise
        raise ResourceError(
            f"rank {rank()}: another rank has ended or cannot be reached: see its own "
            f"message ({first_line(error)}). The same command resumes from "
            "the last save"
        ) from error
    finally:
        dist.destroy_process_group()


def work_queue(total: int) -> Iterator[int]:
    """Yield the numbers below `total`, each to the first rank that asks for one.

    Ranks that are faster, or get easier numbers, get more of them.
    """
    if not dist.is_initialized():
        yield from range(total)
        return
    store = _store()
    barrier()  # all ranks have finished the previous queue
    if rank() == 0:
        store.set("next", "0")
    barrier()
    while (number := store.add("next", 1) - 1) < total:
        yield number


def follow(steps: Iterable[object], num_steps: int) -> None:
    """Run `steps` on rank 0; the other ranks wait at each step.

    The ranks meet at each step. So the time limit holds for one step, not for all, and
    the death of rank 0 is noticed.

    Args:
        steps: only rank 0 iterates over it.
        num_steps: number of steps, the same on every rank.
    """
    for _ in steps if rank() == 0 else range(num_steps):
        barrier()
    barrier()


def check_shared(folder: Path) -> None:
    """Check that all ranks see the same folder, rather than one on each machine.

    Raises:
        UsageError: this rank does not see a file that rank 0 wrote there.
    """
    if not dist.is_initialized():
        return
    mark = folder / f".seen-{uuid.uuid4().hex}"
    store = _store()
    if rank() == 0:
        mark.touch()
        store.set("mark", mark.name)
    barrier()
    mark = folder / store.get("mark").decode()
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not (is_seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    barrier()
    if rank() == 0:
        mark.unlink()
    if not is_seen:
        raise UsageError(
            f"{folder}: rank {rank()} does not see what rank 0 writes there; a run on "
            "several machines needs its pyramid and its data set on storage that all "
            "of them mount"
        )


def check_same(values: Sequence[int], what: str) -> None:
    """Check that all ranks have equal values, and the same number of them.

    Args:
        values: the values of this rank.
        what: what they describe, for the message.

    Raises:
        UsageError: they differ between ranks.
    """
    both = torch.tensor([*values, *(-value for value in values)], dtype=torch.int64)
    if dist.is_initialized() and dist.get_backend() == "nccl":
        both = both.cuda()
    highest = all_reduce_max(both).tolist()
    if highest[: len(values)] != [-value for value in highest[len(values) :]]:
        raise UsageError(
            f"the ranks see different versions of {what}; is it on storage that all "
            "of them mount? The same command tries again"
        )


def _store() -> dist.Store:  # type: ignore[reportPrivateImportUsage]
    """Return the key-value store that all ranks share."""
    return dist.distributed_c10d._get_default_store()


def all_reduce_max(values: Tensor) -> Tensor:
    """Return the maximum of each value over all ranks, on every rank."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum of each value over all ranks, on every rank."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def first_rank_value(value: float, device: torch.device) -> float:
    """Return the value of rank 0, on every rank; `device` is this rank's."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return shared.item()


def all_gather_names(names: Sequence[str]) -> list[str]:
    """Return the names from all ranks, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return list(names)
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(names))
    return [name for of_rank in gathered for name in of_rank]


def barrier() -> None:
    """Wait for the other ranks."""
    if dist.is_initialized():
        dist.barrier()
