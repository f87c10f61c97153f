"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside a file, which takes its place when all went well.

    Args:
        path: of the file; its folder is there.

    Yields:
        Where to write it; without an error it is synced and renamed after.
    """
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole, in the place of what was there."""
    with replacing(path) as partial:
        partial.write_bytes(content)
