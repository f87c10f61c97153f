"""Run a command of MetroEM; downloads and training have their own scripts."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from metroem import __version__
from metroem.evaluation.requests import EvaluateRequest
from metroem.export.requests import ExportImagesRequest, ExportRequest
from metroem.models.requests import FetchRequest, InitRequest
from metroem.prepare.requests import (
    DatasetRequest,
    ImportRequest,
    InspectRequest,
    SpecRequest,
)
from metroem.stack.requests import (
    AlignStackRequest,
    CheckRequest,
    PlaceRequest,
    WorkerRequest,
)
from metroem.synthetic.requests import DemoRequest
from metroem.training.requests import WriteFieldsRequest
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

    init_pyramid(request.pyramid, request.mips, request.template)


def _fetch(request: FetchRequest, _: Sequence[str]) -> None:
    from metroem.models.module_folders import fetch

    is_sure = request.trust or request.is_local
    is_trusted = (lambda code: True) if is_sure else _is_trusted
    fetch(request.source, request.pyramid, is_trusted)


def _is_trusted(code: str) -> bool:
    """Ask the person at the terminal; without a terminal the answer is no."""
    sys.stderr.write(
        f"These modules contain code that runs when they are loaded:\n{code}\n"
    )
    return cli.confirms("Keep them?")


def _write_fields(flags: WriteFieldsRequest, arguments: Sequence[str]) -> None:
    from metroem.training.run import train_pyramid
    from metroem.utils.distributed import choose_device, launch

    request = flags.as_training()
    if ranks := request.ranks_to_launch:
        choose_device(request.device, request.gpus)  # one error, not one per rank
        sys.exit(launch("metroem", arguments, ranks=ranks, port=request.port))
    train_pyramid(request)


# Each command: its flags, its function and its help.
COMMANDS: dict[str, tuple[type[cli.Request], Run, str]] = {
    "init": (InitRequest, _init, "write untrained modules"),
    "fetch": (FetchRequest, _fetch, "copy a pyramid or module from any cloud path"),
    "import": (
        ImportRequest,
        _import_and_run("metroem.prepare.import_images.import_images"),
        "make a volume of images, TIFF, npy, Zarr or N5, or add mips to a volume",
    ),
    "inspect": (
        InspectRequest,
        _import_and_run("metroem.prepare.inspect.inspect_dataset"),
        "list and check image sets and field sets",
    ),
    "evaluate": (
        EvaluateRequest,
        _import_and_run("metroem.evaluation.evaluate.evaluate_dataset"),
        "measure how well a pyramid aligns a data set, and list the worst pairs",
    ),
    "create-spec": (
        SpecRequest,
        _import_and_run("metroem.prepare.create_spec.create_spec"),
        "write a spec of pairs around points, for make-dataset",
    ),
    "make-dataset": (
        DatasetRequest,
        _import_and_run("metroem.prepare.make_dataset.make_dataset"),
        "make image and field sets from a spec",
    ),
    "write-fields": (
        WriteFieldsRequest,
        _write_fields,
        "write the fields of a trained pyramid",
    ),
    "export-fields": (
        ExportRequest,
        _import_and_run("metroem.export.export_fields.export_fields"),
        "write fields as a CloudVolume, or for SOFIMA or ITK",
    ),
    "export-images": (
        ExportImagesRequest,
        _import_and_run("metroem.export.export_images.export_images"),
        "write the sections of a volume as PNG or TIFF files",
    ),
    "worker": (
        WorkerRequest,
        _import_and_run("metroem.stack.worker.run_worker"),
        "do the tasks that align-stack --queue puts into a queue",
    ),
    "place": (
        PlaceRequest,
        _import_and_run("metroem.stack.align_stack.place_stack"),
        "find where each section of a volume lies",
    ),
    "align-stack": (
        AlignStackRequest,
        _import_and_run("metroem.stack.align_stack.align_stack"),
        "align all sections of a volume, and check the result",
    ),
    "check": (
        CheckRequest,
        _import_and_run("metroem.stack.check.check_volume"),
        "measure how well neighbouring sections of a volume are aligned",
    ),
    "demo": (
        DemoRequest,
        _import_and_run("metroem.demo.run_demo"),
        "run the three steps on synthetic sections",
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """Make the parser, with a sub-parser for each command."""
    parser = cli.parser(__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (request, _, help) in COMMANDS.items():
        made = commands.add_parser(
            name, help=help, description=help, allow_abbrev=False
        )
        cli.add_flags(made, request)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run its command."""
    arguments = sys.argv[1:] if argv is None else argv
    flags = vars(build_parser().parse_args(arguments))
    request_type, run, _ = COMMANDS[flags.pop("command")]
    request = request_type(**flags)
    request.check_paths()
    run(request, arguments)


def entry_point() -> None:
    """The console script `metroem`."""
    cli.run(main)


if __name__ == "__main__":
    entry_point()
