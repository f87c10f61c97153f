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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metroem import __version__, cli

# Each command imports what it needs when it runs, so that --help and --version
# do without torch.


def build_parser() -> argparse.ArgumentParser:
    """One sub-parser a command; `run` is what it calls."""
    parser = cli.parser(__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_pyramids(commands)
    _add_looks(commands)
    _add_points(commands)
    _add_fields(commands)
    demo = _command(commands, "demo", "the main job on made sections", _demo)
    demo.add_argument(
        "--folder",
        type=Path,
        default=Path("demo"),
        help="where everything goes; what an earlier demo left there is removed",
    )
    return parser


def _add_pyramids(commands) -> None:
    """The two commands that a pyramid comes from."""
    init = _command(commands, "init", "write untrained modules", _init)
    init.add_argument("pyramid", type=Path, help="directory to make")
    init.add_argument(
        *("--mip", "--mips"),
        dest="mips",
        type=int,
        nargs="+",
        required=True,
        help="mip of each stage, coarse first",
    )
    init.add_argument(
        "--template", default="correlation", help="network of the modules"
    )

    fetch = _command(commands, "fetch", "copy a pyramid or module", _fetch)
    fetch.add_argument("source", help="gs://, s3://, https:// or local path")
    fetch.add_argument("pyramid", type=Path, help="directory to copy into")
    trust = "do not ask whether the code that was read from afar may be kept"
    fetch.add_argument("--trust", action="store_true", help=trust)


def _add_looks(commands) -> None:
    """The two commands that say what is there and what it is worth."""
    inspect = _command(commands, "inspect", "list and check a data set", _inspect)
    inspect.add_argument("dataset", type=Path, help="folder of h5 files")
    inspect.add_argument("--pyramid_path", type=Path, help="check prior fields for it")
    inspect.add_argument(
        "--checkpoint_name", default="checkpoint", help="tag of the prior fields"
    )
    more = "another folder of field sets to check"
    inspect.add_argument("--fields_path", type=Path, help=more)

    evaluate = _command(commands, "evaluate", "how well a pyramid aligns", _evaluate)
    add = evaluate.add_argument
    add("--pyramid_path", type=Path, required=True, help="the pyramid")
    add("--dataset_path", type=Path, required=True, help="folder of image sets")
    add("--checkpoint_name", default="checkpoint", help="which weights (checkpoint)")
    add("--json", type=Path, help="file for all figures, also those of each pair")
    add("--report", type=Path, help="HTML file to look at all pairs in")
    add("--known_warps", action="store_true", help="warp sections by known fields too")
    add("--no_finetune", action="store_true", help="the networks alone")
    verify = "check each pair's checksum before it is read: reads it once more, whole"
    add("--verify", action="store_true", help=verify)


def _add_fields(commands) -> None:
    """The two commands that write fields: of a pyramid, and for other programs."""
    write = _command(commands, "write-fields", "fields of a pyramid", _write_fields)
    add = write.add_argument
    add("--pyramid_path", type=Path, required=True, help="the trained pyramid")
    images = "folder of image sets, of every mip of the pyramid"
    add("--dataset_path", type=Path, required=True, help=images)
    folder = "folder to write the field sets to (--dataset_path)"
    add("--fields_path", type=Path, help=folder)
    add("--checkpoint_name", default="checkpoint", help="which weights (checkpoint)")
    stages = "whose fields (all); the first starts from those of the stage before"
    add("--stages", type=int, nargs="+", help=stages)
    ranks = "GPUs, as 0 or 0,1,2: that many ranks"
    add("--gpu", default=argparse.SUPPRESS, help=ranks)  # train.py's default
    devices, device = ("auto", "cpu", "cuda"), "auto takes a GPU if there is one"
    add("--device", choices=devices, default="auto", help=device)
    verify = "check each pair's checksum before it is read: reads it once more, whole"
    add("--verify", action="store_true", help=verify)

    export = _command(commands, "export-fields", "fields out again", _export)
    add = export.add_argument
    images = "folder of image sets and, without --fields_path, of field sets"
    add("--dataset_path", type=Path, required=True, help=images)
    add("--fields_path", type=Path, help="folder of field sets (--dataset_path)")
    dst = "the volume: gs://, s3:// or a local path; of other formats the folder"
    add("--dst_path", required=True, help=dst)
    tag = "whose fields: checkpoint, or --suffix of a download (checkpoint)"
    add("--checkpoint_name", default="checkpoint", help=tag)
    add("--stage", type=int, help="whose fields (the last stage that has any)")
    add("--mip", type=int, help="of the fields, where there are several")
    formats = ("cloudvolume", "sofima", "itk")
    add("--format", choices=formats, default="cloudvolume", help="(cloudvolume)")
    int16 = "of the volume; int16 holds quarter pixels (float32)"
    add("--dtype", choices=("float32", "int16"), default="float32", help=int16)
    order = "axes that channel 0 and 1 displace along (yx, as corgie has it)"
    add("--channel_order", choices=("yx", "xy"), default="yx", help=order)
    unit = "relative: pixels of the fields' mip, as corgie has it; or mip0 (relative)"
    add("--field_unit", choices=("relative", "mip0"), default="relative", help=unit)
    warped = "folder for two volumes more: the images before and after"
    add("--warped", help=warped)
    like = "volume whose bounds and resolution new ones get (those of what is written)"
    add("--like", help=like)
    nm = {"type": float, "nargs": 3, "metavar": ("X", "Y", "Z")}
    add("--resolution", **nm, help="nm of a mip-0 voxel, if the sets do not say")
    onto = "only fields onto the section so far from src, for example -1 (all)"
    add("--tgt_offset", type=int, help=onto)
    which = "whose values count where several pairs cover a pixel (must be equal)"
    add("--overlap", choices=("first", "last"), help=which)
    add("--overwrite", action="store_true", help="replace what is there")


def _add_points(commands) -> None:
    """The two commands that make a data set from a list of points."""
    spec = _command(commands, "create-spec", "a spec of pairs at points", _create_spec)
    add = spec.add_argument
    path = {"type": Path, "required": True}
    add("--src_spec_path", **path, help="template: a spec (JSON), with pairs or none")
    points = "CSV: neuroglancer's export of annotations, or columns x0, y0, z0"
    add("--points_path", **path, help=points)
    add("--dst_spec_path", **path, help="spec to write")
    offsets = "a pair a point each: src at z, tgt at z + offset (-1)"
    add("--offsets", type=int, nargs="+", default=[-1], help=offsets)
    add("--overwrite", action="store_true", help="replace another file")

    make = _command(commands, "make-dataset", "image sets from a spec", _make_dataset)
    add = make.add_argument
    add("--spec_path", **path, help="spec (JSON), from create-spec")
    dst = "folder for h5 files; with a scheme (gs://, file://) CloudVolumes"
    add("--dst_path", required=True, help=dst)
    tag = "training whose stage 1 starts from the fields (precomputed)"
    add("--checkpoint_name", default="precomputed", help=tag)
    parallel = "batches of cut-outs at a time (1); 4 to 16 for cloud paths"
    add("--parallel", type=int, default=1, help=parallel)
    add("--overwrite", action="store_true", help="replace what another spec made")
    verify = "check each pair's checksum in the h5 files at the end: reads them once"
    add("--verify", action="store_true", help=verify)


def _command(commands, name, help_text, run) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=help_text, description=help_text, allow_abbrev=False
    )
    parser.register("type", Path, cli.local_path)
    parser.set_defaults(run=run)
    return parser


