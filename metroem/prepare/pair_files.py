"""Write pairs to h5 files: an image set, a field set, or both.

Each patch is stored as soon as it is read, as one finished result, so a run that was
killed resumes. The files are written from these results, which are then deleted.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid
from metroem.imaging.normalize import (
    GreyStatistics,
    looks_normalized,
    tissue_statistics,
)
from metroem.io.h5 import (
    FieldSetMeta,
    ImageSetMeta,
    Pair,
    PairLocation,
    verify,
    write_field_set,
    write_image_set,
)
from metroem.io.resume import ResumeStore, describe_differences, parts_folder
from metroem.io.volume import WHAT_TO_CHECK, Volume, crop_array
from metroem.prepare.patches import Key, PatchReader, SectionPatch, move_grid
from metroem.prepare.sources import missing_reference
from metroem.utils import cli

logger = logging.getLogger(__name__)

# The log names sections with a larger blank fraction.
_MOSTLY_BLANK = 0.5
# In a packed patch arrays begin at multiples of _ALIGN_BYTES. The line of JSON before
# them has fewer than _MOST_HEAD_BYTES.
_ALIGN_BYTES, _MOST_HEAD_BYTES = 64, 4096


class Words(NamedTuple):
    """Names of a command's flags or JSON entries, for messages."""

    normalize: str = "--normalize"
    reference_mip: str = "--reference_mip"
    masks: str = "--cv_path_defects"
    threshold: str = "--mask_val"
    counted: str = "sections"  # unit in which blank ones are reported


@dataclass(frozen=True)
class PairSet:
    """The pairs to make, and the metadata of their files.

    Attributes:
        pairs: keys of the patches of src and of tgt.
        request: all settings that determine the content of the files.
        image_path: the image set; None: only fields.
        field_path: the field set; None: only images.
        field_source: the volume of the fields, as the field set names it.
        locations: of the pairs. If None, a pair lies on the patch of src; then each
            side is moved by the translation of its field, and tgt also by the
            distance between the two patches.
        anchor: the point that the mips of a location share: "corner" or "center".
        normalization: of the images, in the form that image sets state it.
        tag: name of the checkpoint that the fields belong to, as those of stage 0.
        words: for messages.
    """

    pairs: Sequence[tuple[Key, Key]]
    request: Mapping
    image_path: Path | None = None
    field_path: Path | None = None
    field_source: str = ""
    locations: Sequence[PairLocation] | None = None
    anchor: str = "center"
    normalization: Mapping | None = None
    tag: str | None = None
    words: Words = Words()


