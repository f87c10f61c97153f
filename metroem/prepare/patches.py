"""Read, move, mask and measure sections: the one engine of all data sets.

A patch is read once of each section at each place, however many pairs share it:

    field    vectors around the patch; their mean is the translation
    image    the patch, moved by the translation; 0 where a mask marks defects
    moments  of the area around it that normalises, if that is not the patch itself

Downloads along z are the regular case: one place, and all sections from z_start - 1
on. A data set from points has many places. Patches are kept as they are stored;
`PatchReader.image` normalises them and `PatchReader.field` resamples their vectors.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch

from metroem.geometry.grid import Grid
from metroem.imaging.normalize import GreyStatistics, coarsen_image, normalize
from metroem.io.field_volume import FieldVolume, mean_translation, residual_field
from metroem.io.image_volume import ImageVolume
from metroem.io.volume import Volume, bounding_grid, crop_array, iter_sections
from metroem.prepare.sources import (
    DefectMask,
    Moments,
    ReferenceArea,
    has_contrast,
    measure,
    moments_of,
    resample_mask,
    samples_of,
    statistics_for,
)
from metroem.utils.progress import in_threads

logger = logging.getLogger(__name__)

# Of a patch: x and y, mip-0 pixels, which tell places apart, and z of its section.
Key = tuple[int, int, int]


class ImageSource(NamedTuple):
    """Where images come from.

    Attributes:
        volume: of the images.
        mip: that is read; it is averaged to that of the patches.
        normalize: mean 0 and std 1 over tissue; else as stored.
        reference: area that normalises; None: the image itself.
    """

    volume: ImageVolume
    mip: int
    normalize: bool
    reference: ReferenceArea | None = None


class FieldSource(NamedTuple):
    """Where fields come from.

    Attributes:
        stored: the fields.
        translation_mip: translations are whole pixels of it.
        profiled: what their mean is taken from.
        reference: the area around a patch to take it over; None: the patch.
    """

    stored: FieldVolume
    translation_mip: int
    profiled: FieldVolume
    reference: ReferenceArea | None = None

    def area(self, patch: Grid) -> Grid:
        """The area whose mean displacement is the translation of a patch."""
        if self.reference is None:
            return patch.cover(self.profiled.mip)
        return self.reference.around(patch)


@dataclass(frozen=True)
class SectionPatch:
    """What is read of one section at one place.

    Attributes:
        image: (H, W), as stored or float32 if it was averaged; 0 where there is no
            data or a defect.
        defects: (H, W) bool; None without masks.
        field: (2, h, w) as stored, around the patch at the field's mip.
        translation: x and y, mip-0 pixels, that moved the image.
        statistics: of the reference area; None: the image's own normalise it.
        blank: share of pixels, or of vectors, without data.
        masked: share of pixels, or of vectors that count, under a mask.
        not_finite: share of vectors that are NaN or infinite.
        is_flat: it is to be normalised, but has one grey level, so it becomes blank.
    """

    image: np.ndarray | None = None
    defects: np.ndarray | None = None
    field: np.ndarray | None = None
    translation: tuple[int, int] = (0, 0)
    statistics: GreyStatistics | None = None
    blank: float = 0.0
    masked: float = 0.0
    not_finite: float = 0.0
    is_flat: bool = False


class Destination(Protocol):
    """What patches are written to."""

    is_finished: bool

    def has(self, key: Key) -> bool:
        """Whether a patch is there from a run that was killed."""
        ...

    def put(self, key: Key, patch: SectionPatch) -> None:
        """Keep a patch; called from several threads."""
        ...

    def finish(self, lacking: Sequence[Key]) -> None:
        """Write what is left to write; `lacking` patches have no reference."""
        ...


class PatchReader:
    """Reads patches of sections.

    Attributes:
        patches: by key, the area of each patch before it is moved; all of one mip.
        image_source: None: fields alone.
        field_source: None: images alone.
        masks: one or the other marks what is blanked.
    """

    def __init__(
        self,
        patches: Mapping[Key, Grid],
        image: ImageSource | None,
        field: FieldSource | None,
        masks: Sequence[DefectMask],
    ) -> None:
        self.patches, self.masks = patches, masks
        self.image_source, self.field_source = image, field
        self.mip = next(iter(patches.values())).mip

    @property
    def volumes(self) -> list[tuple[Volume, int]]:
        """The volumes that are read, each with its mip."""
        found: list[tuple[Volume, int]] = []
        masked = []
        image, field = self.image_source, self.field_source
        if image is not None:
            found.append((image.volume, image.mip))
            masked.append(self.mip)
            if image.reference is not None:
                found.append((image.reference.volume, image.reference.mip))
                masked.append(image.reference.mip)
        if field is not None:
            found += [(one.volume, one.mip) for one in (field.stored, field.profiled)]
            masked.append(field.profiled.mip)
        return found + [
            (mask.volume, mip)
            for mask in self.masks
            for mip in sorted({mask.source_mip(mip) for mip in masked})
        ]

    def make(self, made: Destination, what: str, *, parallel: int) -> None:
        """Read the patches that are not there yet, and finish what is made of them.

        Args:
            made: gets each patch as soon as it is read.
            what: it is, for the progress.
            parallel: batches read at a time.

        Raises:
            DatasetError: a volume cannot be read, or what `Destination.finish` says.
        """
        if made.is_finished:
            return
        batches = self._batches([key for key in self.patches if not made.has(key)])
        ahead = -(-parallel // max(len(batches), 1))
        lacking: list[Key] = []

        def work(batch: list[Key]) -> None:
            for key, patch in self.read(batch, parallel=ahead):
                if patch is None:
                    lacking.append(key)
                else:
                    made.put(key, patch)

        if batches:
            in_threads(batches, work, f"{what}: layers of chunks", threads=parallel)
        made.finish(lacking)

    def _batches(self, keys: Iterable[Key]) -> list[list[Key]]:
        """Group patches so that no chunk is read for two batches."""
        by_place: dict[tuple[int, int], list[int]] = {}
        for x, y, z in keys:
            by_place.setdefault((x, y), []).append(z)
        volumes, batches = self.volumes, []
        for (x, y), sections in by_place.items():
            spans: list[tuple[int, int]] = []
            layers = [
                (layer.start, layer.stop)
                for volume, mip in volumes
                for layer in volume.slabs(mip, sorted(sections))
            ]
            for start, stop in sorted(layers):
                if spans and start < spans[-1][1]:
                    start, before = spans.pop()
                    stop = max(stop, before)
                spans.append((start, stop))
            wanted = set(sections)
            batches += [
                [(x, y, z) for z in range(*span) if z in wanted] for span in spans
            ]
        return batches

    def read(
        self, batch: Sequence[Key], *, parallel: int = 1
    ) -> Iterator[tuple[Key, SectionPatch | None]]:
        """Read the patches of one place, each chunk once.

        Args:
            batch: keys that differ in z alone.
            parallel: layers of chunks of each volume read at a time.

        Yields:
            Key and patch, in rising z; None instead of a patch that has tissue where
            its reference has nothing to normalise by.

        Raises:
            DatasetError: a volume cannot be read.
        """
        keys = {key[2]: key for key in sorted(batch, key=lambda key: key[2])}
        patches = {z: self.patches[key] for z, key in keys.items()}
        found = self._read_fields(patches, parallel)
        if self.image_source is not None:
            found = self._read_images(self.image_source, patches, dict(found), parallel)
        for z, patch in found:
            yield keys[z], patch

    def grid(self, key: Key, patch: SectionPatch) -> Grid:
        """The area that the image of a patch was read from."""
        return moved(self.patches[key], patch.translation)

    def image(self, key: Key, patch: SectionPatch, window: Grid) -> np.ndarray:
        """Normalise a window of a patch, if that is asked for.

        Args:
            key: of the patch.
            patch: with an image.
            window: a part of `grid`.

        Returns:
            (H, W) float32.
        """
        assert patch.image is not None and self.image_source is not None
        raw = crop_array(patch.image, self.grid(key, patch), window)
        if not self.image_source.normalize:
            return raw.astype(np.float32)
        # A copy, since a part cannot be written to; as it is stored if 8 bit will do.
        image = np.array(raw, np.uint8 if raw.dtype == np.uint8 else np.float32)
        return normalize(torch.from_numpy(image), patch.statistics).numpy()

    def field(self, key: Key, patch: SectionPatch) -> np.ndarray:
        """Resample the field of a patch and take its translation out.

        Returns:
            (2, H, W) float32 on the patch, pixels of its mip, channel 0 along cols.
        """
        assert patch.field is not None and self.field_source is not None
        stored, grid = self.field_source.stored, self.patches[key]
        vectors = stored.displacements(patch.field)
        return residual_field(vectors, stored.window(grid), grid, patch.translation)

    def _read_fields(
        self, patches: Mapping[int, Grid], parallel: int
    ) -> Iterator[tuple[int, SectionPatch]]:
        """Vectors and translation of each patch, by z."""
        source = self.field_source
        if source is None:
            yield from ((z, SectionPatch()) for z in patches)
            return
        stored, profiled = source.stored, source.profiled
        windows = {z: stored.window(grid) for z, grid in patches.items()}
        areas = {z: source.area(grid) for z, grid in patches.items()}
        marks = self._marks(areas, None, parallel)
        volumes = stored.volume, profiled.volume
        for z, vectors, around in _read_both(*volumes, windows, areas, parallel):
            assert around is not None
            marked, _ = next(marks)
            counts = np.ones(areas[z].shape, bool) if marked is None else ~marked
            found = mean_translation(
                profiled.displacements(around), counts, source.translation_mip
            )
            if found is None:
                logger.warning(
                    "%s %s: section %d has no vector to take a mean displacement from "
                    "around %s; 0",
                    *(stored.volume.flag, stored.volume.path, z, patches[z].center),
                )
            yield (
                z,
                SectionPatch(
                    field=vectors,
                    translation=found or (0, 0),
                    blank=float((vectors == 0).all(0).mean()),
                    masked=float(1 - counts.mean()),
                    not_finite=float((~np.isfinite(vectors)).any(0).mean()),
                ),
            )

    def _read_images(
        self,
        source: ImageSource,
        patches: Mapping[int, Grid],
        fields: Mapping[int, SectionPatch],
        parallel: int,
    ) -> Iterator[tuple[int, SectionPatch | None]]:
        """Add the images to patches, moved by the translations of their fields."""
        windows = {z: moved(grid, fields[z].translation) for z, grid in patches.items()}
        stored = {z: window.at_mip(source.mip) for z, window in windows.items()}
        reference, areas, other = source.reference, None, source.volume
        samples: Mapping[int, list[Moments]] = {}
        if reference is not None:
            other = reference.volume
            areas = {z: reference.around(window) for z, window in windows.items()}
            samples = self._measure_samples(source, areas, parallel)
        marks = self._marks(windows, areas, parallel)
        layers = _read_both(source.volume, other, stored, areas, parallel)
        for z, layer, around in layers:
            image = self._at_mip(layer, source)
            marked, marked_around = next(marks)
            if marked is not None:
                image[marked] = 0
            statistics = None
            if areas is not None and around is not None:
                area = _clean(around)
                parts = measure(area, areas[z], windows[z])
                if marked_around is not None:
                    area[marked_around] = 0
                whole = moments_of(area, areas[z], areas[z], self.mip)
                statistics = statistics_for([whole, *parts], samples[z], image)
            is_flat = False
            if source.normalize and statistics is None and not has_contrast(image):
                is_flat = bool(image.any())
            elif areas is not None and statistics is None:
                yield z, None
                continue
            blank = float((image == 0).mean())
            yield (
                z,
                replace(
                    fields[z],
                    image=image,
                    defects=marked,
                    statistics=statistics,
                    blank=1.0 if is_flat else blank,
                    masked=0.0 if marked is None else float(marked.mean()),
                    is_flat=is_flat,
                ),
            )

    def _measure_samples(
        self, source: ImageSource, areas: Mapping[int, Grid], parallel: int
    ) -> dict[int, list[Moments]]:
        """By z, the moments of each sample of an area, at the mip of the images."""
        samples = {z: samples_of(area, self.mip) for z, area in areas.items()}
        found: dict[int, list[Moments]] = {z: [] for z in areas}
        for number in range(max(map(len, samples.values()))):
            grids = {z: s[number] for z, s in samples.items() if number < len(s)}
            windows = {z: grid.at_mip(source.mip) for z, grid in grids.items()}
            for z, layer in iter_sections(source.volume, windows, parallel=parallel):
                image = self._at_mip(layer, source)
                found[z].append(moments_of(image, grids[z], grids[z], self.mip))
        return found

    def _at_mip(self, layer: np.ndarray, source: ImageSource) -> np.ndarray:
        """(H, W) of (1, H, W) as stored, at the mip of the patches."""
        image = _clean(layer)
        if self.mip == source.mip:
            return image
        fine = torch.from_numpy(image.astype(np.float32))[None, None]
        return coarsen_image(fine, self.mip - source.mip)[0, 0].numpy()

    def _marks(
        self,
        windows: Mapping[int, Grid],
        areas: Mapping[int, Grid] | None,
        parallel: int,
    ) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """What any mask marks of windows and areas, in rising z; None without masks."""
        readers = []
        for mask in self.masks:
            own, around = (
                {z: grid.cover(mask.source_mip(grid.mip)) for z, grid in grids.items()}
                for grids in (windows, areas or windows)
            )
            wanted = None if areas is None else around
            layers = _read_both(mask.volume, mask.volume, own, wanted, parallel)
            readers.append((mask.threshold, own, around, layers))
        for z in sorted(windows):
            marks: list[np.ndarray | None] = [None, None]
            for threshold, own, around, layers in readers:
                _, *values = next(layers)
                for side, (grids, source) in enumerate(
                    ((windows, own), (areas or {}, around))
                ):
                    value, before = values[side], marks[side]
                    if value is None:
                        continue
                    found = resample_mask(grids[z], value[0] >= threshold, source[z])
                    marks[side] = found if before is None else found | before
            yield marks[0], marks[1]


def moved(grid: Grid, translation: tuple[int, int]) -> Grid:
    """A grid moved by x and y, mip-0 pixels."""
    x, y = translation
    return Grid(grid.mip, grid.x + x, grid.y + y, grid.rows, grid.cols)


def _read_both(
    volume: Volume,
    other: Volume,
    windows: Mapping[int, Grid],
    areas: Mapping[int, Grid] | None,
    parallel: int,
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Read windows and areas, at once where both are of one volume and mip.

    Yields:
        z, (C, H, W) of its window and (C, H, W) of its area, as stored.
    """
    if areas is None:
        for z, layers in iter_sections(volume, windows, parallel=parallel):
            yield z, layers, None
        return
    mips = {grid.mip for grid in (*windows.values(), *areas.values())}
    if volume.path == other.path and len(mips) == 1:
        hulls = {z: bounding_grid([windows[z], areas[z]]) for z in windows}
        for z, layers in iter_sections(volume, hulls, parallel=parallel):
            yield (
                z,
                crop_array(layers, hulls[z], windows[z]),
                crop_array(layers, hulls[z], areas[z]),
            )
        return
    both = zip(
        iter_sections(volume, windows, parallel=parallel),
        iter_sections(other, areas, parallel=parallel),
        strict=True,
    )
    for (z, layers), (_, around) in both:
        yield z, layers, around


def _clean(layer: np.ndarray) -> np.ndarray:
    """A copy of (1, H, W) as stored, (H, W), 0 where it is not finite."""
    image = np.array(layer[0], order="C")
    if image.dtype.kind == "f":
        image[~np.isfinite(image)] = 0
    return image
