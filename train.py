#!python
r"""Train the modules of a pyramid, coarse to fine, on downloaded pairs.

For each stage in order: train its module, then write its fields for every image
set, at the next stage's mip, where the next stage starts from. A run that was
stopped goes on where it was when the same command is given again.

Example:
    python train.py --pyramid_path pyramid --dataset_path data --train_mode scratch
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from metroem import cli


def build_parser() -> argparse.ArgumentParser:
    """The flags of `metroem.training.requests.TrainRequest`."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("what is trained").add_argument
    add("--pyramid_path", type=Path, required=True, help="directory of modules")
    add("--dataset_path", type=Path, required=True, help="folder of image sets")
    fields = "folder of field sets, written and read (--dataset_path)"
    add("--fields_path", type=Path, help=fields)
    add("--checkpoint_name", default="checkpoint", help="name of the weights")
    modes = ("scratch", "aligned", "finetune", "classic", "classic_finetune", "custom")
    mode = "which schedule (scratch)"
    add("--train_mode", type=str.lower, choices=modes, default="scratch", help=mode)
    add("--train_params_path", type=Path, help="schedule (JSON) of --train_mode custom")
    stages = "stages to train (all); without a number: none"
    add("--train_stages", type=int, nargs="*", help=stages)
    fields = "stages to write fields of (all that can); without a number: none"
    add("--generate_field_stages", type=int, nargs="*", help=fields)
    add("--val_pairs", type=int, default=2, help="pairs held out for validation (2)")
    add("--max_epochs", type=int, help="cap on the epochs of each phase")
    add("--max_minutes", type=float, help="stop cleanly after so long")
    verify = (
        "check each pair's checksum before its first read: each worker (of each rank) "
        "reads all of its pairs once more, whole"
    )
    add("--verify", action="store_true", help=verify)
    add("--restart", action="store_true", help="begin the stages to train anew")
    _add_machine_flags(parser)
    return parser


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how it is run").add_argument
    gpus = "GPUs, as 3 or 0,1,2: that many ranks (the first, if there is one)"
    add("--gpu", help=gpus)
    devices, device = ("auto", "cpu", "cuda"), "auto takes a GPU if there is one"
    add("--device", choices=devices, default="auto", help=device)
    add("--port", type=int, help="where the ranks of --gpu meet (any that is free)")
    add("--seed", type=int, default=0, help="of all chance (0)")
    add("--batch_size", type=int, help="pairs of a step over all ranks (one a rank)")
    readers = "processes that read, a rank (up to 8 beside a GPU, else 0)"
    add("--num_workers", type=int, help=readers)
    precision = "inside the network (fp32)"
    add("--precision", choices=("fp32", "bf16"), default="fp32", help=precision)
    average = (
        "decay of a moving average of the weights, kept in their place, all phases"
    )
    add("--ema", type=float, metavar="DECAY", help=average)
    faster = "torch.compile the network: minutes a stage, for each size of its samples"
    add("--compile", action="store_true", help=faster)
    again = "compute activations again instead of keeping them: less memory, more time"
    add("--checkpoint_activations", action="store_true", help=again)
    board = "curves and pictures for TensorBoard in <pyramid>/.train"
    add("--tensorboard", action="store_true", help=board)
    add(
        "--no_redirect_stdout",
        dest="redirect_stdout",
        action="store_false",
        help="do not keep the log in <pyramid>/<checkpoint_name>.log",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    arguments = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(arguments)
    from metroem.training.distributed import choose_device, launch
    from metroem.training.requests import TrainRequest
    from metroem.training.run import train_pyramid  # --help without torch

    request = TrainRequest(**vars(args))
    if ranks := request.ranks_to_launch:
        choose_device(request.device, request.gpus)  # refused once, not by each rank
        sys.exit(launch(__file__, arguments, ranks=ranks, port=request.port))
    train_pyramid(request)


if __name__ == "__main__":
    cli.run(main)
