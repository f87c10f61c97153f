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

from metroem import cli


def build_parser() -> argparse.ArgumentParser:
    """The flags, one a field of `FieldRequest`."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    path = "CloudVolume of the fields: gs://, s3://, https://, file:// or a plain path"
    add("--cv_path", required=True, help=path)
    add("--src_mip", type=int, required=True, help="mip that is read")
    dst_mip = "mip of the images that the fields are for, <= src_mip"
    add("--dst_mip", type=int, required=True, help=dst_mip)
    size = {"dest": "patch_size", "type": int, "required": True}
    side = "side of the patch, pixels of dst_mip"
    add("--patch_size", "--patch_sizes", **size, help=side)
    add("--suffix", help="checkpoint name under which train.py finds the fields")
    place = (
        "of the image sets that the fields are for, as in their names, if it is not "
    )
    place += "the corner and z_start: x<X>_y<Y>_z<Z>[_<suffix>]"
    add("--place", help=place)
    _add_values(parser)
    cli.add_download_flags(parser)
    return parser


def _add_values(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what the volume's values are").add_argument
    order = "axes that channel 0 and 1 displace along (xy)"
    add("--channel_order", choices=("xy", "yx"), default="xy", help=order)
    unit = "mip-0 pixels, or relative: pixels of src_mip (mip0)"
    add("--field_unit", choices=("mip0", "relative"), default="mip0", help=unit)
    scale = "what 1 of an int16 volume stands for, in that unit (0.25)"
    add("--int16_scale", type=float, help=scale)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = build_parser().parse_args(argv)
    from metroem.create.field import (  # --help comes without torch
        FieldRequest,
        create_field_set,
    )

    create_field_set(FieldRequest(**vars(args)))


if __name__ == "__main__":
    cli.run(main)
