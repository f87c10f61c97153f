#!python
r"""Make a field set from a CloudVolume of displacements, for stage 1 to start from.

The set replaces the fields of stage 0 of the checkpoint --suffix:
train.py --checkpoint_name SUFFIX --train_stages 1 --generate_field_stages 1 uses
it. Fields are pull (inverse) displacements.

Channel order and unit differ between volumes. By default channel 0 is the displacement
along x and channel 1 along y, in mip-0 pixels. For volumes that corgie wrote, give
--channel_order yx --field_unit relative.

The same command resumes a download that was stopped.

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
    # Slow to import, so only after the flags have been checked.
    from metroem.prepare.download_field import download_field

    download_field(request)


if __name__ == "__main__":
    cli.run(main)
