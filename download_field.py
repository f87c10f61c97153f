#!python
r"""Make a field set from a CloudVolume of displacements, for stage 1 to start from.

The set stands for what stage 0 of the checkpoint --suffix would have written:
train.py --checkpoint_name SUFFIX --train_stages 1 --generate_field_stages 1 uses
it. Fields are pull (inverse) displacements.

Volumes differ in what their channels are. By default channel 0 is the displacement
along x and 1 along y, in mip-0 pixels. corgie writes --channel_order yx
--field_unit relative.

A download that was stopped goes on with the same command.

Example:
    python download_field.py --cv_path gs://bucket/field --dst_folder data \
        --src_mip 7 --dst_mip 5 --patch_size 512 --suffix precomputed \
        --x_offset 200960 --y_offset 136448 --z_start 8175 --z_end 8180
"""

import argparse
from collections.abc import Sequence

from metroem.prepare.requests import FieldRequest
from metroem.utils import cli


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of this command."""
    return cli.parser(__doc__, FieldRequest)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    request = cli.parse(FieldRequest, __doc__, argv)
    # Slow to import, so only when the request has been checked.
    from metroem.prepare.download_field import download_field

    download_field(request)


if __name__ == "__main__":
    cli.run(main)
