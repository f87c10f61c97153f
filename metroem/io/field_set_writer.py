"""Finished fields of a set in the making, joined without being packed again.

Packing a field (scaleoffset, lzf, the checksum) takes 40 times as long as copying
what came of it (2048 px, 2026-11). So each process packs the fields that it makes,
and the one that joins them copies packed chunks.
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
    check_shape,
    describe,
    field_chunks,
    field_dataset,
    keep_room,
    replacing_h5,
)
from metroem.io.resume import ResumeStore

# Network storage may show a new file to other machines only after a minute.
_SEEN_WITHIN_S = 90.0


class FieldSetWriter:
    """Fields by index in a folder, for one request.

    Processes may put different fields at the same time, on several machines if the
    folder is on storage that they share.

    Args:
        folder: made if missing; see `parts_folder`.
        request: what the fields are made from, JSON-able.

    Raises:
        DatasetError: the folder holds parts of another request.
    """

    def __init__(self, folder: Path, request: Mapping) -> None:
        self.folder = folder
        self._store = ResumeStore(folder, request)

    def has(self, index: int) -> bool:
        """Whether a whole field is there; one that cannot be read is dropped.

        One of other chunks, as a run of an earlier version left it, cannot be joined.
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
        """Keep a field, ([2 sides,] 2, H, W) float32, pixels, rounded to 0.01 px.

        Raises:
            FieldError: a vector is NaN or infinite.
        """
        if not np.isfinite(field).all():
            share = 1 - np.isfinite(field).mean()
            raise FieldError(
                f"{self._path(index)}: {share:.1%} of the field is NaN or infinite"
            )
        with replacing_h5(self._path(index)) as file:
            vectors = field_dataset(file, 1, field.shape)
            keep_room(file)
            vectors[0] = field

    def join(self, path: Path, meta: FieldSetMeta) -> Iterator[int]:
        """Write the set, step by step; it has its name when the last step is done.

        The file has what `write_field_set` would write of the same fields.

        Args:
            path: where; a file of this name is replaced when the new one is whole.
            meta: what the file says about itself; a part for each of its frames.

        Yields:
            How many fields are joined, after each.

        Raises:
            DatasetError: a part is missing, or of another shape.
        """
        shape = (*(2,) * meta.num_sides, *meta.shape)
        with replacing_h5(path) as file:
            vectors = field_dataset(file, len(meta.frames), shape)
            checksums = []
            for index in range(len(meta.frames)):
                self._wait_for(index)
                with h5py.File(self._path(index), "r") as part:
                    check_shape(path, index, main_dataset(part).shape[1:], shape)
                    keep_room(file)
                    _copy_chunks(part, vectors, index)
                    checksums.append(part["checksum"][0])  # type: ignore[index]
                yield index + 1
            file["checksum"] = np.array(checksums, np.uint32)
            describe(file, meta, moved=False)

    def remove(self) -> None:
        """Delete the folder with all its parts."""
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
    """Copy the chunks of a part of one field, as they are, to a place of a set."""
    source = main_dataset(part).id
    for number in range(source.get_num_chunks()):
        place = source.get_chunk_info(number).chunk_offset
        filters, packed = source.read_direct_chunk(place)
        vectors.id.write_direct_chunk((index, *place[1:]), packed, filters)
