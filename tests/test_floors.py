"""The layout of the code: rooms, floors and arrows of docs/architecture.md.

A room is a folder of `metroem/`, or a module at its top, or a script, or `benchmarks/`.
An arrow from one room to another is any import, also one inside a function. The
template's `create.py` belongs to the pyramids it is copied into, so it does not count.
"""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
# The floor of each room. A file imports from its own floor or below.
FLOORS = {
    **dict.fromkeys(("errors", "utils"), 0),
    **dict.fromkeys(("geometry", "imaging", "synthetic"), 1),
    "specs": 2,
    **dict.fromkeys(("io", "finetune", "loss"), 3),
    **dict.fromkeys(("models", "data", "prepare", "export", "finetuner"), 4),
    "aligner": 5,
    # `__init__` hands out `metroem.Pyramid`, lazily, and the version.
    **dict.fromkeys(("training", "pyramid", "__init__"), 6),
    **dict.fromkeys(("evaluation", "stack"), 7),
    **dict.fromkeys(("download_image", "download_field", "train"), 8),
    **dict.fromkeys(("__main__", "demo"), 8),
    "benchmarks": 9,
}
# The room stack brings eleven arrows: it joins what the rooms below it do, and a
# benchmark measures it.
MAX_ROOMS, MAX_FLOORS, MAX_ARROWS = 26, 13, 136
MIN_LINES = 60
COMMANDS = ("train.py", "download_image.py", "download_field.py", "__main__.py")


class Import(NamedTuple):
    """One file that imports another; paths are relative to the repository."""

    importer: Path
    imported: Path


def source_files(root: Path) -> list[Path]:
    """Files that are part of a room."""
    files = [*root.glob("*.py"), *root.glob("benchmarks/**/*.py")]
    files += [p for p in root.glob("metroem/**/*.py") if "templates" not in p.parts]
    return sorted(p.relative_to(root) for p in files if p.name != "setup.py")


def room_of(path: Path) -> str:
    """The room that a file belongs to."""
    parts = path.with_suffix("").parts
    return parts[1] if parts[0] == "metroem" else parts[0]


def find_imports(root: Path) -> set[Import]:
    """Imports between files, also those inside functions or by `import_module`."""
    files = source_files(root)
    by_name = {module_name(path): path for path in files}
    found = set()
    for path in files:
        for name in imported_names(ast.parse((root / path).read_text()), path):
            while name and name not in by_name:  # a class or function of a module
                name = name.rpartition(".")[0]
            if name and by_name[name] != path:
                found.add(Import(path, by_name[name]))
    return found


