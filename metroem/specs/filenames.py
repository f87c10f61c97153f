"""Parse and make the file names of image sets and field sets.

    x200960_y136448_z8175_MIP5.h5                    image set
    x200960_y136448_z8175_MIP5_cleft.h5              with the suffix "cleft"
    field_0_x200960_y136448_z8175_MIP3_mine.h5       fields of stage 0 for it

Sets of all mips of one location share a `place`, "x200960_y136448_z8175[_cleft]": by it
a field set is found for an image set. x, y and z are mip-0 pixels of the first pair,
and may be negative.
"""

import re
from dataclasses import dataclass

from metroem.errors import UsageError

# File names have at most 255 bytes; a field set's has the name of an image set, too.
_MAX_CHECKPOINT_BYTES = 100
_MIP_MARK = re.compile(r"_MIP\d")
# Free text that cannot be mistaken for a mip, so that a name is split in one way only.
_FREE = r"(?!MIP\d)(?:(?!_MIP\d)[^/])+?"
# Numbers that fit into int64, and stages and mips of at most two digits.
_INT, _FEW = "-?[0-9]{1,18}", "[0-9]{1,2}"
_IMAGE_SET = re.compile(
    rf"x(?P<x>{_INT})_y(?P<y>{_INT})_z(?P<z>{_INT})"
    rf"(?:_(?P<before>{_FREE}))?_MIP(?P<mip>{_FEW})(?:_(?P<after>{_FREE}))?\.h5"
)
_FIELD_SET = re.compile(
    rf"field_(?P<stage>{_FEW})_(?P<place>{_FREE})_MIP(?P<mip>{_FEW})"
    rf"(?:_(?P<tag>{_FREE}))?\.h5"
)


def check_tag(flag: str, value: str) -> None:
    """Refuse a suffix or checkpoint name that cannot be parsed back from a file name.

    Args:
        flag: that gave it, for the message, for example "--suffix".
        value: the text.

    Raises:
        UsageError: it is empty, contains "/" or a control character, or looks like a
            mip ("MIP5", "a_MIP5").
    """
    if not value or "/" in value or not value.isprintable():
        raise UsageError(
            f"{flag} {value!r}: expected a name without '/', for example first_try"
        )
    if _MIP_MARK.search(f"_{value}"):
        raise UsageError(
            f"{flag} {value!r}: '_MIP<digits>' in it would be read as the mip of the "
            "file; leave it out, the mip is added to the name anyway"
        )


def check_checkpoint_name(value: str) -> None:
    """Refuse a --checkpoint_name that cannot name weights and a folder.

    Raises:
        UsageError: as for `check_tag`, and for "." and "..".
    """
    check_tag("--checkpoint_name", value)
    if (size := len(value.encode())) > _MAX_CHECKPOINT_BYTES:
        raise UsageError(
            f"--checkpoint_name {value}: has {size} bytes, expected at most "
            f"{_MAX_CHECKPOINT_BYTES}, since names of files contain it"
        )
    if value in (".", ".."):
        raise UsageError(
            f"--checkpoint_name {value}: is the name of another folder; expected a "
            "new name, for example first_try"
        )


@dataclass(frozen=True)
class ImageSetName:
    """The parts of an image set's file name.

    Attributes:
        x: mip-0 pixel of the corner along the volume's x.
        y: mip-0 pixel of the corner along the volume's y.
        z: src section of the first pair.
        mip: of the images.
        suffix: free text that distinguishes sets of one location, or None.

    Raises:
        UsageError: the suffix could not be parsed back.
    """

    x: int
    y: int
    z: int
    mip: int
    suffix: str | None = None

    def __post_init__(self) -> None:
        if self.suffix is not None:
            check_tag("--suffix", self.suffix)

    @property
    def place(self) -> str:
        """The part of the name that is equal for all mips of one location."""
        place = f"x{self.x}_y{self.y}_z{self.z}"
        return place if self.suffix is None else f"{place}_{self.suffix}"

    @property
    def filename(self) -> str:
        """The name, x<X>_y<Y>_z<Z>_MIP<m>[_<suffix>].h5."""
        end = "" if self.suffix is None else f"_{self.suffix}"
        return f"x{self.x}_y{self.y}_z{self.z}_MIP{self.mip}{end}.h5"

    @classmethod
    def parse(cls, filename: str) -> "ImageSetName | None":
        """Parse a whole file name; None if it is not the name of an image set.

        The suffix may also stand before the mip, as in some of the original's files.
        """
        match = _IMAGE_SET.fullmatch(filename)
        if match is None or not filename.isprintable():
            return None
        if match["before"] and match["after"]:
            return None
        x, y, z, mip = (int(match[key]) for key in ("x", "y", "z", "mip"))
        return cls(x, y, z, mip, match["before"] or match["after"])


@dataclass(frozen=True)
class FieldSetName:
    """The parts of a field set's file name.

    Attributes:
        stage: that wrote the fields.
        place: `ImageSetName.place` of the images that they belong to.
        mip: of the fields.
        tag: checkpoint that made them, or suffix of a download, or None.

    Raises:
        UsageError: place or tag could not be parsed back.
    """

    stage: int
    place: str
    mip: int
    tag: str | None = None

    def __post_init__(self) -> None:
        check_tag("place", self.place)
        if self.tag is not None:
            check_tag("--checkpoint_name (or --suffix)", self.tag)

    @property
    def filename(self) -> str:
        """The name, field_<STAGE>_<place>_MIP<m>[_<tag>].h5."""
        end = "" if self.tag is None else f"_{self.tag}"
        return f"field_{self.stage}_{self.place}_MIP{self.mip}{end}.h5"

    @classmethod
    def parse(cls, filename: str) -> "FieldSetName | None":
        """Parse a whole file name; None if it is not the name of a field set."""
        match = _FIELD_SET.fullmatch(filename)
        if match is None or not filename.isprintable():
            return None
        return cls(int(match["stage"]), match["place"], int(match["mip"]), match["tag"])
