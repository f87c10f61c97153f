"""Write pairs to h5 files: an image set, a field set, or both.

Each patch is kept when it is read, as one part, so that a run that was killed resumes.
The files are written from the parts, which are dropped then.
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
from metroem.prepare.patches import Key, PatchReader, SectionPatch, moved
from metroem.prepare.sources import no_reference
from metroem.utils import cli

logger = logging.getLogger(__name__)

# A section that is blanker than this is named in the log.
_MUCH = 0.5
# Of a part: arrays begin at multiples of the first; the line before them is shorter
# than the second by far.
_ALIGN_BYTES, _MOST_HEAD_BYTES = 64, 4096


class Words(NamedTuple):
    """How a command's user gives things, for messages."""

    normalize: str = "--normalize"
    reference_mip: str = "--reference_mip"
    masks: str = "--cv_path_defects"
    threshold: str = "--mask_val"
    counted: str = "sections"  # what is said to be blank


@dataclass(frozen=True)
class PairSet:
    """The pairs that are made, and what their files say about themselves.

    Attributes:
        pairs: keys of the patches of src and of tgt.
        request: all that the content of the files depends on.
        image_path: the image set; None: fields alone.
        field_path: the field set; None: images alone.
        field_source: the volume of the fields, as the field set names it.
        frames: where the pairs lie; None: on the patch of src, each side moved by the
            translation of its field, and tgt by the distance of the two patches, too.
        anchor: what the mips of the place share: "corner" or "center".
        normalization: how the images are normalised, as image sets say it.
        tag: name of the checkpoint whose stage 0 the fields stand for.
        words: for messages.
    """

    pairs: Sequence[tuple[Key, Key]]
    request: Mapping
    image_path: Path | None = None
    field_path: Path | None = None
    field_source: str = ""
    frames: Sequence[PairLocation] | None = None
    anchor: str = "center"
    normalization: Mapping | None = None
    tag: str | None = None
    words: Words = Words()


class PairFiles:
    """The h5 files of some pairs in the making.

    Attributes:
        is_finished: whether they are there already.
    """

    def __init__(
        self, reader: PatchReader, pair_set: PairSet, *, overwrite: bool
    ) -> None:
        """Resume what a stopped run had finished.

        Raises:
            DatasetError: files or parts that another request made, and `overwrite`
                is not given.
        """
        self._reader, self._set = reader, pair_set
        both = (pair_set.image_path, pair_set.field_path)
        self._paths = [path for path in both if path is not None]
        request = pair_set.request
        there = [is_done(path, request, overwrite=overwrite) for path in self._paths]
        self.is_finished = all(there)
        self._path = self._paths[0]
        if self.is_finished:
            # Those of a run killed at its end.
            ResumeStore.discard(parts_folder(self._path))
            return
        self._store = open_parts(self._path, request, overwrite=overwrite)

    def check(self) -> None:
        """Check the checksum of each pair of the files that are there.

        Raises:
            DatasetError: a pair is not what was written.
        """
        for path in self._paths:
            if problems := verify(path):
                listed = "\n  ".join(problems)
                raise DatasetError(
                    f"{path}: damaged after it was written; the same command with "
                    f"--overwrite makes it again:\n  {listed}"
                )

    def has(self, key: Key) -> bool:
        """Whether a patch is there from a run that was killed."""
        return self._store.has(_name(key))

    def put(self, key: Key, patch: SectionPatch) -> None:
        """Keep a patch."""
        self._store.put(_name(key), pack(patch))

    def finish(self, lacking: Sequence[Key]) -> None:
        """Write the files from all patches and drop these.

        Args:
            lacking: patches that are not there, since their reference has nothing.

        Raises:
            DatasetError: there are such patches, or all is blank.
        """
        check_references(self._reader, lacking, self._set.words)
        # Without their arrays: each keeps a file open.
        patches = {
            key: replace(self._load(key), image=None, defects=None, field=None)
            for key in self._reader.patches
        }
        try:
            self._report(patches)
        except DatasetError:
            # So that a second try, with credentials, reads again.
            self._store.remove()
            raise
        frames = self._set.frames or [self._frame(p, patches) for p in self._set.pairs]
        if self._set.field_path is not None:
            fields = (np.stack(sides) for sides in self._sides(frames, self._field))
            write_field_set(self._set.field_path, fields, self._field_meta(frames))
        if self._set.image_path is not None:
            images, defects = (
                (Pair(*sides) for sides in self._sides(frames, side))
                for side in (self._image, self._defects)
            )
            if self._set.frames is None:
                # Each is compressed by itself, or files would lie otherwise on disk.
                images = (Pair(*map(np.array, pair)) for pair in images)
            write_image_set(
                self._set.image_path,
                images,
                self._image_meta(frames),
                defects=defects if self._reader.masks else None,
            )
        self._store.remove()
        logger.info("%s: %d pairs", self._path, len(frames))

    def _load(self, key: Key) -> SectionPatch:
        return unpack(self._store.load(_name(key)))

    def _report(self, patches: Mapping[Key, SectionPatch]) -> None:
        """Log what is blank, masked and not as it should be; refuse all blank."""
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
                "%s: sections %s are of one grey level, which is no tissue: blank",
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

    def _frame(
        self, pair: tuple[Key, Key], patches: Mapping[Key, SectionPatch]
    ) -> PairLocation:
        """Where a pair lies; see `PairSet.frames`."""
        grid, other = (self._reader.patches[key] for key in pair)
        src, tgt = (patches[key].translation for key in pair)
        apart = tgt[0] + other.x - grid.x, tgt[1] + other.y - grid.y
        return PairLocation(grid, (pair[0][2], pair[1][2]), (src, apart))

    def _sides(
        self, frames: Sequence[PairLocation], side_of: Callable[[Key, Grid], np.ndarray]
    ) -> Iterator[list[np.ndarray]]:
        """Make src and tgt of each pair; what the pair before had is made once."""
        made: dict[tuple[Key, Grid], np.ndarray] = {}
        for pair, frame in zip(self._set.pairs, frames, strict=True):
            wanted = [
                (key, moved(frame.grid, offset))
                for key, offset in zip(pair, frame.offsets, strict=True)
            ]
            made = {at: made[at] if at in made else side_of(*at) for at in wanted}
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

    def _image_meta(self, frames: Sequence[PairLocation]) -> ImageSetMeta:
        return ImageSetMeta(
            frames,
            source=self._source.path,
            command=cli.command_line(),
            request=self._set.request,
            resolution=self._source.resolution,
            anchor=self._set.anchor,
            normalization=self._set.normalization,
        )

    def _field_meta(self, frames: Sequence[PairLocation]) -> FieldSetMeta:
        return FieldSetMeta(
            frames,
            source=self._set.field_source,
            command=cli.command_line(),
            request=self._set.request,
            resolution=self._source.resolution,
            stage=0,
            tag=self._set.tag,
            num_sides=2,
        )


