"""The command `metroem` (or `python -m metroem`): all but the three scripts.

metroem init PYRAMID --mip 5 3      write untrained modules
metroem fetch SOURCE PYRAMID        copy a pyramid or module from any cloud path
metroem inspect DATASET             list and check image sets and field sets
metroem write-fields --pyramid_path P ...    the fields of a trained pyramid
metroem create-spec --points_path CSV ...    pairs around points, for make-dataset
metroem make-dataset --spec_path S --dst_path D    image and field sets of them
metroem evaluate --pyramid_path P   how well it aligns a data set, and where worst
metroem export-fields ...           fields as a CloudVolume, or for SOFIMA or ITK
metroem demo                        the main job on sections that it makes itself
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from metroem import __version__, cli
from metroem.create.requests import DatasetRequest, InspectRequest, SpecRequest
from metroem.evaluation.requests import EvaluateRequest
from metroem.export.requests import ExportRequest
from metroem.nets.requests import FetchRequest, InitRequest
from metroem.requests import DemoRequest
from metroem.training.requests import WriteFieldsRequest

Run = Callable[[Any, Sequence[str]], object]


def _late(module: str, function: str) -> Run:
    """Run a function of a module that is imported then.

    So --help, --version and refusals do without torch and all else that is slow.
    """
    return lambda request, _: getattr(import_module(module), function)(request)


def _init(request: InitRequest, _: Sequence[str]) -> None:
    from metroem.scaffold import init_pyramid

    init_pyramid(request.pyramid, request.mips, request.template)


def _fetch(request: FetchRequest, _: Sequence[str]) -> None:
    from metroem.scaffold import fetch

    is_sure = request.trust or request.is_local
    is_trusted = (lambda code: True) if is_sure else _is_trusted
    fetch(request.source, request.pyramid, is_trusted)


def _is_trusted(code: str) -> bool:
    """Ask the person at the terminal; nobody there means no."""
    sys.stderr.write(
        f"These modules bring code, which runs when they are loaded:\n{code}\n"
    )
    return cli.confirms("Keep them?")


def _write_fields(asked: WriteFieldsRequest, arguments: Sequence[str]) -> None:
    from metroem.pipeline import train_pyramid
    from metroem.training.distributed import choose_device, launch

    request = asked.as_training()
    if ranks := request.ranks_to_launch:
        choose_device(request.device, request.gpus)  # refused once, not by each rank
        sys.exit(launch("metroem", arguments, ranks=ranks, port=request.port))
    train_pyramid(request)


class _Command(NamedTuple):
    """A command: what it is asked for, and what it then does."""

    name: str
    help: str
    request: type[cli.Request]
    run: Run  # of the request and the command line


_make_dataset = _late("metroem.create.pairs", "make_dataset")
_evaluate = _late("metroem.evaluate", "evaluate_dataset")
_export = _late("metroem.export.run", "export_fields")
COMMANDS = (
    _Command("init", "write untrained modules", InitRequest, _init),
    _Command("fetch", "copy a pyramid or module", FetchRequest, _fetch),
    _Command(
        "inspect",
        "list and check a data set",
        InspectRequest,
        _late("metroem.inspect", "inspect_dataset"),
    ),
    _Command("evaluate", "how well a pyramid aligns", EvaluateRequest, _evaluate),
    _Command(
        "create-spec",
        "a spec of pairs at points",
        SpecRequest,
        _late("metroem.create.points", "create_spec"),
    ),
    _Command("make-dataset", "image sets from a spec", DatasetRequest, _make_dataset),
    _Command("write-fields", "fields of a pyramid", WriteFieldsRequest, _write_fields),
    _Command("export-fields", "fields out again", ExportRequest, _export),
    _Command(
        "demo",
        "the main job on made sections",
        DemoRequest,
        _late("metroem.demo", "run_demo"),
    ),
)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser: one sub-parser a command."""
    parser = cli.parser(__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        made = commands.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            allow_abbrev=False,
        )
        cli.add_flags(made, command.request)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run its command."""
    arguments = sys.argv[1:] if argv is None else argv
    flags = vars(build_parser().parse_args(arguments))
    (command,) = (one for one in COMMANDS if one.name == flags["command"])
    del flags["command"]
    request = command.request(**flags)
    request.check_paths()
    command.run(request, arguments)


def entry_point() -> None:
    """The console script `metroem`."""
    cli.run(main)


if __name__ == "__main__":
    entry_point()