def _init(args: argparse.Namespace) -> None:
    from metroem.scaffold import init_pyramid

    init_pyramid(args.pyramid, args.mips, args.template)


def _fetch(args: argparse.Namespace) -> None:
    from metroem.scaffold import fetch

    is_local = "://" not in args.source.removeprefix("file://")
    is_trusted = (lambda code: True) if args.trust or is_local else _is_trusted
    fetch(args.source, args.pyramid, is_trusted)


def _is_trusted(code: str) -> bool:
    """Ask whoever sits at the terminal; nobody there means no."""
    sys.stderr.write(
        f"These modules bring code, which runs when they are loaded:\n{code}\n"
    )
    return cli.confirms("Keep them?")


def _inspect(args: argparse.Namespace) -> None:
    from metroem.inspect import InspectRequest, inspect_dataset

    inspect_dataset(InspectRequest(**_flags(args)))


def _evaluate(args: argparse.Namespace) -> None:
    from metroem.evaluate import EvaluateRequest, evaluate_dataset

    evaluate_dataset(EvaluateRequest(**_flags(args)))


def _write_fields(args: argparse.Namespace) -> None:
    from metroem.training.distributed import choose_device, launch
    from metroem.training.requests import TrainRequest
    from metroem.training.run import train_pyramid

    flags = _flags(args)
    request = TrainRequest(
        train_stages=[],
        generate_field_stages=flags.pop("stages"),
        redirect_stdout=False,
        **flags,
    )
    if ranks := request.ranks_to_launch:
        choose_device(request.device, request.gpus)  # refused once, not by each rank
        sys.exit(launch("metroem", args.argv, ranks=ranks, port=request.port))
    train_pyramid(request)


def _export(args: argparse.Namespace) -> None:
    from metroem.export.run import ExportRequest, export_fields

    export_fields(ExportRequest(**_flags(args)))


def _create_spec(args: argparse.Namespace) -> None:
    from metroem.create.points import SpecRequest, create_spec

    create_spec(SpecRequest(**_flags(args)))


def _make_dataset(args: argparse.Namespace) -> None:
    from metroem.create.pairs import DatasetRequest, make_dataset

    make_dataset(DatasetRequest(**_flags(args)))


def _demo(args: argparse.Namespace) -> None:
    from metroem.demo import DemoRequest, run_demo

    run_demo(DemoRequest(args.folder))


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """What a command was given."""
    return {k: v for k, v in vars(args).items() if k not in ("command", "run", "argv")}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run its command."""
    arguments = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(arguments)
    args.argv = arguments
    args.run(args)


def entry_point() -> None:
    """The console script `metroem`."""
    cli.run(main)


if __name__ == "__main__":
    entry_point()
