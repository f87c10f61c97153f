"""Finished parts of a file in the making, kept so that a killed run goes on.

Parts lie in a hidden folder beside the file that they will become. Each is
written to a temporary name, synced and renamed, so a part that is there is
whole, whatever killed the run that wrote it.
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
    """Where the parts of the file at `path` are kept until it is whole."""
    return path.with_name(f".{path.name}.parts")


def as_json(request: Mapping) -> dict:
    """A request as it comes back from a file: tuples as lists, paths as text."""
    return json.loads(json.dumps(request, default=str, sort_keys=True))


def describe_differences(found: Mapping, wanted: Mapping) -> str:
    """What tells two requests apart, "mip 5 (asked for: 3), ..."; "" if nothing."""
    found, wanted = as_json(found), as_json(wanted)
    return ", ".join(
        f"{key} {found.get(key)!r} (asked for: {wanted.get(key)!r})"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    )


class ResumeStore:
    """Arrays by key in a folder, for one request.

    Threads and processes may put different keys at the same time.

    Args:
        folder: made if missing; see `parts_folder`.
        request: what the parts are made from, JSON-able.

    Raises:
        DatasetError: the folder holds parts of another request.
        StorageError: it cannot be made or written to.
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
                f"{path}: unreadable ({error}); delete {folder} to start anew"
            ) from error
        if unlike := describe_differences(found, request):
            raise DatasetError(
                f"{folder}: holds what a run with other arguments had finished: "
                f"{unlike}; give the same arguments to go on with it, or "
                "--overwrite (or delete that folder) to start anew"
            )

    def keys(self) -> list[str]:
        """Keys of the parts that are there, sorted."""
        return sorted(
            path.stem
            for path in self.folder.glob("*.npy")
            if not path.name.startswith(".")
        )

    def has(self, key: str) -> bool:
        """Whether a whole part is there; one that cannot be read is dropped."""
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
        """Keep an array of any shape and dtype under a key.

        Raises:
            StorageError: the disk is full, or may not be written to.
        """
        with atomic_write(self._path(key)) as partial, partial.open("wb") as file:
            # numpy writes to a file itself, and then does not say why it failed.
            through: Any = SimpleNamespace(write=file.write)
            np.lib.format.write_array(through, array, allow_pickle=False)

    def load(self, key: str) -> np.ndarray:
        """The array of a key, memory-mapped and read-only.

        Raises:
            DatasetError: it is not there, or cannot be read.
        """
        if not self.has(key):
            raise DatasetError(f"{self._path(key)}: this part is missing or broken")
        return np.load(self._path(key), mmap_mode="r")

    def drop(self, key: str) -> None:
        """Forget a part, so that it is made again."""
        self._path(key).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder with all its parts."""
        self.discard(self.folder)

    @staticmethod
    def discard(folder: Path) -> None:
        """Delete a folder of parts, whatever request they are of.

        The request goes last: were a run killed between, the next could take what
        is left for its own.
        """
        for path in folder.glob("*"):
            if path.name != _REQUEST:
                with suppress(OSError):
                    path.unlink()
        shutil.rmtree(folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"
