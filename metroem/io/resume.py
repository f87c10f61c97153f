"""Store finished results of an unfinished file, so that a killed run can resume.

Results lie in a hidden folder beside the file that they will become. Each is written
under a temporary name, synced and renamed. So every result is complete, whatever
killed the run that wrote it.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from metroem.errors import DatasetError
from metroem.io.files import atomic_write, make_folder, replace_file

_REQUEST = "request.json"


def parts_folder(path: Path) -> Path:
    """Return the folder that stores results of the file at `path` until it is done."""
    return path.with_name(f".{path.name}.parts")


def as_json(request: Mapping) -> dict:
    """Convert a request to its form after JSON: tuples as lists, paths as text."""
    return json.loads(json.dumps(request, default=str, sort_keys=True))


def describe_differences(found: Mapping, wanted: Mapping) -> str:
    """List how two requests differ, "mip 5 (asked for: 3), ..."; "" if they do not."""
    found, wanted = as_json(found), as_json(wanted)
    return ", ".join(
        f"{key} {found.get(key)!r} (asked for: {wanted.get(key)!r})"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    )


class ResumeStore:
    """Finished arrays of one request, stored by key in a folder.

    Threads and processes may put different keys at the same time.

    Args:
        folder: made if missing; see `parts_folder`.
        request: all that the arrays depend on; JSON-able.

    Raises:
        DatasetError: the folder contains results of another request.
        StorageError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, request: Mapping) -> None:
        self.folder = folder
        make_folder(folder)
        path = folder / _REQUEST
        if not path.exists():
            replace_file(path, json.dumps(as_json(request), indent=1).encode())
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise DatasetError(
                f"{path}: unreadable ({error}); delete {folder} to start again"
            ) from error
        if differences := describe_differences(found, request):
            raise DatasetError(
                f"{folder}: contains results of a run with other arguments: "
                f"{differences}; give the same arguments to resume it, or "
                "--overwrite (or delete that folder) to start again"
            )

    @staticmethod
    def stored_request(folder: Path) -> dict | None:
        """Read the request of the results in a folder; None if it has no readable one.

        With it a caller can discard the results of another request and start again.
        """
        try:
            found = json.loads((folder / _REQUEST).read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def keys(self) -> list[str]:
        """Return the keys of the stored arrays, sorted."""
        return sorted(
            path.stem
            for path in self.folder.glob("*.npy")
            if not path.name.startswith(".")
        )

    def has(self, key: str) -> bool:
        """Whether an array is stored; a file that cannot be read is deleted."""
        path = self._path(key)
        try:
            np.load(path, mmap_mode="r")
        except FileNotFoundError:
            return False
        except (ValueError, EOFError, OSError):
            path.unlink(missing_ok=True)
            return False
        return True

    def put(self, key: str, array: np.ndarray) -> None:
        """Store an array of any shape and dtype under a key.

        Raises:
            StorageError: the disk is full, or may not be written to.
        """
        with atomic_write(self._path(key)) as partial, partial.open("wb") as file:
            # numpy writes to real files in C, and then does not say why it failed.
            python_file: Any = SimpleNamespace(write=file.write)
            np.lib.format.write_array(python_file, array, allow_pickle=False)

    def load(self, key: str) -> np.ndarray:
        """Open the array of a key, memory-mapped and read-only.

        Raises:
            DatasetError: it is missing, or cannot be read.
        """
        if not self.has(key):
            raise DatasetError(f"{self._path(key)}: this part is missing or broken")
        return np.load(self._path(key), mmap_mode="r")

    def drop(self, key: str) -> None:
        """Delete an array, so that it is made again."""
        self._path(key).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder with all its arrays."""
        self.discard(self.folder)

    @staticmethod
    def discard(folder: Path) -> None:
        """Delete the folder of a `ResumeStore`, whatever its request.

        The request is deleted last. If this run is killed before, the next run still
        sees which request the remaining arrays belong to.
        """
        for path in folder.glob("*"):
            if path.name != _REQUEST:
                with suppress(OSError):
                    path.unlink()
        shutil.rmtree(folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"
