"""List the code that a fetched module would run, so that people can read it first.

A module is code. Loading it runs its create.py and the files beside it that create.py
imports. A network spec may contain code, too (custom_layer).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

# Files that python imports; compiled ones cannot be shown as text.
_SOURCE, _COMPILED = (".py",), (".pyc", ".so", ".pyd")


class Code(NamedTuple):
    """A file with code."""

    path: str  # within the pyramid
    sha256: str  # of the file
    text: str | None  # None if it cannot be shown


def find_code(modules: Mapping[str, Mapping[str, bytes]]) -> list[Code]:
    """Find all code that modules could run, sorted by path.

    Args:
        modules: module name -> path inside it -> content.
    """
    found = []
    for module, files in modules.items():
        for inside, content in files.items():
            suffix = PurePosixPath(inside).suffix
            text = content.decode(errors="replace") if suffix in _SOURCE else None
            # A spec may include a file of any name as one of its parts.
            if suffix in (*_SOURCE, *_COMPILED) or (text := _custom_layers(content)):
                digest = hashlib.sha256(content).hexdigest()
                found.append(Code(f"{module}/{inside}", digest, text))
    return sorted(found)


def describe_code(code: list[Code], *, known: str) -> str:
    """Write code as text for a terminal, without control characters.

    Args:
        code: result of `find_code`.
        known: a create.py of `metroem init`, which need not be shown.
    """
    parts = []
    for path, digest, text in code:
        if text is None:
            about = "compiled: cannot be shown"
        elif _without_mip(text) == _without_mip(known):
            about = "as metroem init writes it"
        else:
            about = "\n" + "\n".join(
                "    " + _escape(line) for line in text.split("\n")
            )
        parts.append(f"{_escape(path)} (sha256 {digest[:16]}): {about}")
    return "\n".join(parts)


def _without_mip(text: str) -> list[str]:
    """Drop the lines of a create.py that set MIP."""
    return [line for line in text.split("\n") if not _states_mip(line)]


def _states_mip(line: str) -> bool:
    name, _, value = line.partition(" # ")[0].partition(" = ")
    return name == "MIP" and value.strip().isdigit()


def _escape(line: str) -> str:
    """Escape characters that a terminal would not print."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in line)


def _custom_layers(content: bytes) -> str:
    """List the custom_layers of a spec, with their code; "" for other files."""
    if content.lstrip()[:1] != b"{":
        return ""
    try:
        layers = list(_layers(json.loads(content)))
    except (ValueError, RecursionError):
        return ""  # artificery cannot read it either
    return "\n".join(
        json.dumps(layer, indent=1).replace("\\n", "\n") for layer in layers
    )


def _layers(tree: Any) -> Iterator[dict[str, Any]]:
    """Iterate over the custom_layers in a tree of JSON."""
    if isinstance(tree, dict):
        # Upper or lower case, as in artificery.
        if str(tree.get("type")).lower() == "custom_layer":
            yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            yield from _layers(part)
