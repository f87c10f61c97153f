"""Make tables of the keys of schedules from their types, when the pages are built.

    ```{keys} metroem.specs.schedule.Phase
    ```

becomes a table with a row for each key of the object: its default, and the text beside
its type. A dict of kinds of objects becomes one table per kind.
"""

import inspect
import json
from importlib import import_module
from typing import Any

import msgspec
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def table(kind: type[msgspec.Struct]) -> str:
    """Write the Markdown table of a kind of object."""
    rows = "| key | default | what it is |\n|---|---|---|\n"
    for field in msgspec.structs.fields(kind):
        key = field.encode_name.replace(": ", ".")  # inside of another
        (text,) = (n for n in field.type.__metadata__ if isinstance(n, str))
        rows += f"| `{key}` | {_default(field)} | {text} |\n"
    return rows


def _default(field: msgspec.structs.FieldInfo) -> str:
    """Write a default as JSON; "see text" if it is an object."""
    if field.required:
        return "required"
    try:
        return f"`{json.dumps(field.default)}`"
    except TypeError:
        return "see text"


def named(path: str) -> Any:
    """Import the object at a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


class Keys(SphinxDirective):
    """Insert the table of one kind of object, or one section per entry of a dict."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Build the nodes of the table."""
        kinds = named(self.arguments[0])
        if not isinstance(kinds, dict):
            return self.parse_text_to_nodes(table(kinds))
        sections = (
            f"**`{name}`**: {inspect.getdoc(kind)}\n\n{table(kind)}"
            for name, kind in kinds.items()
        )
        return self.parse_text_to_nodes("\n".join(sections))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("keys", Keys)
    return {"parallel_read_safe": True}
