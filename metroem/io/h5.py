"""Image sets and field sets: h5 files that say what is in them.

    image set   img   (num_pairs, 2 sides, H, W) float32, side 0 src, side 1 tgt
    field set   main  (num_pairs, 2, H, W) float32: written between stages
                field (num_pairs, 2 sides, 2, H, W) float32: downloaded, or written
                      by stages after a download; the prior field of src, and what
                      warps tgt when it is loaded

Fields are pull, pixels of the file's mip, channel 0 along cols, channel 1 along
rows, kept to 0.01 px (HDF5's scaleoffset; what is closer to 0 becomes 0).

Beside them lies, for each pair,

    box         (num_pairs, 2 sides, 6) int64: x0, y0, z0, x1, y1, z1, mip-0 pixels
    offset      (num_pairs, 2 sides, 2) int64: x and y, mip-0 pixels, by which
                that side was read elsewhere (images) or what was taken out of its
                vectors (fields), which is the same
    checksum    (num_pairs,) uint32: CRC-32 of the pair's bytes, defects and all
    blank       (num_pairs, 2 sides) float32: share of pixels without data (images)
    defects     (num_pairs, 2 sides, H, W) uint8, lzf: 1 on folds, cracks and dirt
                (images, where a volume of defects was given)

as datasets, because HDF5 attributes end at 64 KiB. The rest is in attributes:
format_version, kind, source_path, mip, resolution (nm), command, request; of
images anchor and normalization; of fields unit, direction, channel_order, stage
and checkpoint.

Files of the original have none of this. For them corner and mip come from the
name, and pair i is src z + i on tgt z + i - 1.
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
