"""Write the fields of one set from many processes, and join them into one file.

Compressing a field (scaleoffset, lzf, the checksum) takes 40 times as long as copying
the compressed chunks (2048 px, 2026-11). So each process compresses its own fields,
and the process that joins them copies compressed chunks.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np

from metroem.errors import DatasetError, FieldError
from metroem.io.h5_checks import main_dataset
from metroem.io.h5_write import (
    FieldSetMeta,
    atomic_h5,
    check_shape,
    describe,
    field_chunks,
    field_dataset,
    reserve_space,
)
from metroem.io.resume import ResumeStore

# Network storage may show a new file to other machines only after a minute.
_SEEN_WITHIN_S = 90.0


class FieldSetWriter:
    """Finished fields of one request, stored by index in a folder.

    Processes may put different fields at the same time. They may run on several
    machines if these share the folder.

    Args:
        folder: made if missing; see `parts_folder`.
        request: all that the fields depend on; JSON-able.

    Raises:
        DatasetError: the folder contains results of another request.
    """

    def __init__(self, folder: Path, request: Mapping) -> None:
        self.folder = folder
        self._store = ResumeStore(folder, request)

    def has(self, index: int) -> bool:
        """Whether a field is stored; a file that cannot be read is deleted.

        A field with other chunk sizes, from an earlier version, counts as missing: its
        chunks cannot be copied.
        """
        path = self._path(index)
        if not path.is_file():
            return False
        try:
            with h5py.File(path, "r") as file:
                field = file.get("main", file.get("field"))
                return (
                    "checksum" in file
                    and isinstance(field, h5py.Dataset)
                    and field.chunks == field_chunks(field.shape)
                )
        except OSError:
            path.unlink(missing_ok=True)
            return False

    def put(self, index: int, field: np.ndarray) -> None:
        """Store a field, ([2 sides,] 2, H, W) float32, pixels, rounded to 0.01 px.

        Raises:
            FieldError: a vector is NaN or infinite.
        """
        if not np.isfinite(field).all():
            fraction = 1 - np.isfinite(field).mean()
            raise FieldError(
                f"{self._path(index)}: {fraction:.1%} of the field is NaN or infinite"
            )
        with atomic_h5(self._path(index)) as file:
            vectors = field_dataset(file, 1, field.shape)
            reserve_space(file)
            vectors[0] = field

    def join(self, path: Path, meta: FieldSetMeta) -> Iterator[int]:
        """Write the whole set, field by field; the file gets its name at the end.

        The file is the same as `write_field_set` would write from these fields.

        Args:
            path: file to write; an existing file is replaced when the new one is
                complete.
            meta: the metadata of the file. There must be a field for each frame.

        Yields:
            Number of fields joined so far.

        Raises:
            DatasetError: a field is missing, or has another shape.
        """
        shape = (*(2,) * meta.num_sides, *meta.shape)
        with atomic_h5(path) as file:
            vectors = field_dataset(file, len(meta.frames), shape)
            checksums = []
            for index in range(len(meta.frames)):
                self._wait_for(index)
                with h5py.File(self._path(index), "r") as part:
                    check_shape(path, index, main_dataset(part).shape[1:], shape)
                    reserve_space(file)
                    _copy_chunks(part, vectors, index)
                    checksums.append(part["checksum"][0])  # type: ignore[index]
                yield index + 1
            file["checksum"] = np.array(checksums, np.uint32)
            describe(file, meta, moved=False)

    def remove(self) -> None:
        """Delete the folder with all its fields."""
        self._store.remove()

    def _wait_for(self, index: int) -> None:
        deadline = time.monotonic() + _SEEN_WITHIN_S
        while not self.has(index):
            if time.monotonic() > deadline:
                raise DatasetError(
                    f"{self._path(index)}: this part is missing or broken; do all "
                    "machines of the run see the same folder? The same command makes "
                    "what is missing"
                )
            time.sleep(0.5)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.h5"


def _copy_chunks(part: h5py.File, vectors: h5py.Dataset, index: int) -> None:
    """Copy the compressed chunks of one field's file to pair `index` of a set."""
    source = main_dataset(part).id
    for number in range(source.get_num_chunks()):
        offset = source.get_chunk_info(number).chunk_offset
        filters, packed = source.read_direct_chunk(offset)
        vectors.id.write_direct_chunk((index, *offset[1:]), packed, filters)
