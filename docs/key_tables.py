"""Tables of the keys of schedules, made from the code when the pages are built.

    ```{keys} metroem.specs.schedule.Phase
    :called: losses=loss_spec
    :without: similarity_rules
    ```

has a row for each field of a dataclass: its name in JSON, its default, and what the
class's docstring says of it under "Attributes".
"""

import dataclasses
import inspect
import json
import re
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_HEAD = "| key | default | what it is |\n|---|---|---|\n"


def meanings(kind: type) -> dict[str, str]:
    """What the docstring of a dataclass says of each field.

    Raises:
        ValueError: it does not say something of each; the pages would not, either.
    """
    docstring = inspect.getdoc(kind) or ""
    _, _, listed = docstring.partition("\nAttributes:\n")
    listed = listed.split("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", listed, re.M)
    found = {name: " ".join(text.split()) for name, text in entries}
    names = [field.name for field in dataclasses.fields(kind)]
    if names == ["prob"]:
        found.setdefault("prob", "probability.")
    if missing := set(names) - set(found):
        raise ValueError(f"{kind.__name__}: its docstring says nothing of {missing}")
    return found


def summary(kind: type) -> str:
    """The docstring of a dataclass up to its attributes."""
    docstring = inspect.getdoc(kind) or ""
    return docstring.partition("\nAttributes:\n")[0].strip()


def table(
    kind: type, called: dict[str, str] | None = None, without: tuple[str, ...] = ()
) -> str:
    """The Markdown table of a dataclass.

    Args:
        kind: the dataclass.
        called: names that JSON has for fields, where it has others.
        without: fields that are left out.
    """
    rows = [
        (
            f"`{(called or {}).get(field.name, field.name)}`",
            _default(field),
            meanings(kind)[field.name],
        )
        for field in dataclasses.fields(kind)
        if field.name not in without
    ]
    escaped = (" | ".join(cell.replace("|", r"\|") for cell in row) for row in rows)
    return _HEAD + "".join(f"| {row} |\n" for row in escaped)


def _default(field: dataclasses.Field) -> str:
    """A default as JSON has it; "see text" for one that is no JSON."""
    if field.default is dataclasses.MISSING:
        return "required"
    try:
        return f"`{json.dumps(field.default)}`"
    except TypeError:
        return "see text"


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _renamed(argument: str) -> dict[str, str]:
    return dict(one.split("=") for one in argument.split())


class Keys(SphinxDirective):
    """The table of one dataclass, or, of a dict by type, a section each."""

    required_arguments = 1
    option_spec = {"called": _renamed, "without": str.split}

    def run(self) -> list[nodes.Node]:
        """The nodes of the table."""
        named = _named(self.arguments[0])
        if isinstance(named, dict):
            text = "\n".join(
                f"**`{name}`**: {summary(kind)}\n\n{table(kind)}"
                for name, kind in named.items()
            )
        else:
            without = tuple(self.options.get("without", ()))
            text = table(named, self.options.get("called"), without)
        return self.parse_text_to_nodes(text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx of the directive."""
    app.add_directive("keys", Keys)
    return {"parallel_read_safe": True}
