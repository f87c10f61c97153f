"""Read the flags of a command, log, and end with an exit code.

A command is asked by a `Request`: a frozen dataclass whose fields are declared with
`flag`. The parser, its help and the checks of the values are all made from them.

Exit codes: 0 done, 1 refused or failed, 2 usage, 130 interrupted (Ctrl-C),
143 terminated.
"""

import argparse
import dataclasses
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    ClassVar,
    NamedTuple,
    TextIO,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from metroem.errors import MetroEMError, UsageError, disk_trouble

logger = logging.getLogger(__name__)

INTERRUPTED, TERMINATED = 130, 143
_REQUIRED = dataclasses.MISSING
# What a value of a flag may be, and what it is called in messages.
_KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    Path: (Path, "a pathlib.Path"),
}


def flag(
    help: str,
    default: Any = _REQUIRED,
    *,
    unset: str | None = None,
    names: tuple[str, ...] = (),
    group: str = "",
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    nargs: int | str | None = None,
    metavar: str | tuple[str, ...] | None = None,
    read: Callable[[str], Any] | None = None,
    is_positional: bool = False,
) -> Any:
    """Declare a field of a `Request`, and the flag that sets it.

    A field of type bool is a switch that turns its default over; one of type list
    takes several values.

    Args:
        help: text of --help; the default is added to it.
        default: value without the flag; left out, the flag is required.
        unset: what a default of None, which may be left out then, means in words.
        names: of the flag, if it is not that of the field.
        group: heading in --help, one of `Request.GROUPS`.
        choices: the values that it may have.
        least: the smallest value that it may have.
        nargs: number of values, as argparse has it; of a list "+" if left out.
        metavar: what the value is called in --help.
        read: makes the value of its text; left out, the type of the field does.
        is_positional: whether it has no name on the command line.
    """
    about = locals()
    del about["default"]
    if unset is not None:
        default = None
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=about)
    return dataclasses.field(default=default, metadata=about)


def flags_of_group(group: str) -> Callable[..., Any]:
    """The function `flag` for the flags under one heading of --help."""
    return partial(flag, group=group)


class _Flag(NamedTuple):
    """A flag of a request: what `flag` was given, and what its field says."""

    dest: str
    kind: type  # of one value
    is_list: bool
    default: Any  # _REQUIRED if there is none
    help: str
    unset: str | None
    names: tuple[str, ...]
    group: str
    choices: tuple[str, ...] | None
    least: float | None
    nargs: int | str | None
    metavar: str | tuple[str, ...] | None
    read: Callable[[str], Any] | None
    is_positional: bool

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.dest if self.is_positional else (*self.names, f"--{self.dest}")[0]

    def check(self, value: Any) -> None:
        """Refuse a value that the command line would not give (UsageError)."""
        if value is None and self.default is None:
            return
        if self.is_list and not isinstance(value, list | tuple):
            raise UsageError(f"{self.name} {value!r}: expected a list")
        values: Any = value if self.is_list else [value]
        if isinstance(self.nargs, int) and len(values) != self.nargs:
            raise UsageError(f"{self.name} {value!r}: expected {self.nargs} values")
        fits, words = _KINDS[self.kind]
        for one in values:
            is_bool = isinstance(one, bool)
            if not isinstance(one, fits) or is_bool != (self.kind is bool):
                raise UsageError(f"{self.name} {one!r}: expected {words}")
            if self.choices is not None and one not in self.choices:
                known = f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
                raise UsageError(f"{self.name} {one}: expected {known}")
            if self.least is not None and not one >= self.least:
                raise UsageError(f"{self.name} {one}: must be >= {self.least}")

    def options(self) -> dict[str, Any]:
        """What argparse is told of it, but for its names."""
        if self.kind is bool:
            action = "store_false" if self.default else "store_true"
            return {"action": action, "help": f"{self.help} (default off)"}
        kind = local_path if self.kind is Path else self.kind
        options: dict[str, Any] = {"type": self.read or kind, "help": self.help}
        if self.is_list:
            options["nargs"] = self.nargs or "+"
        if self.choices is not None:
            options["choices"] = self.choices
        if self.metavar is not None:
            options["metavar"] = self.metavar
        if self.is_positional:
            return options
        if self.default is _REQUIRED:
            return options | {"required": True, "help": f"{self.help} (required)"}
        default = [self.default] if not self.is_list else self.default or []
        shown = f" {' '.join(map(str, default))}"
        if self.default is None:
            shown = f": {self.unset or 'none'}"
        help = f"{self.help} (default{shown})"
        return options | {"default": self.default, "help": help}


