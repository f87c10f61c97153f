"""Parse the flags of a command, set up its log, and exit with the right code.

A `Request` holds the flags of a command. It is a frozen dataclass whose fields are
declared with `flag`. The parser, its help and the checks of values come from them.

Exit codes: 0 done, 1 refused or failed, 2 usage, 130 interrupted (Ctrl-C),
143 terminated.
"""

import argparse
import dataclasses
import difflib
import inspect
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    ClassVar,
    NamedTuple,
    NoReturn,
    TextIO,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from metroem.errors import MetroEMError, UsageError, disk_error

logger = logging.getLogger(__name__)

INTERRUPTED, TERMINATED = 130, 143
_REQUIRED = dataclasses.MISSING
# By type of a flag: the types that its values may have, and their name in messages.
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

    A field of type bool is a switch that inverts its default. A field of type list
    takes several values.

    Args:
        help: text of --help; the default is added to it.
        default: value if the flag is not given; without a default it is required.
        unset: what the default None means, in words. It makes None the default.
        names: names of the flag, if they differ from the field's name.
        group: heading in --help, one of `Request.GROUPS`.
        choices: the allowed values.
        least: the smallest allowed value.
        nargs: number of values, as in argparse; "+" by default for a list.
        metavar: name of the value in --help.
        read: converts the text to the value; by default the field's type does.
        is_positional: whether the value may also be given without the flag, by its
            place among the other words; if `names` is empty, only so. With the default
            None it may be left out.
    """
    about = locals()
    del about["default"]
    if unset is not None:
        default = None
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=about)
    return dataclasses.field(default=default, metadata=about)


def flags_of_group(group: str) -> Callable[..., Any]:
    """Return `flag` with its group set: the flags under one heading of --help."""
    return partial(flag, group=group)


class _Flag(NamedTuple):
    """A flag of a request: the arguments of `flag`, and the type of its field."""

    dest: str
    kind: type  # of one value
    is_list: bool
    default: Any  # _REQUIRED if it has none
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
        """Name of the flag in messages."""
        if self.is_positional and not self.names:
            return self.dest
        return (*self.names, f"--{self.dest}")[0]

    def check(self, value: Any) -> None:
        """Raise UsageError for a value that the command line would not accept."""
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
        """Return the arguments of argparse's `add_argument`, except the names."""
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
        if self.is_positional and not self.names:
            return options
        if self.default is _REQUIRED:
            # argparse does not know that a place is enough; `_Parser` does.
            is_needed = not self.is_positional
            return options | {"required": is_needed, "help": f"{self.help} (required)"}
        default = [self.default] if not self.is_list else self.default or []
        text = f" {' '.join(map(str, default))}"
        if self.default is None:
            text = f": {self.unset or 'none'}"
        help = f"{self.help} (default{text})"
        return options | {"default": self.default, "help": help}


class Request:
    """Base class of requests: frozen dataclasses whose fields are made by `flag`.

    Fields made without `flag` can only be set from Python.

    Attributes:
        GROUPS: headings of --help, in order; "" for flags without a heading.
        HELP: head of --help: what the command does, in a line, details, an example.
            %(prog)s stands for the command as it was called.

    Raises:
        UsageError: a value has the wrong type, is not one of the choices, is too
            small, or is refused by the `__post_init__` of a subclass. The message
            names the flag.
    """

    GROUPS: ClassVar[tuple[str, ...]] = ("",)
    HELP: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for one in _flags(type(self)):
            one.check(getattr(self, one.dest))

    def check_paths(self) -> None:
        """Refuse paths that cannot work.

        Commands call it before their slow imports: torch and cloud-volume. Functions
        that take a request check the same paths again.

        Raises:
            MetroEMError: a path cannot work; the message names it.
        """


RequestT = TypeVar("RequestT", bound=Request)


def _flags(request: type[Request]) -> list[_Flag]:
    """List the flags of a request, sorted by group."""
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


class _Parser(argparse.ArgumentParser):
    """Parser that answers a mistake in two lines: what is wrong, and where to look.

    A word that it does not know gets the nearest known one beside it. Flags are not
    abbreviated. The help keeps the line breaks of the description.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )
        # Flags whose value may also be given by its place, in order.
        self.by_place: list[argparse.Action] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line; name unknown flags and commands before missing ones."""
        words = list(sys.argv[1:] if args is None else args)
        commands = self._subparsers and self._subparsers._group_actions[0].choices
        for word in words:
            name, *_ = word.split("=")
            if word == "--":
                break
            if name.startswith("--") and name not in self._option_string_actions:
                self.error(_unknown("flag", name, self._option_string_actions))
            if commands and not word.startswith("-"):
                if word not in commands:
                    self.error(_unknown("command", word, commands))
                break  # the rest belongs to the command
        found, others = super().parse_known_args(words, namespace)
        for action in self.by_place:
            if action.dest in found:
                continue
            if not others and action.option_strings:
                self.error(f"{action.option_strings[0]} is required")
            if not others:
                setattr(found, action.dest, None)
                continue
            try:
                setattr(found, action.dest, self._get_value(action, others.pop(0)))
            except argparse.ArgumentError as error:
                self.error(str(error))
        return found, others

    def error(self, message: str) -> NoReturn:
        """Print the message and where to find help; exit with 2."""
        self.exit(2, f"{self.prog}: error: {message}\nsee: {self.prog} --help\n")


