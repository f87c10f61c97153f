"""What every command shares: the parser's layout, logging, exit codes.

Exit codes: 0 done, 1 refused or failed, 2 usage, 130 interrupted (Ctrl-C),
143 terminated.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from metroem.errors import MetroEMError, disk_trouble

logger = logging.getLogger(__name__)

INTERRUPTED, TERMINATED = 130, 143


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser without silent abbreviations whose help keeps its examples."""
    made = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.register("type", Path, local_path)
    return made


def local_path(text: str) -> Path:
    """A path on this machine, also as file://; what flags of type Path take.

    Raises:
        ArgumentTypeError: a path of other storage, which would become a folder.
    """
    if "://" not in text:
        return Path(text)
    if not text.startswith("file://"):
        raise argparse.ArgumentTypeError(f"{text}: expected a path on this machine")
    return Path(text.removeprefix("file://")).expanduser()


def add_download_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that both downloads have: where, which sections, which files."""
    where = parser.add_argument_group("where").add_argument
    corner = "corner of the patch, mip-0 pixels, a multiple of 2^mip (0)"
    where("--x_offset", type=int, default=0, help=corner)
    where("--y_offset", type=int, default=0, help="likewise (0)")
    where("--z_start", type=int, required=True, help="first src section")
    where("--z_end", type=int, required=True, help="one past the last src section")
    files = parser.add_argument_group("files and reading").add_argument
    files("--dst_folder", type=Path, default=Path("dataset01"), help="(./dataset01)")
    files("--overwrite", action="store_true", help="replace what other flags made")
    files(
        "--parallel",
        type=int,
        default=1,
        help="layers of chunks read at a time (1); 4 to 16 for cloud paths",
    )
    defects = parser.add_argument_group("defects").add_argument
    defects(
        "--cv_path_defects",
        help="CloudVolume of defects, which do not count; read at the mip of the "
        "rest, so it must be written there",
    )
    defects("--mask_val", type=float, default=1, help="values >= this are defects (1)")


def configure_logging(level: int = logging.INFO) -> None:
    """Send the package's log to stdout, a line a record.

    Other ranks than 0 of a distributed run only report warnings.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        level = max(level, logging.WARNING)
    package = logging.getLogger("metroem")
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package.addHandler(handler)
    package.setLevel(level)
    package.propagate = False


def mirror_log(path: Path) -> None:
    """Append the package's log to a file too, a line a record, with its time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path)
    except OSError as error:
        raise disk_trouble(error, path) or error from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger("metroem").addHandler(handler)


class _LogFile(logging.FileHandler):
    """A log whose disk may be full: the run goes on and says so once."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Leave the log as it is from here on."""
        logging.getLogger("metroem").removeHandler(self)
        reason = sys.exc_info()[1]
        sys.stderr.write(f"{self.baseFilename}: the log ends here: {reason}\n")


def confirms(question: str) -> bool:
    """Whether the user answers y; without a terminal there is nobody to ask."""
    if not sys.stdin.isatty():
        return False
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class _UnreadOutput:
    """stdout or stderr whose reader may go away, as in `| head`.

    What nobody reads any more is dropped, and the command does its work to the end:
    its files are written and its exit code is right.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write as the stream does."""
        return self._try(self._stream.write, text) or 0

    def flush(self) -> None:
        """Flush as the stream does."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., Any], *arguments: str) -> Any:
        try:
            return action(*arguments)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream.flush()  # what it has kept goes there, too


@contextmanager
def _readers_may_leave() -> Iterator[None]:
    """Let readers of stdout and stderr close them while a command runs."""
    streams = sys.stdout, sys.stderr
    wrapped = [stream and cast(TextIO, _UnreadOutput(stream)) for stream in streams]
    sys.stdout, sys.stderr = wrapped
    try:
        yield
    finally:
        for stream in wrapped:
            if stream is not None:
                stream.flush()  # python's own, at the end, would complain
        sys.stdout, sys.stderr = streams


def run(main: Callable[[], None]) -> None:
    """Run a command and exit with the code that says how it ended.

    Errors of ours end as one line on stderr; any other exception is a bug and
    keeps its traceback. SIGTERM unwinds like Ctrl-C, so that work in progress
    is closed in order. Output that nobody reads any more ends nothing.
    """
    with _readers_may_leave():
        configure_logging()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
        try:
            _run(main)
        finally:
            # A launcher ends the other ranks when one dies: some are ending already.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _run(main: Callable[[], None]) -> None:
    try:
        main()
    except MetroEMError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except OSError as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        sys.stderr.write(f"error: {trouble}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