class PairFiles:
    """Writes the h5 files of a set of pairs.

    Attributes:
        is_finished: whether they already exist.
    """

    def __init__(
        self, reader: PatchReader, pair_set: PairSet, *, overwrite: bool
    ) -> None:
        """Resume from the finished results of a stopped run.

        Raises:
            DatasetError: files or finished results of another request exist, and
                `overwrite` is not given.
        """
        self._reader, self._set = reader, pair_set
        paths = (pair_set.image_path, pair_set.field_path)
        self._paths = [path for path in paths if path is not None]
        request = pair_set.request
        are_done = [is_done(path, request, overwrite=overwrite) for path in self._paths]
        self.is_finished = all(are_done)
        self._path = self._paths[0]
        if self.is_finished:
            # A run that was killed after it wrote the files left its results behind.
            ResumeStore.discard(parts_folder(self._path))
            return
        self._store = open_parts(self._path, request, overwrite=overwrite)

    def check(self) -> None:
        """Check the checksum of each pair in the files.

        Raises:
            DatasetError: a pair differs from its checksum.
        """
        for path in self._paths:
            if problems := verify(path):
                listed = "\n  ".join(problems)
                raise DatasetError(
                    f"{path}: damaged after it was written; the same command with "
                    f"--overwrite makes it again:\n  {listed}"
                )

    def has(self, key: Key) -> bool:
        """Whether an earlier, stopped run has finished a patch."""
        return self._store.has(_name(key))

    def put(self, key: Key, patch: SectionPatch) -> None:
        """Store a patch."""
        self._store.put(_name(key), pack(patch))

    def finish(self, without_reference: Sequence[Key]) -> None:
        """Write the files from all patches, then delete the stored patches.

        Args:
            without_reference: patches that could not be normalised.

        Raises:
            DatasetError: there are such patches, or everything is blank.
        """
        check_references(self._reader, without_reference, self._set.words)
        # Without arrays, since each array keeps a file open.
        patches = {
            key: replace(self._load(key), image=None, defects=None, field=None)
            for key in self._reader.patches
        }
        try:
            self._report(patches)
        except DatasetError:
            # So that a second run, perhaps with credentials, reads again.
            self._store.remove()
            raise
        locations = self._set.locations or [
            self._location(pair, patches) for pair in self._set.pairs
        ]
        if self._set.field_path is not None:
            fields = (np.stack(sides) for sides in self._sides(locations, self._field))
            write_field_set(self._set.field_path, fields, self._field_meta(locations))
        if self._set.image_path is not None:
            images, defects = (
                (Pair(*sides) for sides in self._sides(locations, side))
                for side in (self._image, self._defects)
            )
            if self._set.locations is None:
                # Copies, so that a side shared by two pairs is compressed for each:
                # this keeps the bytes of the files as they were.
                images = (Pair(*map(np.array, pair)) for pair in images)
            write_image_set(
                self._set.image_path,
                images,
                self._image_meta(locations),
                defects=defects if self._reader.masks else None,
            )
        self._store.remove()
        logger.info("%s: %d pairs", self._path, len(locations))

    def _load(self, key: Key) -> SectionPatch:
        return unpack(self._store.load(_name(key)))

    def _report(self, patches: Mapping[Key, SectionPatch]) -> None:
        """Log blank, masked and unusual pixels; refuse a set that is all blank."""
        words, reader = self._set.words, self._reader
        name, image = self._path.name, reader.image_source
        if reader.masks:
            masked = float(np.mean([patch.masked for patch in patches.values()]))
            logger.info("%s: %.2f%% masked as defects", name, 100 * masked)
            if not masked:
                logger.warning(
                    "%s: %s marks nothing here; is it written at the mip that is read, "
                    "and is %s right?",
                    *(name, words.masks, words.threshold),
                )
        if flat := sorted({key[2] for key, patch in patches.items() if patch.is_flat}):
            logger.warning(
                "%s: sections %s have one grey level, so they are not tissue: blank",
                *(name, flat),
            )
        blank = {key[2]: patch.blank for key, patch in patches.items()}
        if words.counted == "pairs":
            blank = {
                index: max(patches[key].blank for key in pair)
                for index, pair in enumerate(self._set.pairs)
            }
        report_blank(self._path, self._source.path, blank, words.counted)
        broken = {key[2]: patch.not_finite for key, patch in patches.items()}
        if image is None and any(broken.values()):
            logger.warning(
                "%s: vectors that are NaN or infinite, filled from the nearest that "
                "is not: %s",
                name,
                ", ".join(f"section {z} {s:.1%}" for z, s in broken.items() if s),
            )
        if image and not image.normalize and image.volume.dtype.kind == "f":
            images = (self._load(key).image for key in patches)
            warn_unless_normalized(self._path, images, words.normalize)

    def _location(
        self, pair: tuple[Key, Key], patches: Mapping[Key, SectionPatch]
    ) -> PairLocation:
        """Locate a pair; see `PairSet.locations`."""
        grid, other = (self._reader.patches[key] for key in pair)
        src, tgt = (patches[key].translation for key in pair)
        apart = tgt[0] + other.x - grid.x, tgt[1] + other.y - grid.y
        return PairLocation(grid, (pair[0][2], pair[1][2]), (src, apart))

    def _sides(
        self,
        locations: Sequence[PairLocation],
        make_side: Callable[[Key, Grid], np.ndarray],
    ) -> Iterator[list[np.ndarray]]:
        """Make src and tgt of each pair; reuse a side of the pair before."""
        made: dict[tuple[Key, Grid], np.ndarray] = {}
        for pair, location in zip(self._set.pairs, locations, strict=True):
            wanted = [
                (key, move_grid(location.grid, offset))
                for key, offset in zip(pair, location.offsets, strict=True)
            ]
            made = {at: made[at] if at in made else make_side(*at) for at in wanted}
            yield [made[at] for at in wanted]

    def _image(self, key: Key, window: Grid) -> np.ndarray:
        return self._reader.image(key, self._load(key), window)

    def _defects(self, key: Key, window: Grid) -> np.ndarray:
        patch = self._load(key)
        assert patch.defects is not None
        return crop_array(patch.defects, self._reader.grid(key, patch), window)

    def _field(self, key: Key, window: Grid) -> np.ndarray:
        return self._reader.field(key, self._load(key))

    @property
    def _source(self) -> Volume:
        """The volume of the images, or of the fields if there are no images."""
        if self._reader.image_source is not None:
            return self._reader.image_source.volume
        assert self._reader.field_source is not None
        return self._reader.field_source.stored.volume

    def _image_meta(self, locations: Sequence[PairLocation]) -> ImageSetMeta:
        return ImageSetMeta(
            locations,
            source=self._source.path,
            command=cli.command_line(),
            request=self._set.request,
            resolution=self._source.resolution,
            anchor=self._set.anchor,
            normalization=self._set.normalization,
        )

    def _field_meta(self, locations: Sequence[PairLocation]) -> FieldSetMeta:
        return FieldSetMeta(
            locations,
            source=self._set.field_source,
            command=cli.command_line(),
            request=self._set.request,
            resolution=self._source.resolution,
            stage=0,
            tag=self._set.tag,
            num_sides=2,
        )


