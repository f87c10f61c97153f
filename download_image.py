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
from pathlib import Path

from metroem import cli


def build_parser() -> argparse.ArgumentParser:
    """The flags, one a field of `ImageRequest`."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    path = "CloudVolume of the images: gs://, s3://, https://, file:// or a plain path"
    add("--cv_path", required=True, help=path)
    mips = {"dest": "mips", "type": int, "nargs": "+", "required": True}
    add("--mip", "--mips", **mips, help="one file each")
    sizes = {"dest": "patch_sizes", "type": int, "nargs": "+", "required": True}
    size = "side of the patch, one a mip, pixels of that mip"
    add("--patch_size", "--patch_sizes", **sizes, help=size)
    anchor = "what the patches of all mips share; with center, the offsets are those "
    anchor += "of the largest (corner)"
    add("--anchor", choices=("corner", "center"), default="corner", help=anchor)
    add("--suffix", help="text in the file names, for several sets of one place")
    moved = "downloaded field set whose offsets move each cut-out"
    add("--field_dset", type=Path, help=moved)
    _add_grey_levels(parser)
    cli.add_download_flags(parser)
    return parser


def _add_grey_levels(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("grey levels").add_argument
    normalize = "mean 0, std 1 over tissue, by section; 0 stays 0"
    add("--normalize", action="store_true", help=normalize)
    add("--reference_path", help="volume whose statistics normalise (--cv_path)")
    add("--reference_mip", type=int, help="mip of the reference area (the patch's)")
    size = "side of the reference area, centred on the patch, pixels of its mip (the "
    add("--reference_size", type=int, help=size + "patch's area)")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = build_parser().parse_args(argv)
    from metroem.create.image import (  # --help comes without torch
        ImageRequest,
        create_image_sets,
    )

    create_image_sets(ImageRequest(**vars(args)))


if __name__ == "__main__":
    cli.run(main)
