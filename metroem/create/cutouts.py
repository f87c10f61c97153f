"""The cut-outs of a data set from points: read, masked, normalised, moved.

A cut-out is one side of a pair. Sides that several pairs share are made once.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from metroem.create.download import marks_on, warn_of_integers
from metroem.create.reference import (
    Moments,
    Reference,
    has_contrast,
    measure,
    moments_of,
    no_reference,
    samples_of,
    statistics_for,
)
from metroem.create.spec import AreaSpec, Center, DatasetSpec, MaskSpec
from metroem.create.stored_field import StoredField, mean_translation, residual_field
from metroem.errors import DatasetError
from metroem.grid import Grid
from metroem.io.image_volume import ImageVolume
from metroem.io.volume import Volume, covering, cut
from metroem.normalize import coarsen_image, normalize

logger = logging.getLogger(__name__)

REFERENCE = 'a "reference" of the "image" to normalise by'  # what normalises a spec's
Translation = tuple[int, int]
Marks = dict[int, tuple[np.ndarray, np.ndarray]]


class Cutout(NamedTuple):
    """One side of a pair."""

    image: np.ndarray  # (H, W) float32, 0 where there is no data or a mask
    defects: np.ndarray | None  # (H, W) bool; None without masks
    field: np.ndarray | None  # (2, H, W) float32, px of dst_mip; None without field
    translation: Translation  # x, y, mip-0 px, that moved the image


class Cutter:
    """Makes the cut-outs of a spec.

    Attributes:
        spec: what is made.
        image: volume of the images.
        has_masks: whether cut-outs have defects.

    Raises:
        DatasetError: a volume that cannot be used.
        UsageError: a scale for int16 where fields are float.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        self.spec = spec
        self.image = ImageVolume(spec.image.path, flag="image")
        self.image.check_channels(1, "an image")
        self.image.check_mip("image: src_mip", spec.image.src_mip)
        if spec.image.reference is None:
            warn_of_integers(self.image, REFERENCE)
        self._masks = [self._mask(mask) for mask in spec.masks]
        self.has_masks = bool(self._masks)
        self._reference: Reference | None = None
        if spec.image.reference is not None:
            self._reference = self._area(spec.image.reference, "image: reference", 1)
        self._open_field()

    def check(self) -> None:
        """Refuse centres that the volumes do not hold.

        Raises:
            DatasetError: a section is outside of one of them, or a whole patch is
                outside of image or field; the pair is named.
        """
        volumes: list[tuple[Volume, int]] = [(self.image, self.spec.image.src_mip)]
        volumes += [(mask.volume, mask.mip) for mask in self._masks]
        for one in (self._reference, self._field, self._profiled):
            volumes += [(one.volume, one.mip)] if one else []
        beyond = set()
        for index, pair in enumerate(self.spec.pairs):
            for center in pair:
                for volume, mip in volumes:
                    _check_section(volume, mip, index, center)
                patch = self.spec.patch(center)
                inside = self.image.clip(patch)
                if inside != patch:
                    beyond.add(index)
                _check_place(self.image, patch, index)
                for mask in self._masks:
                    what = f"the patch of pairs {index}"
                    mask.volume.check_covers(inside or patch, what, at=mask.mip)
                if self._field is not None:
                    window = patch.cover(self._field.mip)
                    _check_place(self._field.volume, window, index)
        if beyond:
            logger.warning(
                "image %s: %d pairs reach beyond the volume, and are blank there: %s",
                *(self.image.path, len(beyond), sorted(beyond)),
            )

    def batches(self) -> list[list[Center]]:
        """All cut-outs, each once; those of a batch share their chunks."""
        by_place: dict[tuple[int, int], set[int]] = {}
        for pair in self.spec.pairs:
            for x, y, z in pair:
                by_place.setdefault((x, y), set()).add(z)
        mip = self.spec.image.src_mip
        return [
            [Center(x, y, z) for z in slab if z in sections]
            for (x, y), sections in by_place.items()
            for slab in self.image.slabs(mip, sorted(sections))
        ]

    def make(self, batch: Sequence[Center]) -> Iterator[tuple[Center, Cutout]]:
        """Make the cut-outs of a batch, or of a part of one.

        Raises:
            DatasetError: a volume cannot be read, or a reference area has nothing.
        """
        patches = {center.z: self.spec.patch(center) for center in batch}
        fields = dict(self._fields(patches))
        moved = {z: _moved(grid, fields[z][1]) for z, grid in patches.items()}
        centers = {center.z: center for center in batch}
        for z, image, defects in self._images(moved):
            yield centers[z], Cutout(image, defects, *fields[z])

    def _images(
        self, patches: Mapping[int, Grid]
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """z, image and defects of each patch."""
        mip, reference = self.spec.image.src_mip, self._reference
        windows = {z: grid.at_mip(mip) for z, grid in patches.items()}
        areas, of = windows, (self.image, mip)
        if reference is not None:
            areas = {z: reference.around(grid) for z, grid in patches.items()}
            of = reference.volume, reference.mip
        marks = self._marks(patches, areas)
        fine = {} if reference is None else self._measure(areas)
        lacking = []
        for z, stored, around in _read(self.image, windows, of, areas):
            image = self._at_dst_mip(stored)
            area, grid = _tissue(around[0]), areas[z]
            measured = measure(area, grid, patches[z]) if reference else []
            if self.has_masks:
                image[marks[z][0]] = area[marks[z][1]] = 0
            if reference is not None:
                whole = moments_of(area, grid, grid, patches[z].mip)
                statistics = statistics_for([whole, *measured], fine[z], image)
                if statistics is None and has_contrast(image):
                    lacking.append(z)
                    continue
                image = normalize(torch.from_numpy(image), statistics).numpy()
            yield z, image, marks[z][0] if self.has_masks else None
        if lacking and reference is not None:
            raise no_reference(reference, lacking, "src_mip")

    def _measure(self, areas: Mapping[int, Grid]) -> dict[int, list[Moments]]:
        """By z, the moments of each sample of an area, at the mip of the images."""
        mip, dst_mip = self.spec.image.src_mip, self.spec.dst_mip
        samples = {z: samples_of(area, dst_mip) for z, area in areas.items()}
        found: dict[int, list[Moments]] = {z: [] for z in areas}
        for number in range(max(map(len, samples.values()))):
            grids = {z: s[number] for z, s in samples.items() if number < len(s)}
            windows = {z: grid.at_mip(mip) for z, grid in grids.items()}
            for z, stored in self.image.read_windows(windows):
                image = self._at_dst_mip(stored)
                found[z].append(moments_of(image, grids[z], grids[z], dst_mip))
        return found

    def _at_dst_mip(self, stored: np.ndarray) -> np.ndarray:
        """(H, W) float32 of (1, H, W) as read, 0 where there is no data."""
        image = torch.from_numpy(_tissue(stored[0]))[None, None]
        levels = self.spec.dst_mip - self.spec.image.src_mip
        return coarsen_image(image, levels)[0, 0].numpy()

    def _fields(
        self, patches: Mapping[int, Grid]
    ) -> Iterator[tuple[int, tuple[np.ndarray | None, Translation]]]:
        """Residual field and translation of each patch, by z."""
        field, profiled = self._field, self._profiled
        if field is None or profiled is None:
            yield from ((z, (None, (0, 0))) for z in patches)
            return
        reference = self._field_area
        windows = {z: field.window(grid) for z, grid in patches.items()}
        areas = {z: reference.around(grid) for z, grid in patches.items()}
        marks = self._marks(areas, areas)
        mip = self.spec.translation_mip
        of = profiled.volume, profiled.mip
        for z, stored, around in _read(field.volume, windows, of, areas):
            counts = ~marks[z][1] if marks else np.ones(areas[z].shape, bool)
            found = mean_translation(profiled.displacements(around), counts, mip)
            if found is None:
                logger.warning(
                    "field %s: no vector to take a mean displacement from in section "
                    "%d around %s; 0",
                    *(field.volume.path, z, patches[z].center),
                )
            translation = found or (0, 0)
            vectors = field.displacements(stored)
            yield (
                z,
                (
                    residual_field(vectors, windows[z], patches[z], translation),
                    translation,
                ),
            )

    def _marks(self, windows: Mapping[int, Grid], areas: Mapping[int, Grid]) -> Marks:
        """By z, what any mask marks of a window and of an area; {} without masks."""
        marks: Marks = {}
        for mask in self._masks:
            own = {z: grid.cover(mask.mip) for z, grid in windows.items()}
            around = {z: grid.cover(mask.mip) for z, grid in areas.items()}
            of = mask.volume, mask.mip
            for z, *values in _read(mask.volume, own, of, around):
                both = zip(
                    (windows[z], areas[z]), values, (own[z], around[z]), strict=True
                )
                window, area = (
                    marks_on(grid, value[0] >= mask.threshold, source)
                    for grid, value, source in both
                )
                if z in marks:
                    window, area = window | marks[z][0], area | marks[z][1]
                marks[z] = window, area
        return marks

    def _mask(self, mask: MaskSpec) -> "_Mask":
        volume = self._volume(mask.path, mask.src_mip, "masks", 1)
        return _Mask(volume, mask.src_mip, mask.threshold)

    def _open_field(self) -> None:
        self._field = self._profiled = None
        field = self.spec.field
        if field is None:
            return
        volume = self._volume(field.path, field.src_mip, "field", 2)
        self._field = StoredField(volume, field.src_mip, field.form)
        self._field_area = self._area(field.reference, "field: reference", 2)
        volume, mip = self._field_area.volume, self._field_area.mip
        self._profiled = StoredField(volume, mip, field.form)

    def _area(self, area: AreaSpec, flag: str, num_channels: int) -> Reference:
        volume = self._volume(area.path, area.src_mip, flag, num_channels)
        size = Grid(area.dst_mip, 0, 0, area.x_size, area.y_size).cover(area.src_mip)
        return Reference(volume, area.src_mip, *size.shape)

    def _volume(self, path: str, mip: int, flag: str, num_channels: int) -> Volume:
        # Masks are compared with a threshold as they are stored.
        kind = ImageVolume if flag.startswith("image") else Volume
        volume = kind(path, flag=flag, resolution=self.image.resolution)
        volume.check_channels(num_channels, ("an image", "a field")[num_channels - 1])
        volume.check_mip(f"{flag}: src_mip", mip)
        volume.check_lies_on(self.image, mip)
        return volume


class _Mask(NamedTuple):
    """A volume of one mip that marks what is blanked."""

    volume: Volume
    mip: int
    threshold: float


def _read(
    volume: Volume,
    windows: Mapping[int, Grid],
    of: tuple[Volume, int],
    areas: Mapping[int, Grid],
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Read windows and areas, at once where both are of one volume and mip.

    Yields:
        z, (C, H, W) of its window and (C, H, W) of its area, as stored.
    """
    mip = next(iter(windows.values())).mip
    if (of[0].path, of[1]) != (volume.path, mip):
        around = dict(of[0].read_windows(areas))
        for z, layers in volume.read_windows(windows):
            yield z, layers, around[z]
        return
    hulls = {z: covering([windows[z], areas[z]]) for z in windows}
    for z, layers in volume.read_windows(hulls):
        yield z, cut(layers, hulls[z], windows[z]), cut(layers, hulls[z], areas[z])


def _tissue(stored: np.ndarray) -> np.ndarray:
    """A copy, float32, 0 where it was not finite."""
    image = np.array(stored, np.float32, order="C")
    image[~np.isfinite(image)] = 0
    return image


def _moved(grid: Grid, translation: Translation) -> Grid:
    x, y = translation
    return Grid(grid.mip, grid.x + x, grid.y + y, grid.rows, grid.cols)


def _check_section(volume: Volume, mip: int, index: int, center: Center) -> None:
    here = volume.sections_at(mip)
    if center.z not in here:
        raise DatasetError(
            f"pairs {index}: section {center.z} is needed, {volume.flag} {volume.path} "
            f"holds {here.start}...{here.stop - 1}; take the pair out of the spec, or "
            "choose other --offsets"
        )


def _check_place(volume: Volume, patch: Grid, index: int) -> None:
    if volume.clip(patch) is None:
        raise DatasetError(
            f"pairs {index}: its patch (x {patch.x}...{patch.end[0]}, y {patch.y}..."
            f"{patch.end[1]}, mip-0 pixels) lies outside of {volume.flag} "
            f"{volume.path}; coordinates in the spec are mip-0 pixels"
        )
