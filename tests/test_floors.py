"""Data flows one way: a module imports from its own floor or below."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "metroem"
# The floor of each part of the package, as design and README list them.
FLOORS = {
    "errors": 0,
    "versions": 0,
    "progress": 0,
    "cli": 0,
    "ranks": 0,
    "grid": 1,
    "knots": 1,
    "field": 1,
    "both_ways": 1,
    "recording": 1,
    "mask_rules": 1,
    "masks": 1,
    "normalize": 1,
    "smoothing": 1,
    "springs": 1,
    "metrics": 1,
    "unfold": 1,
    "loss": 2,
    "io": 2,
    "specs": 2,
    "data": 3,
    "create": 3,
    "export": 3,
    "nets": 4,
    "kernels": 4,
    "field_loss": 4,
    "field_search": 4,
    "coarse_to_fine": 4,
    "finetuner": 4,
    "finetuning": 4,
    "aligner": 4,
    "boundary": 4,
    "prediction": 4,
    "tiles": 4,
    "training": 5,
    "align": 6,
    "distort": 6,
    "evaluate": 6,
    "inspect": 6,
    "report": 6,
    "requests": 6,
    "evaluation": 6,
    "scaffold": 6,
    "scoring": 6,
    "trust": 6,
    "tissue": 6,
    "demo": 6,
    "__main__": 8,
}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "templates" not in p.parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "metroem":
                names = [f"metroem.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("metroem.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_floor_or_below(path):
    part = part_of(path)
    if part == "__init__":
        assert imported_parts(path) == set()
        return
    above = {p for p in imported_parts(path) if FLOORS[p] > FLOORS[part]}
    assert not above, f"{path} imports {above} from above floor {FLOORS[part]}"


def test_every_part_has_a_floor():
    assert {part_of(path) for path in MODULES} - {"__init__"} <= set(FLOORS)


def test_cloudvolume_is_imported_in_io_alone():
    users = {
        path.relative_to(PACKAGE)
        for path in MODULES
        if re.search(r"(import|from) cloudvolume", path.read_text())
        and "io" not in path.parts
    }
    assert not users
