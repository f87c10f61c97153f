"""Read the spec of a data set from points, a JSON file.

    image     path, src_mip; reference: its mean and standard deviation normalise
              (left out: images are kept as stored)
    field     optional: path, src_mip; reference: its mean is the translation (left
              out: the patch's); channel_order, field_unit, int16_scale: format of
              the values
    masks     list of path, src_mip, threshold: values >= threshold are blanked
    max_mip   corners of all patches are multiples of 2^max_mip, and so are the
              translations of a field whose reference is left out
    dst_mip, x_size, y_size    mip and size of the images that are made
    pairs     list of [src, tgt], each x, y, z of its centre, mip-0 pixels

A reference is path, src_mip, dst_mip, x_size, y_size: an area around the centre
of the patch, x_size by y_size pixels of its dst_mip, read at its src_mip.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from metroem.errors import UsageError
from metroem.geometry.grid import Grid
from metroem.specs.parse_json import Count, Spec, Whole, parse, read_json

if TYPE_CHECKING:
    from metroem.io.field_volume import FieldFormat

VolumePath = Annotated[str, Meta(min_length=1, title="a path")]


class Center(NamedTuple):
    """The centre of one side of a pair, mip-0 pixels and section."""

    x: int
    y: int
    z: int


class AreaSpec(Spec, frozen=True):
    """An area around the centre of each patch.

    Attributes:
        path: volume.
        src_mip: mip that is read.
        dst_mip: mip whose pixels the sizes count.
        x_size: along the volume's x, pixels of dst_mip.
        y_size: along the volume's y, pixels of dst_mip.
    """

    path: VolumePath
    src_mip: Whole
    dst_mip: Whole
    x_size: Count
    y_size: Count


class ImageSpec(Spec, frozen=True):
    """Volume of the images, and the area that normalises them; None: as stored."""

    path: VolumePath
    src_mip: Whole
    reference: AreaSpec | None = None


@dataclass(frozen=True)
class FieldSpec:
    """Volume and format of the prior fields, and the area of their translation."""

    path: str
    src_mip: int
    form: "FieldFormat"
    reference: AreaSpec


class MaskSpec(Spec, frozen=True):
    """A volume whose values >= `threshold` at `src_mip` mark pixels to blank."""

    path: VolumePath
    src_mip: Whole
    # An integer stays an integer, since files state it.
    threshold: Annotated[int | float, Meta(title="a number")]


class _CenterJson(Spec, frozen=True):
    x: int
    y: int
    z: int


class _FieldJson(Spec, frozen=True):
    path: VolumePath
    src_mip: Whole
    reference: AreaSpec | None = None
    channel_order: Literal["xy", "yx"] | None = None
    field_unit: Literal["mip0", "relative"] | None = None
    int16_scale: Annotated[int | float, Meta(title="a number above 0")] | None = None


class _DatasetJson(Spec, frozen=True, kw_only=True):
    image: ImageSpec
    field: _FieldJson | None = None
    masks: tuple[MaskSpec, ...] = ()
    max_mip: Whole
    dst_mip: Whole
    x_size: Count
    y_size: Count
    pairs: tuple[
        Annotated[tuple[_CenterJson, _CenterJson], Meta(title="src and tgt")], ...
    ] = ()


@dataclass(frozen=True)
class DatasetSpec:
    """All settings of a data set from points; see the module.

    Attributes:
        image: source of the images.
        field: source of the prior fields, or None.
        masks: a pixel that any of them marks is blanked.
        max_mip: corners of all patches are whole pixels of this mip.
        dst_mip: mip of the images.
        x_size: rows of an image, along the volume's x.
        y_size: cols of an image, along the volume's y.
        pairs: src and tgt.
    """

    image: ImageSpec
    field: FieldSpec | None
    masks: tuple[MaskSpec, ...]
    max_mip: int
    dst_mip: int
    x_size: int
    y_size: int
    pairs: tuple[tuple[Center, Center], ...]

    def patch(self, center: Center) -> Grid:
        """The area of an image around its centre, with its corner on max_mip pixels."""
        x, y = (
            (at - (size << self.dst_mip) // 2) >> self.max_mip << self.max_mip
            for at, size in zip(center[:2], (self.x_size, self.y_size), strict=True)
        )
        return Grid(self.dst_mip, x, y, self.x_size, self.y_size)

    @property
    def translation_mip(self) -> int:
        """Translations of the field are whole pixels of this mip.

        It is the dst_mip of the field's reference. If the reference is the patch
        itself it is `max_mip`, since all mips of the same pairs must move alike.
        """
        assert self.field is not None
        area = self.field.reference
        patch = (self.dst_mip, self.x_size, self.y_size)
        is_patch = (area.dst_mip, area.x_size, area.y_size) == patch
        return self.max_mip if is_patch else area.dst_mip

    def as_request(self) -> dict:
        """All settings that determine the content of the files.

        Pairs are a digest, since an attribute of a file holds at most 64 KiB.
        """
        tree = msgspec.to_builtins(self)
        pairs = json.dumps(tree.pop("pairs")).encode()
        return tree | {
            "num_pairs": len(self.pairs),
            "pairs_sha256": hashlib.sha256(pairs).hexdigest(),
        }


def load_spec(path: Path) -> DatasetSpec:
    """Read the spec of make-dataset.

    Raises:
        UsageError: no such file, not JSON, no pairs, an unknown key, or a value of
            the wrong kind; the message says where.
    """
    spec = parse_spec(read_json(path, f"--spec_path {path}"), str(path))
    if not spec.pairs:
        raise UsageError(
            f"--spec_path {path}: no pairs; add some with metroem create-spec"
        )
    return spec


def parse_spec(tree: Any, where: str) -> DatasetSpec:
    """Check a decoded spec.

    Args:
        tree: decoded JSON; "pairs" may be left out.
        where: flag and path of the file, for messages.

    Raises:
        UsageError: an unknown key or a wrong value; the message says where.
    """
    if isinstance(tree, dict) and not tree.get("field", True):
        tree = {key: value for key, value in tree.items() if key != "field"}
    read = parse(tree, _DatasetJson, where)
    spec = DatasetSpec(
        image=read.image,
        field=_field(read, where) if read.field else None,
        masks=read.masks,
        pairs=tuple(
            (Center(src.x, src.y, src.z), Center(tgt.x, tgt.y, tgt.z))
            for src, tgt in read.pairs
        ),
        max_mip=read.max_mip,
        dst_mip=read.dst_mip,
        x_size=read.x_size,
        y_size=read.y_size,
    )
    for number, (src, tgt) in enumerate(spec.pairs):
        if src.z == tgt.z:
            raise UsageError(
                f"{where}: pairs {number}: src and tgt are the same section, {src.z}"
            )
    _check_mips(spec, where)
    return spec


def _field(read: _DatasetJson, where: str) -> FieldSpec:
    """Read the field of a spec; without a reference its translation is the patch's."""
    from metroem.io.field_volume import FieldFormat  # imports torch

    field = read.field
    assert field is not None
    try:
        # Defaults of the original; corgie writes its channels in this order.
        form = FieldFormat(
            field.channel_order or "yx", field.field_unit or "mip0", field.int16_scale
        )
    except UsageError as error:
        raise UsageError(f"{where}: field: {error}") from None
    reference = field.reference or AreaSpec(
        field.path, field.src_mip, read.dst_mip, read.x_size, read.y_size
    )
    return FieldSpec(field.path, field.src_mip, form, reference)


def _check_mips(spec: DatasetSpec, where: str) -> None:
    """Refuse mips that images or fields cannot be resampled between."""
    if spec.max_mip < spec.dst_mip:
        raise UsageError(
            f"{where}: max_mip {spec.max_mip}: expected the coarsest mip of the data "
            f"set, so at least the dst_mip {spec.dst_mip}"
        )
    if spec.image.src_mip > spec.dst_mip:
        raise UsageError(
            f"{where}: image: src_mip {spec.image.src_mip}: expected at most the "
            f"dst_mip {spec.dst_mip}, since images are only averaged to coarser mips"
        )
    if spec.field is None:
        return
    if spec.field.src_mip < spec.dst_mip:
        raise UsageError(
            f"{where}: field: src_mip {spec.field.src_mip}: expected at least the "
            f"dst_mip {spec.dst_mip}, since a field is only resampled to finer mips"
        )
    if spec.field.reference.dst_mip < spec.dst_mip:
        raise UsageError(
            f"{where}: field: reference: dst_mip {spec.field.reference.dst_mip}: "
            f"expected at least the dst_mip {spec.dst_mip} of the images; translations "
            "are whole pixels of it"
        )
