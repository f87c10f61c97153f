"""Set up faults inside a command before it starts."""

import itertools
import os
import signal
import time
from pathlib import Path

import torch


def _at_step(number, happen):
    """Call a function before a step of the training."""
    from metroem.training import stage

    count, original = itertools.count(1), stage.train_step

    def step(*args, **kwargs):
        if next(count) == number:
            happen()
        return original(*args, **kwargs)

    stage.train_step = step


def lose_data_in_training():
    """Delete the image sets."""
    _at_step(3, lambda: [path.unlink() for path in Path("data").glob("x*.h5")])


def gpu_out_of_memory():
    """Make a step run out of GPU memory, with torch's error."""

    def fail():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"
        )

    _at_step(3, fail)


def cpu_out_of_memory():
    """Make a step allocate more memory than any machine has."""
    _at_step(3, lambda: torch.empty(2**60, dtype=torch.uint8))


def kill_a_worker():
    """Kill a data-loading process, as the kernel does when memory is short."""
    import multiprocessing

    from metroem.data import loader

    read = loader.PhaseSamples.__getitem__

    def read_slowly(self, index):
        time.sleep(0.5)  # or all may be read, and nobody misses a process
        return read(self, index)

    def kill():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    loader.PhaseSamples.__getitem__ = read_slowly
    _at_step(2, kill)


def clock_jumps_back():
    """Set the clock back by a year after every second reading."""
    _jumping(-365 * 86400)


def clock_jumps_ahead():
    """Set the clock ahead by ten years after every second reading."""
    _jumping(10 * 365 * 86400)


def _jumping(seconds):
    original, count = time.time, itertools.count()
    time.time = lambda: original() + (next(count) // 2) * seconds % (40 * 365 * 86400)
