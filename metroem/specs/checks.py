"""JSON read and checked; a refusal says where the mistake is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metroem.errors import UsageError


def read_json(path: Path, where: str) -> Any:
    """What a JSON file holds; UsageError, which names `where`, if it is none."""
    if not path.is_file():
        raise UsageError(f"{where}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}") from None


def check_object(value: Any, where: str) -> dict[str, Any]:
    """`value`, if it is a JSON object; UsageError otherwise."""
    if not isinstance(value, dict):
        raise UsageError(f"{where}: expected an object, got {value!r}")
    return value


def check_list(value: Any, where: str) -> list[Any]:
    """`value`, if it is a JSON array; UsageError otherwise."""
    if not isinstance(value, list):
        raise UsageError(f"{where}: expected a list, got {value!r}")
    return value


def check_keys(
    found: Mapping[str, Any],
    known: tuple[str, ...],
    where: str,
    *,
    also: tuple[str, ...] = (),
) -> None:
    """Refuse keys that are not `known`.

    Args:
        found: the object, less what has been read of it.
        known: keys it may have.
        where: its place, for messages.
        also: keys that were read before, named in the message too.

    Raises:
        UsageError: there is another key.
    """
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown}; known are {known + also}")
