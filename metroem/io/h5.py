"""Define the h5 files of image sets and field sets, which describe their own content.

    image set   img   (num_pairs, 2 sides, H, W) float32, side 0 src, side 1 tgt
    field set   main  (num_pairs, 2, H, W) float32: written between stages
                field (num_pairs, 2 sides, 2, H, W) float32: downloaded, or written
                      by stages after a download. Side 0 is the prior field of src;
                      side 1 warps tgt when it is loaded

Fields are pull, in pixels of the file's mip, channel 0 along cols, channel 1 along
rows. They are rounded to 0.01 px (HDF5's scaleoffset); smaller values become 0.

The files have these datasets for each pair:

    box         (num_pairs, 2 sides, 6) int64: x0, y0, z0, x1, y1, z1, mip-0 pixels
    offset      (num_pairs, 2 sides, 2) int64: x and y, mip-0 pixels. In image sets, by
                how much the side was read away from the frame. In field sets, the
                translation taken out of the vectors. The two are equal
    checksum    (num_pairs,) uint32: CRC-32 of the pair's bytes, including defects
    blank       (num_pairs, 2 sides) float32: fraction of pixels without data (images)
    defects     (num_pairs, 2 sides, H, W) uint8, lzf: 1 on folds, cracks and dirt
                (images, if a volume of defects was given)

They are datasets since HDF5 attributes are limited to 64 KiB. Attributes of both kinds
are format_version, kind, source_path, mip, resolution (nm), command and request. Image
sets add anchor and normalization. Field sets add unit, direction, channel_order, stage
and checkpoint.

Files of the original have none of this. Their corner and mip come from the file name,
and pair i is src z + i on tgt z + i - 1.
"""

from metroem.io.h5_checks import verify
from metroem.io.h5_read import (
    Box,
    FieldSet,
    ImageSet,
    Pair,
    find_field_sets,
    find_image_sets,
)
from metroem.io.h5_write import (
    FieldSetMeta,
    ImageSetMeta,
    PairLocation,
    write_field_set,
    write_image_set,
)

__all__ = [
    "Box",
    "FieldSet",
    "FieldSetMeta",
    "ImageSet",
    "ImageSetMeta",
    "Pair",
    "PairLocation",
    "find_field_sets",
    "find_image_sets",
    "verify",
    "write_field_set",
    "write_image_set",
]
