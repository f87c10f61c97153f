"""Small JSON files beside volumes, at any cloud path."""

import json
from typing import Any

from cloudfiles import CloudFiles

from metroem.io.cloud_retry import prepare_storage


class Notes:
    """JSON objects by name in a folder at a cloud path.

    Attributes:
        path: the folder, with a scheme.
    """

    def __init__(self, path: str) -> None:
        prepare_storage()
        self.path = path
        self._files = CloudFiles(path, progress=False)

    def names(self) -> list[str]:
        """All files below the folder, those of volumes too, sorted."""
        return sorted(self._files.list())

    def read(self, names: list[str]) -> dict[str, dict]:
        """The objects by name, less those that were not written to their end."""
        found = {}
        files: Any = self._files.get(names)
        for file in files:
            try:
                found[file["path"]] = json.loads(file["content"] or b"")
            except ValueError:
                continue
        return found

    def write(self, name: str, note: dict) -> None:
        """Keep an object under a name."""
        content = json.dumps(note, indent=1, sort_keys=True).encode()
        self._files.put(name, content, content_type="application/json")

    def delete(self, prefix: str) -> None:
        """Delete the files whose names begin so."""
        self._files.delete([name for name in self.names() if name.startswith(prefix)])
