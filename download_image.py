#!python
"""Make image sets from a CloudVolume: pairs of sections, one h5 file per mip."""

import argparse
from collections.abc import Sequence

from metroem.prepare.requests import ImageRequest
from metroem.utils import cli


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of this command."""
    return cli.script_parser(ImageRequest)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    request = cli.parse(ImageRequest, argv)
    # Slow to import, so only after the flags have been checked.
    from metroem.prepare.download_image import download_image

    download_image(request)


if __name__ == "__main__":
    cli.run(main)
