"""Note that a run should stop early: its time is up, or a signal came."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from metroem.utils.cli import INTERRUPTED, TERMINATED

TIME_UP = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The run ended early; all its work so far is saved.

    Attributes:
        code: `TIME_UP`, `INTERRUPTED` or `TERMINATED`.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class StopRequest:
    """Context manager that notes when the run should stop after the current step.

    Ctrl-C and SIGTERM are noted instead of raised, so that the current step is
    finished and saved. A second Ctrl-C is raised at once.

    Args:
        max_minutes: wall time of the run; None for no limit.
    """

    def __init__(self, max_minutes: float | None) -> None:
        seconds = float("inf") if max_minutes is None else 60 * max_minutes
        self._deadline = time.monotonic() + seconds
        self._signalled = 0

    def __enter__(self) -> "StopRequest":
        self._previous = {
            number: signal.signal(number, self._note) for number in _SIGNALS
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def code(self) -> int:
        """0 to continue, else the reason to stop; see `Stopped`."""
        if self._signalled:
            return self._signalled
        return TIME_UP if time.monotonic() >= self._deadline else 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signalled:
            raise KeyboardInterrupt
        self._signalled = INTERRUPTED if number == signal.SIGINT else TERMINATED


@contextmanager
def delayed_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until a short block is done.

    For steps that may not be torn apart, like taking a lock and noting that it is held.
    Python handles signals in the main thread, so other threads need no delay.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: waiting.append(number))
        for number in _SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)
