#!python
r"""Make image sets from a CloudVolume: pairs of sections, one h5 file per mip.

In pair i, section z_start + i is src and the section before it is tgt. Files are
float32, and grey levels stay as stored. Give --normalize unless the volume already has
mean 0 and std 1 over tissue, and 0 for no data; any uint8 volume needs it.

The same command resumes a download that was stopped. --field_dset moves the images;
existing images that were not moved are replaced, at all mips of the location.

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
    # Slow to import, so only after the flags have been checked.
    from metroem.prepare.download_image import download_image

    download_image(request)


if __name__ == "__main__":
    cli.run(main)
