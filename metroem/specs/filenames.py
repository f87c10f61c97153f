"""Names of image sets and field sets: what they state, and back.

    x200960_y136448_z8175_MIP5.h5                    image set
    x200960_y136448_z8175_MIP5_cleft.h5              with the suffix "cleft"
    field_0_x200960_y136448_z8175_MIP3_mine.h5       fields of stage 0 for it

All mips of one place share a `place`, "x200960_y136448_z8175[_cleft]", which is
how a field set is found for an image set. x, y and z are those of the first
pair, mip-0 pixels, and may be negative.
"""

import re
from dataclasses import dataclass

from metroem.errors import UsageError

_MIP_MARK = re.compile(r"_MIP\d")
# Free text that cannot be taken for a mip, and so cannot shift where a name splits.
_FREE = r"(?!MIP\d)(?:(?!_MIP\d)[^/])+?"
# Numbers that int64 holds, and mips that 2^mip does something useful for.
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
    """Refuse a suffix or checkpoint name that a file name would not give back.

    Args:
        flag: where it came from, for the message: "--suffix".
        value: the text.

    Raises:
        UsageError: it is empty, holds "/" or a control character, or looks
            like a mip ("MIP5", "a_MIP5").
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
    """Refuse a --checkpoint_name that names neither weights nor a folder of its own.

    Raises:
        UsageError: as `check_tag`, and for "." and "..".
    """
    check_tag("--checkpoint_name", value)
    if value in (".", ".."):
        raise UsageError(
            f"--checkpoint_name {value}: would be another folder's name; expected a "
            "name of its own, for example first_try"
        )


@dataclass(frozen=True)
class ImageSetName:
    """What the name of an image set states.

    Attributes:
        x: mip-0 pixel of the corner along the volume's x.
        y: mip-0 pixel of the corner along the volume's y.
        z: src section of the first pair.
        mip: of the images.
        suffix: free text that tells apart sets of one place, or None.

    Raises:
        UsageError: the suffix would not be read back.
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
        """What the sets of all mips of one place share."""
        place = f"x{self.x}_y{self.y}_z{self.z}"
        return place if self.suffix is None else f"{place}_{self.suffix}"

    @property
    def filename(self) -> str:
        """The name, x<X>_y<Y>_z<Z>_MIP<m>[_<suffix>].h5."""
        end = "" if self.suffix is None else f"_{self.suffix}"
        return f"x{self.x}_y{self.y}_z{self.z}_MIP{self.mip}{end}.h5"

    @classmethod
    def parse(cls, filename: str) -> "ImageSetName | None":
        """Read a whole file name; None when it is not an image set's.

        The suffix may stand before the mip too, as some of the original's do.
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
    """What the name of a field set states.

    Attributes:
        stage: whose output the fields are.
        place: `ImageSetName.place` of the images that they belong to.
        mip: of the fields.
        tag: checkpoint that made them, or suffix of a download, or None.

    Raises:
        UsageError: place or tag would not be read back.
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
        """Read a whole file name; None when it is not a field set's."""
        match = _FIELD_SET.fullmatch(filename)
        if match is None or not filename.isprintable():
            return None
        return cls(int(match["stage"]), match["place"], int(match["mip"]), match["tag"])
