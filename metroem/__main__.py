"""Run a command of MetroEM."""

import argparse
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from metroem import __version__
from metroem.evaluation.requests import EvaluateRequest
from metroem.export.requests import ExportImagesRequest, ExportRequest
from metroem.models.requests import FetchRequest, InitRequest
from metroem.prepare.requests import (
    DatasetRequest,
    FieldRequest,
    ImageRequest,
    ImportRequest,
    InspectRequest,
    SpecRequest,
)
from metroem.stack.requests import (
    AlignImagesRequest,
    AlignStackRequest,
    CheckRequest,
    PlaceRequest,
    ViewRequest,
    WorkerRequest,
)
from metroem.synthetic.requests import DemoRequest
from metroem.training.requests import TrainRequest, WriteFieldsRequest
from metroem.utils import cli

Run = Callable[[Any, Sequence[str]], object]


def _import_and_run(name: str) -> Run:
    """Return a command that imports a function, given by its full name, and runs it.

    So --help, --version and refused flags do not wait for torch.
    """
    module, _, function = name.rpartition(".")
    return lambda request, _: getattr(import_module(module), function)(request)


def _init(request: InitRequest, _: Sequence[str]) -> None:
    from metroem.models.module_folders import init_pyramid

    init_pyramid(
        request.pyramid_path, request.mips, request.template, request.pretrained
    )


def _fetch(request: FetchRequest, _: Sequence[str]) -> None:
    from metroem.models.module_folders import fetch

    is_sure = request.trust or request.is_local
    is_trusted = (lambda code: True) if is_sure else _is_trusted
    fetch(request.source, request.pyramid_path, is_trusted)


def _is_trusted(code: str) -> bool:
    """Ask the person at the terminal; without a terminal the answer is no."""
    sys.stderr.write(
        f"These modules contain code that runs when they are loaded:\n{code}\n"
    )
    return cli.confirms("Keep them?")


def _train(request: TrainRequest, arguments: Sequence[str]) -> None:
    started = time.monotonic()  # before slow imports, which --budget_minutes counts
    from metroem.training.run import train_pyramid
    from metroem.utils.distributed import choose_device, launch

    if ranks := request.ranks_to_launch:
        choose_device(request.device, request.gpus)  # one error, not one per rank
        sys.exit(launch("metroem", arguments, ranks=ranks, port=request.port))
    train_pyramid(request, started)


def _write_fields(request: WriteFieldsRequest, arguments: Sequence[str]) -> None:
    _train(request.as_training(), arguments)


# By heading of the help, the commands: flags and function of each.
_GROUPS: dict[str, dict[str, tuple[type[cli.Request], Run]]] = {
    "first look": {"demo": (DemoRequest, _import_and_run("metroem.demo.run_demo"))},
    "two images": {
        "align": (
            AlignImagesRequest,
            _import_and_run("metroem.stack.align_images.align_images"),
        ),
    },
    "aligned stacks": {
        "place": (
            PlaceRequest,
            _import_and_run("metroem.stack.align_stack.place_stack"),
        ),
        "align-stack": (
            AlignStackRequest,
            _import_and_run("metroem.stack.align_stack.align_stack"),
        ),
        "worker": (WorkerRequest, _import_and_run("metroem.stack.worker.run_worker")),
        "check": (CheckRequest, _import_and_run("metroem.stack.check.check_volume")),
        "view": (ViewRequest, _import_and_run("metroem.stack.view.view")),
    },
    "image files": {
        "import": (
            ImportRequest,
            _import_and_run("metroem.prepare.import_images.import_images"),
        ),
        "export-images": (
            ExportImagesRequest,
            _import_and_run("metroem.export.export_images.export_images"),
        ),
    },
    "data sets": {
        "download-image": (
            ImageRequest,
            _import_and_run("metroem.prepare.download_image.download_image"),
        ),
        "download-field": (
            FieldRequest,
            _import_and_run("metroem.prepare.download_field.download_field"),
        ),
        "create-spec": (
            SpecRequest,
            _import_and_run("metroem.prepare.create_spec.create_spec"),
        ),
        "make-dataset": (
            DatasetRequest,
            _import_and_run("metroem.prepare.make_dataset.make_dataset"),
        ),
        "inspect": (
            InspectRequest,
            _import_and_run("metroem.prepare.inspect.inspect_dataset"),
        ),
    },
    "pyramids": {
        "init": (InitRequest, _init),
        "fetch": (FetchRequest, _fetch),
        "train": (TrainRequest, _train),
        "write-fields": (WriteFieldsRequest, _write_fields),
        "evaluate": (
            EvaluateRequest,
            _import_and_run("metroem.evaluation.evaluate.evaluate_dataset"),
        ),
        "export-fields": (
            ExportRequest,
            _import_and_run("metroem.export.export_fields.export_fields"),
        ),
    },
}
COMMANDS = {name: known for group in _GROUPS.values() for name, known in group.items()}


def build_parser() -> argparse.ArgumentParser:
    """Make the parser, with a sub-parser for each command."""
    parser = cli.parser(_overview())
    parser.prog, parser.usage = "metroem", "metroem COMMAND [flags]"
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS
    )
    for name, (request, _) in COMMANDS.items():
        help = inspect.cleandoc(request.HELP)
        made = commands.add_parser(name, prog=f"metroem {name}", description=help)
        cli.add_flags(made, request)
    return parser


def _overview() -> str:
    """List all commands, each with the first line of its help."""
    lines = ["Align the sections of electron microscopy."]
    for heading, commands in _GROUPS.items():
        lines += ["", f"{heading}:"]
        for name, (request, _) in commands.items():
            does = inspect.cleandoc(request.HELP).splitlines()[0]
            lines.append(f"  {name:<16}{does}")
    lines += ["", "metroem COMMAND --help tells more of a command."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run its command."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    if not arguments:
        parser.print_help()
        sys.exit(2)
    flags = vars(parser.parse_args(arguments))
    request_type, run = COMMANDS[flags.pop("command")]
    request = request_type(**flags)
    request.check_paths()
    run(request, arguments)


def entry_point() -> None:
    """The console script `metroem`."""
    cli.run(main)


if __name__ == "__main__":
    entry_point()
