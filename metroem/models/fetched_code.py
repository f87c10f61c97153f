"""What of a fetched module would run, for people to read before they keep it.

A module is code: its create.py is run by everyone who loads it, with whatever that
imports from beside it, and a network spec may hold code of its own (custom_layer).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

# What python imports; the last are machine code, of which nothing can be shown.
_SOURCE, _COMPILED = (".py",), (".pyc", ".so", ".pyd")


class Code(NamedTuple):
    """Something that would run."""

    path: str  # within the pyramid
    sha256: str  # of the file
    text: str | None  # None if it cannot be shown


def code_in(modules: Mapping[str, Mapping[str, bytes]]) -> list[Code]:
    """All that modules could run, sorted by path.

    Args:
        modules: module name -> path inside it -> content.
    """
    found = []
    for module, files in modules.items():
        for inside, content in files.items():
            suffix = PurePosixPath(inside).suffix
            text = content.decode(errors="replace") if suffix in _SOURCE else None
            # A spec may name any other file as a part of it, whatever its name.
            if suffix in (*_SOURCE, *_COMPILED) or (text := _custom_layers(content)):
                digest = hashlib.sha256(content).hexdigest()
                found.append(Code(f"{module}/{inside}", digest, text))
    return sorted(found)


def shown(code: list[Code], *, known: str) -> str:
    """The code as text for a terminal, in which it cannot move the cursor.

    Args:
        code: of `code_in`.
        known: a create.py that need not be shown, as `metroem init` writes it.
    """
    parts = []
    for path, digest, text in code:
        if text is None:
            about = "compiled: cannot be shown"
        elif _without_mip(text) == _without_mip(known):
            about = "as metroem init writes it"
        else:
            about = "\n" + "\n".join("    " + _plain(line) for line in text.split("\n"))
        parts.append(f"{_plain(path)} (sha256 {digest[:16]}): {about}")
    return "\n".join(parts)


def _without_mip(text: str) -> list[str]:
    return [line for line in text.split("\n") if not _states_mip(line)]


def _states_mip(line: str) -> bool:
    name, _, value = line.partition(" # ")[0].partition(" = ")
    return name == "MIP" and value.strip().isdigit()


def _plain(line: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in line)


def _custom_layers(content: bytes) -> str:
    """The custom_layers of a spec, with their code; nothing of other files."""
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
    if isinstance(tree, dict):
        # In any case, as artificery takes it.
        if str(tree.get("type")).lower() == "custom_layer":
            yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            yield from _layers(part)
