"""Images that a downloaded field moved: what belongs together, and what to do if not.

`download_image.py --field_dset` reads each side of a pair where the translation of a
field points to. All mips of a place, and the fields that are used with them, have to
be moved alike. Files of the original do not say how they were moved.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from metroem.io.h5_read import FieldSet, ImageSet
from metroem.specs.filenames import FieldSetName

SIDES = ("src", "tgt")


class Unlike(NamedTuple):
    """A side whose field had another translation taken out than moved its images."""

    side: int
    taken_out: tuple[int, int]  # x, y, mip-0 pixels
    moved: tuple[int, int]


def unlike_offsets(fields: FieldSet, images: ImageSet, index: int) -> Iterator[Unlike]:
    """The sides of a pair whose images were not moved as its field has it.

    Fields of src alone that version 1.0.0 wrote do not say how images were moved.
    """
    taken = [fields.offset(index, side) for side in (0, 1)]
    if images.is_original or (fields.num_sides == 1 and not any(map(any, taken))):
        return
    for side, taken_out in enumerate(taken):
        moved = images.offset(index, side)
        if taken_out != moved:
            yield Unlike(side, taken_out, moved)


def moved_apart(one: ImageSet, other: ImageSet) -> str:
    """How two mips of a place were moved unlike, and what to do; "" if they were not.

    Args:
        one: of the same place and number of pairs as `other`.
        other: its name is said where the words are shown.
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
    """The command that makes an image set anew, moved as a field set has it."""
    if "cv_path" not in images.request:
        return f"download_image.py ... --field_dset {fields}"
    made_by = str(images.attributes.get("command", ""))
    if not made_by.startswith("download_image"):  # from Python
        made_by = "download_image.py ..."
    words = ["--mip", str(images.mip), "--patch_size", str(images.shape[0])]
    words += ["--field_dset", str(fields)]
    # What was not moved yet is replaced without it.
    words += ["--overwrite"] if images.request.get("offsets") else []
    return f"{made_by} {shlex.join(words)}"


def _remedy(one: ImageSet, other: ImageSet, index: int) -> str:
    if "cv_path" not in one.request and "cv_path" not in other.request:
        return (
            "make both mips with make-dataset from specs that have the same field and "
            "reference of the field"
        )
    for fields in _downloaded(one):
        for moved, rest in ((one, other), (other, one)):
            if next(unlike_offsets(fields, moved, index), None) is not None:
                continue
            offsets = [fields.offset(index, side) for side in (0, 1)]
            if any(value % (1 << rest.mip) for side in offsets for value in side):
                return (
                    f"mip {rest.mip} cannot be moved by {fields.path.name}: download "
                    f"it with --dst_mip {rest.mip} or coarser, and then the images of "
                    "all mips with --field_dset"
                )
            command = command_to_move(rest, fields.path)
            return f"move mip {rest.mip} too: {command}"
    return "download both mips with the same --field_dset"


def _downloaded(images: ImageSet) -> Iterator[FieldSet]:
    """The field sets of a place that have fields of tgt."""
    for path in sorted(images.path.parent.glob("field_*.h5")):
        name = FieldSetName.parse(path.name)
        if name is None or name.place != images.name.place:
            continue
        fields = FieldSet(path)
        if fields.num_sides == 2 and fields.num_pairs == images.num_pairs:
            yield fields
