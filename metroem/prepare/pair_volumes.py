"""Write a data set from points as CloudVolumes.

    <path>/image             float32, 1 channel, at dst_mip: section 2 * pair is src,
                             2 * pair + 1 is tgt, each from x 0, y 0 on
    <path>/field             the same with 2 channels, if there are fields: channel 0
                             along y, pixels of dst_mip, translation subtracted
    <path>/sides/<z>.json    origin of section z: pair, side, centre, box and offset
                             (mip-0 pixels), fraction of blank pixels
    <path>/request.json      the spec without its pairs

Images and fields are the same as in the h5 files: normalised, moved by the
translation, not warped. A section is complete once its sides/<z>.json exists.
"""

import logging
import threading
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid
from metroem.io.cloud_errors import storage_errors
from metroem.io.resume import describe_differences
from metroem.io.volume_write import NewVolume, Notes, SectionWriter
from metroem.prepare.pair_files import PairSet, check_references, report_blank
from metroem.prepare.patches import Key, PatchReader, SectionPatch

logger = logging.getLogger(__name__)

_REQUEST, _SIDES = "request.json", "sides/"


class PairVolumes:
    """Writes the volumes of a spec.

    Attributes:
        path: of their folder, with a scheme.
        is_finished: whether all sections exist.
    """

    def __init__(
        self, reader: PatchReader, pair_set: PairSet, path: str, *, overwrite: bool
    ) -> None:
        """Resume from the finished results of a stopped run.

        Raises:
            DatasetError: the folder has other files; or it has the results of another
                request, and `overwrite` is not given; or it cannot be written to.
        """
        self._reader, self._set, self.path = reader, pair_set, path.rstrip("/")
        assert reader.image_source is not None
        self._source = reader.image_source.volume
        self._request = {**pair_set.request, "normalization": pair_set.normalization}
        self._sections: dict[Key, list[int]] = {}
        for index, pair in enumerate(pair_set.pairs):
            for side, key in enumerate(pair):
                self._sections.setdefault(key, []).append(2 * index + side)
        self._lock = threading.Lock()
        with storage_errors("--dst_path", path, doing="written"):
            self._notes = Notes(self.path)
            self._claim(overwrite)
            names = [name for name in self._notes.names() if name.startswith(_SIDES)]
            self._complete = self._notes.read(names)
            self.is_finished = all(map(self.has, self._sections))
            if self.is_finished:
                logger.info("%s: already exists, nothing to do", self.path)
                return
            self._image = self._volume("image", 1)
            self._field = self._volume("field", 2) if reader.field_source else None

    def has(self, key: Key) -> bool:
        """Whether a patch is written to all its sections."""
        return all(_name(z) in self._complete for z in self._sections[key])

    def put(self, key: Key, patch: SectionPatch) -> None:
        """Write a patch to its sections."""
        grid = self._reader.patches[key]
        window = self._reader.grid(key, patch)
        (x, y), (x_end, y_end) = (window.x, window.y), window.end
        image = self._reader.image(key, patch, window)
        field = None if self._field is None else self._reader.field(key, patch)
        section = Grid(grid.mip, 0, 0, *grid.shape)
        with self._lock, storage_errors("--dst_path", self.path, doing="written"):
            for z in self._sections[key]:
                self._image.put(image[None], section, z)
                if self._field is not None and field is not None:
                    self._field.put(field, section, z)
                note = {
                    "pair": z // 2,
                    "side": ("src", "tgt")[z % 2],
                    "center": list(key),
                    "box": [x, y, key[2], x_end, y_end, key[2] + 1],
                    "offset": list(patch.translation),
                    "blank": float(np.mean(image == 0)),
                }
                self._notes.write(_name(z), note)
                self._complete[_name(z)] = note

    def finish(self, without_reference: Sequence[Key]) -> None:
        """Report the blank fraction of the pairs.

        Args:
            without_reference: patches that could not be normalised.

        Raises:
            DatasetError: there are such patches, or every pair has a side that is all
                blank.
        """
        check_references(self._reader, without_reference, self._set.words)
        num_pairs = len(self._set.pairs)
        sides = [self._complete[_name(z)]["blank"] for z in range(2 * num_pairs)]
        blank = {i: max(sides[2 * i : 2 * i + 2]) for i in range(num_pairs)}
        try:
            name = PurePosixPath(self.path)
            report_blank(name, self._source.path, blank, "pairs")
        except DatasetError:
            # So that a second run, perhaps with credentials, reads again.
            self._clear()
            self._notes.delete(_REQUEST)
            raise
        logger.info("%s: %d pairs", self.path, num_pairs)

    def _claim(self, overwrite: bool) -> None:
        """Start in an empty folder, resume in our own, or overwrite if asked to."""
        found = self._notes.read([_REQUEST]).get(_REQUEST)
        if found is None and set(self._notes.names()) - {_REQUEST}:
            raise DatasetError(
                f"--dst_path {self.path}: contains files that are not a data set of "
                "MetroEM; give another path"
            )
        differences = (
            "" if found is None else describe_differences(found, self._request)
        )
        if differences and not overwrite:
            raise DatasetError(
                f"--dst_path {self.path}: already exists, made with other arguments: "
                f"{differences}; give --overwrite to replace it, or another path"
            )
        if differences:
            self._clear()
        if differences or found is None:
            self._notes.write(_REQUEST, self._request)

    def _clear(self) -> None:
        """Delete all but the request; first the notes that mark complete sections."""
        for prefix in (_SIDES, "image/", "field/"):
            self._notes.delete(prefix)

    def _volume(self, name: str, num_channels: int) -> SectionWriter:
        patch = next(iter(self._reader.patches.values()))
        wanted = NewVolume(
            num_channels=num_channels,
            dtype="float32",
            mip=patch.mip,
            area=Grid(patch.mip, 0, 0, *patch.shape).at_mip(0),
            sections=range(2 * len(self._set.pairs)),
            resolution=self._source.resolution,
        )
        path = f"{self.path}/{name}"
        return SectionWriter(path, wanted, flag="--dst_path", overwrite=True)


def _name(z: int) -> str:
    return f"{_SIDES}{z}.json"
