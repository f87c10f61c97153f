"""What goes wrong inside of a command, set up before it begins."""

import itertools
import os
import signal
import time
from pathlib import Path

import torch


def _at_step(number, happen):
    """Let something happen before a step of the training."""
    from metroem.training import stage

    count, original = itertools.count(1), stage.train_step

    def step(*args, **kwargs):
        if next(count) == number:
            happen()
        return original(*args, **kwargs)

    stage.train_step = step


def lose_data_in_training():
    """The image sets vanish."""
    _at_step(3, lambda: [path.unlink() for path in Path("data").glob("x*.h5")])


def gpu_out_of_memory():
    """A step finds no memory, as torch says it of a GPU."""

    def fail():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"
        )

    _at_step(3, fail)


def cpu_out_of_memory():
    """A step asks for more memory than any machine has."""
    _at_step(3, lambda: torch.empty(2**60, dtype=torch.uint8))


def kill_a_worker():
    """The kernel takes a process that reads samples."""
    import multiprocessing

    def kill():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    _at_step(3, kill)


def clock_jumps_back():
    """The clock of the machine goes back a year after each second reading."""
    _jumping(-365 * 86400)


def clock_jumps_ahead():
    """The clock goes ten years ahead after each second reading."""
    _jumping(10 * 365 * 86400)


def _jumping(seconds):
    original, count = time.time, itertools.count()
    time.time = lambda: original() + (next(count) // 2) * seconds % (40 * 365 * 86400)
