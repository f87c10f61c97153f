"""Train aligners for sections of electron microscopy.

`import metroem` is fast: torch and the submodules are imported at their first use.
Published module directories rely on `metroem.aligner` and the other submodules being
available after `import metroem` alone.
"""

from importlib import import_module
from typing import Any

__version__ = "1.0.0"

_SUBMODULES = ("aligner", "finetuner", "loss")
# Names that are handed out, and the modules that they come from.
_NAMES = {
    "Pyramid": "metroem.pyramid",
    "align_stack": "metroem.stack.in_memory",
    "place": "metroem.stack.match_sections",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"metroem.{name}")
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'metroem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES, *_NAMES])
