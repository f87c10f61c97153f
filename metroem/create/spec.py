"""The spec of a data set from a list of points, a JSON file.

    image     path, src_mip, reference: what normalises (left out: kept as stored)
    field     path, src_mip, reference: what is profiled (left out: the patch);
              channel_order, field_unit, int16_scale: what its values are. May be
              left out as a whole
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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from metroem.create.stored_field import FieldFormat
from metroem.errors import UsageError
from metroem.grid import Grid
from metroem.specs.checks import check_keys, check_list, check_object, read_json

_AREA = ("path", "src_mip", "dst_mip", "x_size", "y_size")
_FORM = ("channel_order", "field_unit", "int16_scale")
# As the original took the fields of a spec, and corgie writes its channels.
_FORM_DEFAULTS = {"channel_order": "yx", "field_unit": "mip0"}


class Center(NamedTuple):
    """The centre of one side of a pair, mip-0 pixels and section."""

    x: int
    y: int
    z: int


@dataclass(frozen=True)
class AreaSpec:
    """An area around the centre of each patch.

    Attributes:
        path: volume.
        src_mip: mip that is read.
        dst_mip: of whose pixels the sizes are.
        x_size: along the volume's x, pixels of dst_mip.
        y_size: along the volume's y, pixels of dst_mip.
    """

    path: str
    src_mip: int
    dst_mip: int
    x_size: int
    y_size: int


@dataclass(frozen=True)
class ImageSpec:
    """Where images come from, and what normalises them; None: nothing does."""

    path: str
    src_mip: int
    reference: AreaSpec | None


@dataclass(frozen=True)
class FieldSpec:
    """Where prior fields come from, what they are, and what profiles them."""

    path: str
    src_mip: int
    form: FieldFormat
    reference: AreaSpec


@dataclass(frozen=True)
class MaskSpec:
    """A volume whose values >= `threshold` at `src_mip` mark what is blanked."""

    path: str
    src_mip: int
    threshold: float


@dataclass(frozen=True)
class DatasetSpec:
    """All that a data set from points is made of; see the module.

    Attributes:
        image: source of the images.
        field: source of the prior fields, or None.
        masks: what is blanked, one or the other.
        max_mip: of whose pixels the corners of all patches are.
        dst_mip: of the images.
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
        """The area of an image, centred as far as pixels of max_mip allow."""
        x, y = (
            (at - (size << self.dst_mip) // 2) >> self.max_mip << self.max_mip
            for at, size in zip(center[:2], (self.x_size, self.y_size), strict=True)
        )
        return Grid(self.dst_mip, x, y, self.x_size, self.y_size)

    @property
    def translation_mip(self) -> int:
        """The mip whose pixels the translations of the field are: its reference's.

        Where the patch is profiled, `max_mip`, as its corner is of: all mips of the
        same pairs have to be moved alike.
        """
        assert self.field is not None
        area = self.field.reference
        patch = (self.dst_mip, self.x_size, self.y_size)
        is_patch = (area.dst_mip, area.x_size, area.y_size) == patch
        return self.max_mip if is_patch else area.dst_mip

    def as_request(self) -> dict:
        """What the content of the files depends on; pairs as a digest, since
        attributes of a file end at 64 KiB.
        """
        tree = asdict(self)
        pairs = json.dumps(tree.pop("pairs")).encode()
        return tree | {
            "num_pairs": len(self.pairs),
            "pairs_sha256": hashlib.sha256(pairs).hexdigest(),
        }


def load_spec(path: Path) -> DatasetSpec:
    """Read the spec that make-dataset works by.

    Raises:
        UsageError: no such file, no JSON, no pairs, an unknown key, or a value of
            the wrong kind; the message says where.
    """
    spec = parse_spec(read_json(path, f"--spec_path {path}"), str(path))
    if not spec.pairs:
        raise UsageError(
            f"--spec_path {path}: no pairs; add some with python -m metroem create-spec"
        )
    return spec


def parse_spec(tree: Any, where: str) -> DatasetSpec:
    """Check a decoded spec; UsageError, which says where, if it is wrong.

    Args:
        tree: decoded JSON; "pairs" may be left out.
        where: its place, for messages.
    """
    tree = check_object(tree, where)
    sizes = ("max_mip", "dst_mip", "x_size", "y_size")
    check_keys(tree, ("image", "field", "masks", *sizes, "pairs"), where)
    numbers = {key: _whole(tree, key, where, at_least=_least(key)) for key in sizes}
    spec = DatasetSpec(
        image=_image(_required(tree, "image", where), f"{where}: image"),
        field=_field(tree, f"{where}: field", numbers) if tree.get("field") else None,
        masks=tuple(
            _mask(mask, f"{where}: masks {number}")
            for number, mask in enumerate(check_list(tree.get("masks", []), where))
        ),
        pairs=tuple(
            _pair(pair, f"{where}: pairs {number}")
            for number, pair in enumerate(check_list(tree.get("pairs", []), where))
        ),
        **numbers,
    )
    _check_mips(spec, where)
    return spec


def _check_mips(spec: DatasetSpec, where: str) -> None:
    """Refuse mips that cannot be brought together."""
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


def _image(tree: Any, where: str) -> ImageSpec:
    tree = check_object(tree, where)
    check_keys(tree, ("path", "src_mip", "reference"), where)
    reference = tree.get("reference")
    return ImageSpec(
        _text(tree, "path", where),
        _whole(tree, "src_mip", where),
        None if reference is None else _area(reference, f"{where}: reference"),
    )


def _field(tree: Mapping, where: str, root: Mapping[str, int]) -> FieldSpec:
    """The field of a spec; without a reference the patch itself is profiled."""
    field = check_object(tree["field"], where)
    check_keys(field, ("path", "src_mip", "reference", *_FORM), where)
    path, src_mip = _text(field, "path", where), _whole(field, "src_mip", where)
    reference = field.get("reference")
    if reference is None:
        reference = {"path": path, "src_mip": src_mip}
        reference |= {key: root[key] for key in _AREA if key in root}
    form: dict[str, Any] = {k: field[k] for k in _FORM if field.get(k) is not None}
    if not isinstance(form.get("int16_scale", 1), int | float):
        raise UsageError(f"{where}: int16_scale is {form['int16_scale']!r}: no number")
    try:
        known = FieldFormat(**{**_FORM_DEFAULTS, **form})
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return FieldSpec(path, src_mip, known, _area(reference, f"{where}: reference"))


def _mask(tree: Any, where: str) -> MaskSpec:
    tree = check_object(tree, where)
    check_keys(tree, ("path", "src_mip", "threshold"), where)
    threshold = _required(tree, "threshold", where)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise UsageError(f"{where}: threshold is {threshold!r}: expected a number")
    return MaskSpec(
        _text(tree, "path", where), _whole(tree, "src_mip", where), threshold
    )


def _area(tree: Any, where: str) -> AreaSpec:
    tree = check_object(tree, where)
    check_keys(tree, _AREA, where)
    numbers = {k: _whole(tree, k, where, at_least=_least(k)) for k in _AREA[1:]}
    return AreaSpec(_text(tree, "path", where), **numbers)


def _pair(tree: Any, where: str) -> tuple[Center, Center]:
    sides = check_list(tree, where)
    if len(sides) != 2:
        raise UsageError(f"{where}: expected src and tgt, got {len(sides)} places")
    src, tgt = (_center(side, where) for side in sides)
    if src.z == tgt.z:
        raise UsageError(f"{where}: src and tgt are the same section, {src.z}")
    return src, tgt


def _center(tree: Any, where: str) -> Center:
    tree = check_object(tree, where)
    check_keys(tree, Center._fields, where)
    read: Callable = _whole
    return Center(*(read(tree, key, where, at_least=None) for key in Center._fields))


def _required(tree: Mapping, key: str, where: str) -> Any:
    if key not in tree:
        raise UsageError(f"{where}: {key} is missing")
    return tree[key]


def _text(tree: Mapping, key: str, where: str) -> str:
    value = _required(tree, key, where)
    if not isinstance(value, str) or not value:
        raise UsageError(f"{where}: {key} is {value!r}: expected a path")
    return value


def _whole(tree: Mapping, key: str, where: str, at_least: int | None = 0) -> int:
    value = _required(tree, key, where)
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or (at_least is not None and value < at_least):
        least = "" if at_least is None else f" >= {at_least}"
        raise UsageError(f"{where}: {key} is {value!r}: expected a whole number{least}")
    return value


def _least(key: str) -> int:
    return 0 if key.endswith("mip") else 1
