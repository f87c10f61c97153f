"""Progress of long work: a bar on a terminal, plain lines in a log."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

T = TypeVar("T")
LOG_EVERY_S = 30.0


def progress(
    items: Iterable[T], what: str, *, total: int, log: bool = True
) -> Iterator[T]:
    """Yield `items`, showing how many are done.

    On a terminal this is a tqdm bar on stderr; elsewhere a log line every
    `LOG_EVERY_S` seconds and one at the end.

    Args:
        items: what to go through.
        what: the work in words, with its unit: "download, sections".
        total: how many items there are.
        log: write those lines; False for work that reports itself.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, leave=False)
        return
    started = last = time.monotonic()
    done = 0
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if log and now - last >= LOG_EVERY_S and done < total:
            logger.info("%s: %d of %d, %.0f s", what, done, total, now - started)
            last = now
    if log:
        elapsed = time.monotonic() - started
        logger.info("%s: %d of %d, %.1f s", what, done, total, elapsed)


def in_threads(
    items: Sequence[T], work: Callable[[T], None], what: str, *, threads: int
) -> None:
    """Do `work` on each item, some at a time, showing how many are done.

    Args:
        items: what to go through.
        work: called with each, from the threads; what it raises first is raised
            here, after those at work have ended and without beginning others.
        what: the work in words, with its unit.
        threads: how many items at a time.
    """
    # Cancelling comes too late for an item that a thread begins after it failed.
    failed = threading.Event()

    def work_on(item: T) -> None:
        if failed.is_set():
            return
        try:
            work(item)
        except BaseException:
            failed.set()
            raise

    pool = ThreadPoolExecutor(threads)
    try:
        jobs = [pool.submit(work_on, item) for item in items]
        for job in progress(as_completed(jobs), what, total=len(jobs)):
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)
