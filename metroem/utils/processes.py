"""Set up processes that work for another one."""

import logging
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

import torch

from metroem.utils import cli


def start_working() -> None:
    """Set up this process, which does the tasks that its parent hands to it.

    It has one thread for torch and logs warnings only. Ctrl-C and SIGTERM are left to
    the parent. It ends when the parent was killed, since nobody would take its results.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    cli.configure_logging(logging.WARNING)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