def pack(patch: SectionPatch) -> np.ndarray:
    """Lay a patch out as (num_bytes,) uint8, so that it is one part.

    A line of JSON describes it: numbers, and type and shape of each array. The arrays
    follow, in that order.
    """
    arrays = {
        name: np.ascontiguousarray(value)
        for name, value in vars(patch).items()
        if isinstance(value, np.ndarray)
    }
    head: dict[str, Any] = {k: v for k, v in vars(patch).items() if k not in arrays}
    head["arrays"] = [[name, a.dtype.str, a.shape] for name, a in arrays.items()]
    blocks = [json.dumps(head).encode() + b"\n", *arrays.values()]
    parts = []
    for block in blocks:
        # Aligned, as numpy wants it.
        part = np.frombuffer(memoryview(block).cast("B"), np.uint8)
        parts += [part, np.full(-part.size % _ALIGN_BYTES, ord(" "), np.uint8)]
    return np.concatenate(parts)


def unpack(part: np.ndarray) -> SectionPatch:
    """Read what `pack` laid out; arrays are views of `part`."""
    line = part[:_MOST_HEAD_BYTES].tobytes().partition(b"\n")[0]
    head, start = json.loads(line), len(line) + 1
    for name, dtype, shape in head.pop("arrays"):
        start += -start % _ALIGN_BYTES
        end = start + int(np.prod(shape)) * np.dtype(dtype).itemsize
        head[name] = part[start:end].view(dtype).reshape(shape)
        start = end
    statistics = head["statistics"] and GreyStatistics(*head["statistics"])
    x, y = head["translation"]
    return SectionPatch(**head | {"statistics": statistics, "translation": (x, y)})


def is_done(path: Path, wanted: Mapping, *, overwrite: bool) -> bool:
    """Whether the file that a request asks for exists, made from that request.

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
            f"{path}: is there already and does not say how it was made; give "
            "--overwrite to replace it, or write elsewhere"
        )
    if unlike := describe_differences(json.loads(found), wanted):
        raise DatasetError(
            f"{path}: is there already, made with other arguments: {unlike}; give "
            "--overwrite to replace it, or write elsewhere"
        )
    logger.info("%s: is there already, nothing to do", path)
    return True


def open_parts(path: Path, wanted: Mapping, *, overwrite: bool) -> ResumeStore:
    """Open the parts of the file to be, with those of a run that was killed.

    Raises:
        DatasetError: there are parts made from other arguments, and `overwrite`
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
        logger.info("%s: resumes with %d finished parts", path, done)
    return store


def check_references(reader: PatchReader, lacking: Sequence[Key], words: Words) -> None:
    """Refuse references that have nothing where the images have tissue.

    Raises:
        DatasetError: there are some; their sections are named.
    """
    if lacking:
        assert reader.image_source is not None
        assert reader.image_source.reference is not None
        sections = [key[2] for key in lacking]
        raise no_reference(reader.image_source.reference, sections, words.reference_mip)


def warn_unless_normalized(
    path: PurePath, images: Iterable[np.ndarray | None], cure: str
) -> None:
    """Warn if images that are kept as stored are not normalised.

    Args:
        path: the file in the making.
        images: as stored; the first that has tissue is looked at.
        cure: what is to be given.
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
    path: PurePath, source: str, shares: Mapping[int, float], what: str = "sections"
) -> None:
    """Log how much of the sections is blank, and name those that mostly are.

    Args:
        path: the file in the making.
        source: the volume that was read.
        shares: by z (or what else is counted), the share of pixels without data.
        what: is counted.

    Raises:
        DatasetError: all of every one is blank.
    """
    if min(shares.values()) == 1:
        raise DatasetError(
            f"{path}: all {len(shares)} {what} of {source} are blank here; "
            f"{WHAT_TO_CHECK}"
        )
    values = list(shares.values())
    logger.info(
        "%s: %d %s, blank %.1f%% (%.1f%%...%.1f%%)",
        *(path.name, len(values), what),
        *(100 * float(value) for value in (np.mean(values), min(values), max(values))),
    )
    if mostly := {z: share for z, share in shares.items() if share > _MUCH}:
        named = ", ".join(f"{z} ({share:.0%})" for z, share in sorted(mostly.items()))
        logger.warning("%s: mostly blank: %s %s", path.name, what, named)


def _name(key: Key) -> str:
    """Of the part of a patch; parts of version 1.0.0 had other names and contents."""
    return "patch-" + "_".join(map(str, key))