def _unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """Say that a word is not known, and which one is like it."""
    near = difflib.get_close_matches(word, list(known), 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown {kind} {word}{hint}"


def parser(
    description: str | None, request: type[Request] | None = None
) -> argparse.ArgumentParser:
    """Make a parser.

    Args:
        description: head of its help.
        request: gives its flags.
    """
    made = _Parser(description=description)
    if request is not None:
        add_flags(made, request)
    return made


def script_parser(request: type[Request]) -> argparse.ArgumentParser:
    """Make the parser of a script at the top of the repository."""
    made = parser(inspect.cleandoc(request.HELP), request)
    if not Path(sys.argv[0]).is_absolute():  # else it was installed as a program
        made.prog = f"python {sys.argv[0]}"
    return made


def add_flags(parser: argparse.ArgumentParser, request: type[Request]) -> None:
    """Add the flags of a request to a parser; its usage names the required ones."""
    assert isinstance(parser, _Parser)
    groups: dict[str, Any] = {"": parser}
    usage = ["%(prog)s"]
    for one in _flags(request):
        if one.group not in groups:
            groups[one.group] = parser.add_argument_group(one.group)
        add = groups[one.group].add_argument
        options = one.options()
        if one.is_positional and not one.names:
            name = one.metavar or one.dest
            if one.default is _REQUIRED:
                add(one.dest, **options)
                usage.append(f"{name}")
            else:  # argparse finds it only beside the other words without a flag
                options |= {"nargs": "?", "default": argparse.SUPPRESS}
                parser.by_place.append(add(one.dest, **options))
                usage.append(f"[{name}]")
            continue
        if one.is_positional:
            options["default"] = argparse.SUPPRESS
        action = add(*one.names or [f"--{one.dest}"], dest=one.dest, **options)
        if one.is_positional:
            parser.by_place.append(action)
        if one.default is _REQUIRED:
            values = "..." if one.is_list else one.metavar or one.dest.upper()
            usage.append(f"{action.option_strings[0]} {values}")
    parser.usage = " ".join([*usage, "[flags]"])


def parse(request: type[RequestT], argv: Sequence[str] | None) -> RequestT:
    """Parse the command line of a script into a request.

    Args:
        request: its flags.
        argv: the command line; None: that of this process.

    Raises:
        MetroEMError: a value or a path cannot work.
    """
    made = request(**vars(script_parser(request).parse_args(argv)))
    made.check_paths()
    return made


def local_path(text: str) -> Path:
    """Parse a path on this machine, with or without file://.

    Raises:
        ArgumentTypeError: the path has another scheme, such as gs://. It would
            otherwise be taken for the name of a local folder.
    """
    if "://" not in text:
        return Path(text)
    if not text.startswith("file://"):
        raise argparse.ArgumentTypeError(f"{text}: expected a path on this machine")
    return Path(text.removeprefix("file://")).expanduser()


def command_line() -> str:
    """Return the running command as it was typed."""
    name = Path(sys.argv[0]).name
    return shlex.join(["metroem" if name == "__main__.py" else name, *sys.argv[1:]])


def configure_logging(level: int = logging.INFO) -> None:
    """Send the package's log to stdout, one line per record.

    Ranks other than 0 only log warnings.
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
    """Also append the package's log to a file, one line per record, with its time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path)
    except OSError as error:
        raise disk_error(error, path) or error from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger("metroem").addHandler(handler)


class _LogFile(logging.FileHandler):
    """Log file that may run out of disk space: the run continues and says so once."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Stop writing to the file."""
        logging.getLogger("metroem").removeHandler(self)
        reason = sys.exc_info()[1]
        sys.stderr.write(f"{self.baseFilename}: the log ends here: {reason}\n")


def confirms(question: str) -> bool:
    """Ask a question; True if the user answers y. Without a terminal, False."""
    if not sys.stdin.isatty():
        return False
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class _ClosableOutput:
    """Wrapper of stdout or stderr whose reader may close it, as in `| head`.

    Later output is dropped, and the command still finishes its work: its files are
    written and its exit code is right.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write to the stream, or drop the text if nobody reads it."""
        return self._try(self._stream.write, text) or 0

    def flush(self) -> None:
        """Flush the stream, or drop its buffer if nobody reads it."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., Any], *arguments: str) -> Any:
        try:
            return action(*arguments)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream.flush()  # sends its buffer to devnull, too


@contextmanager
def _readers_may_leave() -> Iterator[None]:
    """Allow readers of stdout and stderr to close them while a command runs."""
    streams = sys.stdout, sys.stderr
    wrapped = [stream and cast(TextIO, _ClosableOutput(stream)) for stream in streams]
    sys.stdout, sys.stderr = wrapped
    try:
        yield
    finally:
        for stream in wrapped:
            if stream is not None:
                stream.flush()  # else Python flushes at exit, and prints an error
        sys.stdout, sys.stderr = streams


def run(main: Callable[[], None]) -> None:
    """Run a command and exit with the code that says how it ended.

    A `MetroEMError` is printed as one line on stderr. Any other exception is a bug
    and keeps its traceback. SIGTERM unwinds the stack like Ctrl-C, so that open files
    are closed in order. A closed stdout or stderr does not stop the command.
    """
    with _readers_may_leave():
        configure_logging()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
        try:
            _run(main)
        finally:
            # When one rank dies, the launcher also stops ranks that are exiting.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _run(main: Callable[[], None]) -> None:
    try:
        main()
    except MetroEMError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except OSError as error:
        for_user = disk_error(error)
        if for_user is None:
            raise
        sys.stderr.write(f"error: {for_user}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
