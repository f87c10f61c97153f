#!python
"""Train the modules of a pyramid, coarse to fine, on downloaded pairs."""

import argparse
import sys
import time
from collections.abc import Sequence

from metroem.training.requests import TrainRequest
from metroem.utils import cli


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of this command."""
    return cli.script_parser(TrainRequest)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    started = time.monotonic()  # before slow imports, which --budget_minutes counts
    arguments = sys.argv[1:] if argv is None else argv
    request = cli.parse(TrainRequest, arguments)
    # Torch is slow to import, so only after the flags have been checked.
    from metroem.training.run import train_pyramid
    from metroem.utils.distributed import choose_device, launch

    if ranks := request.ranks_to_launch:
        choose_device(request.device, request.gpus)  # one error, not one per rank
        sys.exit(launch(__file__, arguments, ranks=ranks, port=request.port))
    train_pyramid(request, started)


if __name__ == "__main__":
    cli.run(main)