def pack(patch: SectionPatch) -> np.ndarray:
    """Pack a patch into (num_bytes,) uint8, so that it can be stored as one array.

    The first line is JSON: all numbers, and the type and shape of each array. The
    arrays follow in the same order.
    """
    arrays = {
        name: np.ascontiguousarray(value)
        for name, value in vars(patch).items()
        if isinstance(value, np.ndarray)
    }
    head: dict[str, Any] = {k: v for k, v in vars(patch).items() if k not in arrays}
    head["arrays"] = [[name, a.dtype.str, a.shape] for name, a in arrays.items()]
    blocks = [json.dumps(head).encode() + b"\n", *arrays.values()]
    padded = []
    for block in blocks:
        # Aligned, so that `unpack` can view the bytes as an array.
        data = np.frombuffer(memoryview(block).cast("B"), np.uint8)
        padded += [data, np.full(-data.size % _ALIGN_BYTES, ord(" "), np.uint8)]
    return np.concatenate(padded)


def unpack(packed: np.ndarray) -> SectionPatch:
    """Unpack a patch that `pack` made; its arrays are views of `packed`."""
    line = packed[:_MOST_HEAD_BYTES].tobytes().partition(b"\n")[0]
    head, start = json.loads(line), len(line) + 1
    for name, dtype, shape in head.pop("arrays"):
        start += -start % _ALIGN_BYTES
        end = start + int(np.prod(shape)) * np.dtype(dtype).itemsize
        head[name] = packed[start:end].view(dtype).reshape(shape)
        start = end
    statistics = head["statistics"] and GreyStatistics(*head["statistics"])
    x, y = head["translation"]
    return SectionPatch(**head | {"statistics": statistics, "translation": (x, y)})


