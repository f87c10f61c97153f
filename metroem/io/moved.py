"""Check that images of all mips, and their fields, were moved by the same translation.

`download_image.py --field_dset` reads each side of a pair at the location that the
translation of a field points to. All mips of a location, and the fields used with
them, need the same translation. Files of the original do not state it.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from metroem.io.h5_read import FieldSet, ImageSet
from metroem.specs.filenames import FieldSetName

SIDES = ("src", "tgt")


class Unlike(NamedTuple):
    """A side whose images were moved by another translation than its field states."""

    side: int
    taken_out: tuple[int, int]  # of the field, x and y, mip-0 pixels
    moved: tuple[int, int]  # of the images, x and y, mip-0 pixels


def unlike_offsets(fields: FieldSet, images: ImageSet, index: int) -> Iterator[Unlike]:
    """Yield the sides of a pair whose images and field have different translations.

    Nothing is yielded if one of them is not known: for images of the original, and for
    fields of version 1.0.0 that exist for src only.
    """
    taken = [fields.offset(index, side) for side in (0, 1)]
    if images.is_original or (fields.num_sides == 1 and not any(map(any, taken))):
        return
    for side, taken_out in enumerate(taken):
        moved = images.offset(index, side)
        if taken_out != moved:
            yield Unlike(side, taken_out, moved)


def moved_apart(one: ImageSet, other: ImageSet) -> str:
    """Say how the translations of two mips differ, and what to do; "" if they agree.

    Args:
        one: image set of the same location and number of pairs as `other`.
        other: image set that the text is about; the caller names it.
    """
    if one.is_original or other.is_original:
        return ""
    for index in range(one.num_pairs):
        for side, name in enumerate(SIDES):
            there, here = one.offset(index, side), other.offset(index, side)
            if there != here:
                return (
                    f"{name} of pair {index} was moved by {here} mip-0 px (x, y), at "
                    f"mip {one.mip} by {there}; {_remedy(one, other, index)}"
                )
    return ""


def command_to_move(images: ImageSet, fields: Path) -> str:
    """Return the command that makes an image set again, moved as a field set states."""
    if "cv_path" not in images.request:
        return f"download_image.py ... --field_dset {fields}"
    made_by = str(images.attributes.get("command", ""))
    if not made_by.startswith("download_image"):  # from Python
        made_by = "download_image.py ..."
    words = ["--mip", str(images.mip), "--patch_size", str(images.shape[0])]
    words += ["--field_dset", str(fields)]
    # Images that were not moved are replaced without this flag.
    words += ["--overwrite"] if images.request.get("offsets") else []
    return f"{made_by} {shlex.join(words)}"


def _remedy(one: ImageSet, other: ImageSet, index: int) -> str:
    """Say how to give two mips, which differ at pair `index`, the same translation."""
    if "cv_path" not in one.request and "cv_path" not in other.request:
        return (
            "make both mips with make-dataset from specs that have the same field and "
            "reference of the field"
        )
    for fields in _downloaded(one):
        for moved, unmoved in ((one, other), (other, one)):
            if next(unlike_offsets(fields, moved, index), None) is not None:
                continue
            offsets = [fields.offset(index, side) for side in (0, 1)]
            if any(value % (1 << unmoved.mip) for side in offsets for value in side):
                return (
                    f"mip {unmoved.mip} cannot be moved by {fields.path.name}: "
                    f"download it with --dst_mip {unmoved.mip} or coarser, and then "
                    "the images of all mips with --field_dset"
                )
            command = command_to_move(unmoved, fields.path)
            return f"move mip {unmoved.mip} too: {command}"
    return "download both mips with the same --field_dset"


def _downloaded(images: ImageSet) -> Iterator[FieldSet]:
    """Yield the downloaded field sets of a location: those with fields of tgt."""
    for path in sorted(images.path.parent.glob("field_*.h5")):
        name = FieldSetName.parse(path.name)
        if name is None or name.place != images.name.place:
            continue
        fields = FieldSet(path)
        if fields.num_sides == 2 and fields.num_pairs == images.num_pairs:
            yield fields
