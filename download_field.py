#!python
"""Make a field set from a CloudVolume of displacements, for stage 1 to start from."""

import argparse
from collections.abc import Sequence

from metroem.prepare.requests import FieldRequest
from metroem.utils import cli


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of this command."""
    return cli.script_parser(FieldRequest)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    request = cli.parse(FieldRequest, argv)
    # Slow to import, so only after the flags have been checked.
    from metroem.prepare.download_field import download_field

    download_field(request)


if __name__ == "__main__":
    cli.run(main)
