"""Turn JSON into frozen objects; error messages say where the mistake is.

A kind of object is a subclass of `Spec`, whose fields are the keys. Each subclass says
`frozen=True` again, for pyright:

    lr: Annotated[NotNegative, "learning rate of Adam, its maximum"] = 0.1

`Meta(title=...)` of a type says which value is expected, for messages. The text after a
type says what the key means, for the tables of `docs/`.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from metroem.errors import MetroEMError, UsageError

T = TypeVar("T")

_MOST = sys.float_info.max  # refuses infinite numbers
Finite = Annotated[float, Meta(ge=-_MOST, le=_MOST, title="a finite number")]
NotNegative = Annotated[float, Meta(ge=0, le=_MOST, title="a number >= 0")]
Positive = Annotated[float, Meta(gt=0, le=_MOST, title="a number above 0")]
Whole = Annotated[int, Meta(ge=0, title="a whole number >= 0")]
Count = Annotated[int, Meta(ge=1, title="a whole number >= 1")]

_WORDS = {int: "a whole number", float: "a number", str: "a text"}
_WORDS |= {bool: "true or false", tuple: "a list", dict: "an object"}


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON object; a key that is not one of its fields is an error."""


def read_json(path: Path, where: str) -> Any:
    """Read a JSON file.

    Args:
        path: of the file.
        where: flag and path, with which messages begin.

    Raises:
        UsageError: the file is missing, or not JSON.
    """
    if not path.is_file():
        raise UsageError(f"{where}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}") from None


def parse(
    tree: Any,
    kind: type[T],
    where: str,
    *,
    strict: bool = True,
    error: type[MetroEMError] = UsageError,
) -> T:
    """Check decoded JSON and turn it into an object.

    Args:
        tree: decoded JSON.
        kind: a subclass of `Spec`, or another type that msgspec converts to.
        where: the file and the position of `tree` in it, for messages.
        strict: whether to refuse "3" for a number.
        error: class of the error to raise.

    Raises:
        MetroEMError: of class `error`, for an unknown or missing key, or a value of the
            wrong kind or out of range. It names position, value and expected value.
    """
    try:
        return msgspec.convert(tree, kind, strict=strict)
    except msgspec.ValidationError as fault:
        raise error(_describe(str(fault), tree, kind, where)) from None
    except UnicodeEncodeError as fault:
        raise error(f"{where}: a key is not valid text: {fault}") from None


def _describe(message: str, value: Any, hint: Any, where: str) -> str:
    """Translate msgspec's message about `value`, whose type should be `hint`."""
    text, _, path = message.partition(" - at `$")
    # Position of the object that contains the value, and the value's key in it.
    parent, key = where, ""
    for index, name in re.findall(r"\[(\d+)\]|\.([^.\[`]+)", path):
        inner = _item(hint, index) if index else _fields(hint, value).get(name)
        if inner is None or (index and _title(hint) and not _kinds(inner)):
            break  # at the "type" of an object, or an item of a list of plain values
        parent = f"{parent}: {key}" if key else parent
        parent, key = (f"{parent} {index}", "") if index else (parent, name)
        hint, value = inner, value[int(index) if index else name]
    inside = f"{parent}: {key}" if key else parent
    fields = _fields(hint, value)
    tags = [kind.__struct_config__.tag for kind in _kinds(hint)]
    tag = value.get("type") if isinstance(value, dict) and any(tags) else None
    if fields and any(tags) and tag not in tags:
        return f"{inside}: type must be one of {tags}, got {tag!r}"
    if fields and text.startswith("Object missing"):
        required = msgspec.structs.fields(_kind(hint, value))
        return f"{inside}: " + "; ".join(
            f"{field.encode_name} is missing: expected {_expected(field.type)}"
            for field in required
            if field.required and field.encode_name not in value
        )
    if fields and text.startswith("Object contains unknown"):
        unknown = sorted(value.keys() - fields.keys() - ({"type"} if tag else set()))
        return f"{inside}: unknown key {unknown}; known are {tuple(fields)}"
    if not text.startswith(("Expected", "Invalid", "Number out of range")):
        return f"{inside}: {text}"  # raised by the object itself
    if key:
        return f"{parent}: {key} is {value!r}: expected {_expected(hint)}"
    return f"{parent}: expected {_expected(hint)}, got {value!r}"


def _title(hint: Any) -> str | None:
    """The title of a type."""
    notes = getattr(hint, "__metadata__", ())
    titles = [n.title for n in notes if isinstance(n, Meta) and n.title]
    return titles[-1] if titles else None


def _plain_types(hint: Any) -> list[Any]:
    """The types that a value may have, without their `Meta`s."""
    if get_origin(hint) is Annotated:
        return _plain_types(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [part for one in get_args(hint) for part in _plain_types(one)]
    return [hint]


def _kinds(hint: Any) -> list[type[msgspec.Struct]]:
    """The kinds of objects among the types that a value may have."""
    parts = (part for part in _plain_types(hint) if isinstance(part, type))
    return [part for part in parts if issubclass(part, msgspec.Struct)]


def _kind(hint: Any, value: Mapping[str, Any]) -> type[msgspec.Struct]:
    """The kind of object that the "type" of `value` names; the first if none."""
    named = (k for k in _kinds(hint) if k.__struct_config__.tag == value.get("type"))
    return next(named, _kinds(hint)[0])


def _fields(hint: Any, value: Any) -> dict[str, Any]:
    """The known keys of the object that `value` should be, with their types."""
    if not isinstance(value, dict) or not _kinds(hint):
        return {}
    fields = msgspec.structs.fields(_kind(hint, value))
    return {field.encode_name: field.type for field in fields}


def _item(hint: Any, index: str) -> Any:
    """The type of an item of a list; None if the type is not a list."""
    for part in _plain_types(hint):
        if get_origin(part) is tuple:
            types = get_args(part)
            return types[0] if types[-1] is Ellipsis else types[int(index)]
    return None


def _expected(hint: Any) -> str:
    """Describe the values of a type."""
    if title := _title(hint):
        return title
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Annotated, Union, UnionType):
        return _expected(args[0])  # the other type is None
    if origin is Literal:
        return f"one of {args}"
    return _WORDS.get(origin or hint, "an object")
