"""Several processes as one run: ranks, agreement, launch.

The same code runs in one process and under torchrun: without torchrun's
environment there is one rank and nothing to agree on.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from metroem.errors import UsageError


def is_launched() -> bool:
    """Whether this process was started by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's place among all, 0 without torchrun."""
    return int(os.environ["RANK"]) if is_launched() else 0


def world_size() -> int:
    """Number of processes of the run, 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def launch(script: str, arguments: Sequence[str], *, ranks: int, port: int) -> int:
    """Run a script as several ranks on this machine, as torchrun would.

    Args:
        script: path of the script.
        arguments: its command line.
        ranks: number of processes.
        port: where they find each other.

    Returns:
        Exit status of the run.
    """
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += [f"--nproc_per_node={ranks}", "--master_addr=127.0.0.1"]
    command += [f"--master_port={port}", script, *arguments]
    return subprocess.run(command, check=False).returncode


def choose_device(device: str, gpus: Sequence[int]) -> torch.device:
    """The device of this rank.

    Args:
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        gpus: of this machine, one a rank; with torchrun and another number of
            ranks, rank i takes GPU i.

    Raises:
        UsageError: a GPU that this machine does not have.
    """
    available = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not available):
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    index = gpus[local_rank] if len(gpus) == local_size else local_rank
    if index >= available:
        raise UsageError(
            f"--device {device} --gpu {index}: this machine has {available} GPUs that "
            "torch can use; give --device cpu to train without"
        )
    return torch.device("cuda", index)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other ranks: nccl on GPUs, gloo on CPUs; alone, do nothing."""
    if not is_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def largest(values: Tensor) -> Tensor:
    """The largest of each value over all ranks, the same on every rank."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def total(values: Tensor) -> Tensor:
    """The sum of each value over all ranks, the same on every rank."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def gather_names(names: Sequence[str]) -> list[str]:
    """The names of all ranks, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return list(names)
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(names))
    return [name for of_rank in gathered for name in of_rank]


def barrier() -> None:
    """Wait for the other ranks."""
    if dist.is_initialized():
        dist.barrier()
