#!python
r"""Make image sets from a CloudVolume: pairs of sections, one h5 file a mip.

Pair i has section z_start + i as src and the section before it as tgt. Files are
float32 as stored; give --normalize unless the volume is normalised already (mean
0, std 1 over tissue, 0 = no data), as with any uint8 volume.

A download that was stopped goes on with the same command. --field_dset moves the
images; those that are there unmoved are replaced, the other mips of the place too.

Example:
    python download_image.py --cv_path gs://bucket/em --dst_folder data \
        --mip 5 3 --patch_size 512 2048 --normalize \
        --x_offset 200960 --y_offset 136448 --z_start 8175 --z_end 8180
"""

import argparse
from collections.abc import Sequence

from metroem.prepare.requests import ImageRequest
from metroem.utils import cli


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of this command."""
    return cli.parser(__doc__, ImageRequest)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    request = cli.parse(ImageRequest, __doc__, argv)
    # Slow to import, so only when the request has been checked.
    from metroem.prepare.download_image import download_image

    download_image(request)


if __name__ == "__main__":
    cli.run(main)
