"""Test SIGTERM and Ctrl-C at random moments: the exit code, and remaining files."""

import gc
import itertools
import multiprocessing
import random
import signal
import sys

import pytest

from metroem.io.files import lock, lock_path
from metroem.io.queues import open_queue
from metroem.models.module_folders import init_pyramid
from tests.faults.places import check_whole, contents, counted, interrupted, left_over

FORK = multiprocessing.get_context("fork")
ENDS = {signal.SIGTERM: 143, signal.SIGINT: 130}
COMMANDS = ["download_image", "download_field", "make-dataset", "training"]
COMMANDS += ["generation", "evaluate"]
# Where Ctrl-C is pressed at each line: our code, and what makes hidden files.
TRACED = ("io/files.py", "io/queues.py", "module_folders.py", "filelock", "tempfile.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", ENDS)
def test_a_signal_ends_a_command_in_order_and_the_same_command_goes_on(
    zygote, place, name, number
):
    calm, chance = place.calm[name], random.Random(f"{name} {number}")
    # From when it has begun until it is nearly done.
    share = chance.uniform(0.2, 0.7)
    folder, done = interrupted(zygote, place, name, number, share)
    with counted(signal.Signals(number).name, name):
        assert done["status"] == ENDS[number], done["output"]
        assert "Traceback" not in done["output"]
        assert "Exception ignored" not in done["output"]
        check_whole(folder)
        if name == "training" and "epoch" in done["output"]:
            assert "the same command resumes from here" in done["output"]
            assert (folder / "one/.train/ck/stage_0.state.pt").is_file()
        left = left_over(folder)
        assert not any(".tmp" in path or path.endswith(".lock") for path in left)
    done = zygote.run(folder, calm.command)
    assert done["status"] == 0, done["output"]
    assert contents(folder) == calm.contents
    assert left_over(folder) == []


def interrupt_at_line(action, number):
    """Call `action`, and press Ctrl-C at the n-th line that runs below it.

    Returns:
        False if it was done before, else True.
    """
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if not any(name in frame.f_code.co_filename for name in TRACED):
            return None
        if event == "line":
            seen += 1
            if seen == number:
                signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return seen >= number


def take_a_lock(folder):
    """Take a lock; what gives it back is not interrupted."""
    with lock(lock_path(folder / "a.h5")):
        sys.settrace(None)


def put_a_task(folder):
    """Put a task into a queue in a folder."""
    queue = open_queue(f"fq://{folder / 'queue'}")
    queue.put(["task"])


def make_a_module(folder):
    """Make the folder of a module."""
    init_pyramid(folder / "pyramid", [1], "correlation")


def interrupt_at_each_line(action, place):
    """Check that no hidden file is left, whenever Ctrl-C comes."""
    gc.disable()  # else it may come while garbage of an earlier try is collected
    for number in itertools.count(1):
        folder = place / str(number)
        folder.mkdir()
        goes_on = interrupt_at_line(lambda folder=folder: action(folder), number)
        left = [str(path) for path in folder.rglob(".*")]
        assert not left, number
        if not goes_on:
            break
    assert number > 20


@pytest.mark.parametrize("action", [take_a_lock, put_a_task, make_a_module])
def test_ctrl_c_at_any_line_leaves_nothing_temporary(action, tmp_path):
    # In a process of its own: libraries whose calls are torn apart would stay so.
    process = FORK.Process(target=interrupt_at_each_line, args=(action, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0