class Request:
    """Base of the requests, frozen dataclasses whose fields are made by `flag`.

    Fields that are made without it are for callers in Python alone.

    Attributes:
        GROUPS: headings of --help, in their order; "" for flags without one.

    Raises:
        UsageError: a value of another type, none of the choices, too small, or that
            the `__post_init__` of a subclass refuses; its flag is named.
    """

    GROUPS: ClassVar[tuple[str, ...]] = ("",)

    def __post_init__(self) -> None:
        for one in _flags(type(self)):
            one.check(getattr(self, one.dest))

    def check_paths(self) -> None:
        """Refuse paths that cannot work.

        Commands call it before they import what is slow: torch, cloud-volume. The
        functions that take a request find the same faults themselves.

        Raises:
            MetroEMError: a path; it is named.
        """


RequestT = TypeVar("RequestT", bound=Request)


def _flags(request: type[Request]) -> list[_Flag]:
    """The flags of a request, sorted by group."""
    types = get_type_hints(request)
    found = []
    for field in dataclasses.fields(cast(Any, request)):
        if not field.metadata:
            continue
        kind = types[field.name]
        if get_origin(kind) in (Union, UnionType):
            kind = next(one for one in get_args(kind) if one is not NoneType)
        is_list = get_origin(kind) is list
        if is_list:
            (kind,) = get_args(kind)
        default = field.default
        if field.default_factory is not _REQUIRED:
            default = field.default_factory()
        found.append(_Flag(field.name, kind, is_list, default, **field.metadata))
    return sorted(found, key=lambda one: request.GROUPS.index(one.group))


def parser(
    description: str | None, request: type[Request] | None = None
) -> argparse.ArgumentParser:
    """Make a parser, with the flags of a request if one is given.

    It takes no abbreviations, and its help keeps the examples as they are.
    """
    made = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if request is not None:
        add_flags(made, request)
    return made


def add_flags(parser: argparse.ArgumentParser, request: type[Request]) -> None:
    """Add the flags of a request to a parser."""
    groups: dict[str, Any] = {"": parser}
    for one in _flags(request):
        if one.group not in groups:
            groups[one.group] = parser.add_argument_group(one.group)
        add = groups[one.group].add_argument
        if one.is_positional:
            add(one.dest, **one.options())
        else:
            add(*one.names or [f"--{one.dest}"], dest=one.dest, **one.options())


def parse(
    request: type[RequestT], description: str | None, argv: Sequence[str] | None
) -> RequestT:
    """Make a request from a command line, None for that of this process.

    Raises:
        MetroEMError: values or paths that cannot work.
    """
    made = request(**vars(parser(description, request).parse_args(argv)))
    made.check_paths()
    return made


def local_path(text: str) -> Path:
    """Read a path on this machine, also as file://.

    Raises:
        ArgumentTypeError: a path of other storage, which would become a folder.
    """
    if "://" not in text:
        return Path(text)
    if not text.startswith("file://"):
        raise argparse.ArgumentTypeError(f"{text}: expected a path on this machine")
    return Path(text.removeprefix("file://")).expanduser()


def command_line() -> str:
    """The command that is running, as typed."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


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
