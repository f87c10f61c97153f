"""Show the progress of long work: a bar on a terminal, plain lines in a log."""

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

    A terminal gets a tqdm bar on stderr. Otherwise the log gets a line every
    `LOG_EVERY_S` seconds, with the time left, and one at the end.

    Args:
        items: the items to yield.
        what: the work in words, with its unit: "download, sections".
        total: number of items.
        log: write the log lines; False for work that logs its own progress.
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
            elapsed = now - started
            left = in_words(elapsed / done * (total - done))
            logger.info(
                *("%s: %d of %d, %.0f s, %s left", what, done, total, elapsed, left)
            )
            last = now
    if log:
        elapsed = time.monotonic() - started
        logger.info("%s: %d of %d, %.1f s", what, done, total, elapsed)


def in_words(seconds: float) -> str:
    """Say a duration in words, "45 s", "12 min" or "3 h 5 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return (
        f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
    )


def size_in_words(num_bytes: float) -> str:
    """Say a number of bytes in words, "3.2 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB" if num_bytes < 1000 else f"{num_bytes / 1000:.3g} PB"


def in_threads(
    items: Sequence[T], work: Callable[[T], None], what: str, *, threads: int
) -> None:
    """Call `work` on each item in threads, showing how many are done.

    After the first error no further items are started. It is raised here when the
    items in progress are finished.

    Args:
        items: the items to work on.
        work: called with each item, from several threads.
        what: the work in words, with its unit.
        threads: number of items at a time.
    """
    # Cancelling is too late for an item that a thread starts right after a failure.
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
