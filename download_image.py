#!python
r"""Make image sets from a CloudVolume: pairs of sections, one h5 file a mip.

Pair i has section z_start + i as src and the section before it as tgt. Files are
float32 as stored; give --normalize unless the volume is normalised already (mean
0, std 1 over tissue, 0 = no data), as with any uint8 volume.

A download that was stopped goes on with the same command.

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
    _add_area(parser)
    _add_grey_levels(parser)
    _add_files(parser)
    return parser


def _add_area(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what").add_argument
    add(
        "--cv_path",
        required=True,
        help="CloudVolume of the images: gs://, s3://, "
        "https://, file:// or a plain path",
    )
    add(
        "--mip",
        "--mips",
        dest="mips",
        type=int,
        nargs="+",
        required=True,
        help="one file each",
    )
    add(
        "--patch_size",
        "--patch_sizes",
        dest="patch_sizes",
        type=int,
        nargs="+",
        required=True,
        help="side of the patch, one a mip, pixels of that mip",
    )
    add(
        "--x_offset",
        type=int,
        default=0,
        help="corner of the patch, mip-0 pixels, a multiple of 2^mip (0)",
    )
    add("--y_offset", type=int, default=0, help="likewise (0)")
    add("--z_start", type=int, required=True, help="first src section")
    add("--z_end", type=int, required=True, help="one past the last src section")
    add(
        "--anchor",
        choices=("corner", "center"),
        default="corner",
        help="what the patches of all "
        "mips share; with center, the offsets are those of the largest (corner)",
    )


def _add_grey_levels(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("grey levels").add_argument
    add(
        "--normalize",
        action="store_true",
        help="mean 0, std 1 over tissue, by section; 0 stays 0",
    )
    add("--reference_path", help="volume whose statistics normalise (--cv_path)")
    add("--reference_mip", type=int, help="mip of the reference area (the patch's)")
    add(
        "--reference_size",
        type=int,
        help="side of the reference area, centred on "
        "the patch, pixels of its mip (the patch's area)",
    )
    add(
        "--cv_path_defects",
        help="CloudVolume of defects, which are blanked; read at "
        "the mip of the images, so it must be written there",
    )
    add("--mask_val", type=float, default=1, help="values >= this are defects (1)")


def _add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("files").add_argument
    add("--dst_folder", type=Path, default=Path("dataset01"), help="(./dataset01)")
    add("--suffix", help="text in the file names, for several sets of one place")
    add(
        "--field_dset",
        type=Path,
        help="downloaded field set whose offsets move each cut-out",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace files that other arguments made",
    )
    add(
        "--parallel",
        type=int,
        default=1,
        help="layers of chunks read at a time (1); 4 to 16 for cloud paths",
    )


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