def is_done(path: Path, wanted: Mapping, *, overwrite: bool) -> bool:
    """Whether the file of a request exists and was made from that request.

    Raises:
        DatasetError: a file of that name was made from other arguments, and
            `overwrite` is not given.
    """
    if overwrite or not path.exists():
        return False
    try:
        with h5py.File(path, "r") as file:
            found = file.attrs.get("request")
    except OSError:
        found = None
    if not isinstance(found, str):
        raise DatasetError(
            f"{path}: already exists and does not say how it was made; give "
            "--overwrite to replace it, or write elsewhere"
        )
    if differences := describe_differences(json.loads(found), wanted):
        raise DatasetError(
            f"{path}: already exists, made with other arguments: {differences}; give "
            "--overwrite to replace it, or write elsewhere"
        )
    logger.info("%s: already exists, nothing to do", path)
    return True


def open_parts(path: Path, wanted: Mapping, *, overwrite: bool) -> ResumeStore:
    """Open the store of finished results of a file that is being made.

    Raises:
        DatasetError: it has results of a run with other arguments, and `overwrite`
            is not given.
    """
    folder = parts_folder(path)
    try:
        store = ResumeStore(folder, wanted)
    except DatasetError:
        if not overwrite:
            raise
        logger.info("%s: replaced, made with other arguments", folder)
        ResumeStore.discard(folder)
        store = ResumeStore(folder, wanted)
    if done := len(store.keys()):
        logger.info("%s: resumes with %d finished patches", path, done)
    return store


def check_references(
    reader: PatchReader, without_reference: Sequence[Key], words: Words
) -> None:
    """Refuse patches that have tissue but an empty reference area.

    Raises:
        DatasetError: there are some; their sections are named.
    """
    if without_reference:
        assert reader.image_source is not None
        assert reader.image_source.reference is not None
        sections = [key[2] for key in without_reference]
        raise missing_reference(
            reader.image_source.reference, sections, words.reference_mip
        )


def warn_unless_normalized(
    path: PurePath, images: Iterable[np.ndarray | None], cure: str
) -> None:
    """Warn if images that are kept as stored are not normalised.

    Args:
        path: the file that is being made.
        images: as stored; the first with tissue is measured.
        cure: the flag or entry that normalises them.
    """
    found = (tissue_statistics(torch.from_numpy(np.array(image))) for image in images)
    first = next((statistics for statistics in found if statistics), None)
    if first is not None and not looks_normalized(first):
        logger.warning(
            "%s: not normalised: tissue has mean %.3g and std %.3g, expected 0 and 1; "
            "train.py refuses it; give %s",
            *(path.name, first.mean, first.std, cure),
        )


def report_blank(
    path: PurePath, source: str, blank: Mapping[int, float], what: str = "sections"
) -> None:
    """Log the blank fraction of the sections, and name those that are mostly blank.

    Args:
        path: the file that is being made.
        source: the volume that was read.
        blank: by section (or pair), the fraction of pixels without data.
        what: the unit that is counted, "sections" or "pairs".

    Raises:
        DatasetError: each of them is all blank.
    """
    if min(blank.values()) == 1:
        raise DatasetError(
            f"{path}: all {len(blank)} {what} of {source} are blank here; "
            f"{WHAT_TO_CHECK}"
        )
    values = list(blank.values())
    logger.info(
        "%s: %d %s, blank %.1f%% (%.1f%%...%.1f%%)",
        *(path.name, len(values), what),
        *(100 * float(value) for value in (np.mean(values), min(values), max(values))),
    )
    if mostly := {z: part for z, part in blank.items() if part > _MOSTLY_BLANK}:
        named = ", ".join(f"{z} ({part:.0%})" for z, part in sorted(mostly.items()))
        logger.warning("%s: mostly blank: %s %s", path.name, what, named)


def _name(key: Key) -> str:
    """Name a patch in the store. Version 1.0.0 used other names and contents."""
    return "patch-" + "_".join(map(str, key))