def module_name(path: Path) -> str:
    """The name by which other files import this one."""
    parts = list(path.with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    # benchmarks/ is on the path of its own scripts.
    return parts[-1] if parts[0] == "benchmarks" else ".".join(parts)


def imported_names(tree: ast.Module, path: Path) -> set[str]:
    """Dotted names that a file imports, down to classes and functions."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=module, names=names, level=level):
                package = path.parts[:-level] if level else ()
                base = ".".join([*package, *filter(None, [module])])
                found |= {f"{base}.{alias.name}" for alias in names}
            case ast.Call(
                func=ast.Name(id="import_module"), args=[ast.Constant(value=str(name))]
            ):
                found.add(name)
    return found


def find_arrows(imports: set[Import]) -> set[tuple[str, str]]:
    """Pairs of rooms of which the first imports the second."""
    arrows = {(room_of(i.importer), room_of(i.imported)) for i in imports}
    return {(a, b) for a, b in arrows if a != b}


def count_floors(arrows: set[tuple[str, str]]) -> int:
    """The longest chain of rooms that import each other.

    Raises:
        CycleError: Rooms import each other in a circle, which the error names.
    """
    below: dict[str, set[str]] = {}
    for room, imported in arrows:
        below.setdefault(room, set()).add(imported)
    floor: dict[str, int] = {}
    for room in TopologicalSorter(below).static_order():
        floor[room] = 1 + max((floor[b] for b in below.get(room, ())), default=0)
    return max(floor.values(), default=1)


def imports_from_above(imports: set[Import]) -> list[str]:
    """Imports of a room on a higher floor, a line each."""
    return sorted(
        f"{i.importer} imports {i.imported} from floor {FLOORS[room_of(i.imported)]}"
        for i in imports
        if FLOORS[room_of(i.imported)] > FLOORS[room_of(i.importer)]
    )


def mutual_imports(imports: set[Import]) -> list[str]:
    """Pairs of rooms that import each other, with a file of each, a line a pair."""
    example = {(room_of(i.importer), room_of(i.imported)): i for i in sorted(imports)}
    return [
        f"{a} and {b}: {example[a, b].importer}, {example[b, a].importer}"
        for a, b in sorted(example)
        if a < b and (b, a) in example
    ]


def small_files(root: Path, imports: set[Import]) -> list[str]:
    """Short files that only one other file imports, with that file, a line each."""
    lines = []
    for path in source_files(root):
        importers = {i.importer for i in imports if i.imported == path}
        num_lines = len((root / path).read_text().splitlines())
        if path.name in ("__init__.py", *COMMANDS) or num_lines >= MIN_LINES:
            continue
        if len(importers) == 1:
            lines.append(f"{path} ({num_lines} lines) belongs in {importers.pop()}")
    return lines


@pytest.fixture(scope="module")
def imports():
    return find_imports(ROOT)


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in source_files(ROOT)}
    assert rooms <= set(FLOORS)


def test_a_file_imports_only_from_its_floor_or_below(imports):
    assert imports_from_above(imports) == []


def test_two_rooms_never_import_each_other(imports):
    assert mutual_imports(imports) == []


def test_no_short_file_is_imported_by_one_other_alone(imports):
    assert small_files(ROOT, imports) == []


def test_the_house_is_small(imports):
    arrows = find_arrows(imports)
    assert len({room_of(path) for path in source_files(ROOT)}) <= MAX_ROOMS
    assert count_floors(arrows) <= MAX_FLOORS
    assert len(arrows) <= MAX_ARROWS


def test_the_face_of_the_package_imports_nothing_when_it_is_imported():
    tree = ast.parse((ROOT / "metroem" / "__init__.py").read_text())
    assert not {n for n in imported_names(tree, Path("metroem/__init__.py"))} - {
        "importlib.import_module",
        "typing.Any",
        "metroem.pyramid",
    }


def test_cloudvolume_is_imported_in_io_alone():
    users = {
        str(path)
        for path in source_files(ROOT)
        if path.parts[0] == "metroem"
        and re.search(r"(import|from) cloudvolume", (ROOT / path).read_text())
    }
    assert {room_of(Path(user)) for user in users} <= {"io"}


@pytest.fixture
def small_house(tmp_path):
    """A tree with a file that imports from above, rooms in a circle, short files."""
    files = {
        "train.py": "from metroem.training.stage import run\n" + "#\n" * 60,
        "metroem/__init__.py": '__version__ = "1"\n',
        "metroem/training/__init__.py": "",
        "metroem/training/stage.py": "from metroem.io import h5\nfrom .step import x\n",
        "metroem/training/step.py": "x = 1\n" * 60,
        "metroem/io/__init__.py": "",
        "metroem/io/h5.py": "def f():\n    from metroem.specs.losses import y\n",
        "metroem/specs/__init__.py": "",
        "metroem/specs/losses.py": "import metroem.io.h5\nfrom metroem import errors\n",
        "metroem/errors.py": "",
        "metroem/models/templates/create.py": "import metroem.aligner\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_checks_name_what_is_wrong_in_a_small_house(small_house):
    imports = find_imports(small_house)

    assert imports_from_above(imports) == [
        "metroem/specs/losses.py imports metroem/io/h5.py from floor 3"
    ]
    assert mutual_imports(imports) == [
        "io and specs: metroem/io/h5.py, metroem/specs/losses.py"
    ]
    assert small_files(small_house, imports) == [
        "metroem/errors.py (0 lines) belongs in metroem/specs/losses.py",
        "metroem/specs/losses.py (2 lines) belongs in metroem/io/h5.py",
        "metroem/training/stage.py (2 lines) belongs in train.py",
    ]
    with pytest.raises(CycleError, match="io"):
        count_floors(find_arrows(imports))
    assert find_arrows(imports) == {
        ("train", "training"),
        ("training", "io"),
        ("io", "specs"),
        ("specs", "io"),
        ("specs", "errors"),
    }
    without_circle = find_arrows(imports) - {("specs", "io")}
    assert count_floors(without_circle) == 5
