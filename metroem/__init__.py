"""Train aligners for sections of electron microscopy.

`import metroem` is fast: torch and the submodules are imported at their first use.
Published module directories rely on `metroem.aligner` and the other submodules being
available after `import metroem` alone.
"""

from importlib import import_module
from typing import Any

__version__ = "1.0.0"

_SUBMODULES = ("aligner", "finetuner", "loss")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"metroem.{name}")
    if name == "Pyramid":
        return import_module("metroem.pyramid").Pyramid
    raise AttributeError(f"module 'metroem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES, "Pyramid"])
