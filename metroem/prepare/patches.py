"""Read patches of sections; move, mask and measure them.

All commands that make data sets use this engine. For each location and section it
reads, once, however many pairs share them:

    field    vectors around the patch; their mean is the translation
    image    the patch, moved by the translation; 0 where a mask marks defects
    moments  of the reference area around the patch, if there is one

A download along z has one location, and all sections from z_start - 1 to z_end - 1.
A data set from points has many locations. Patches keep the values of the volume. They
are normalised later, by `PatchReader.image`, or resampled, by `PatchReader.field`.
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
    measure_area,
    reference_statistics,
    resample_mask,
    sample_windows,
    tissue_moments,
)
from metroem.utils.progress import in_threads

logger = logging.getLogger(__name__)

# Names a patch: x and y of its location, mip-0 pixels, and z of its section.
Key = tuple[int, int, int]


class ImageSource(NamedTuple):
    """The volume that images are read from.

    Attributes:
        volume: of the images.
        mip: the mip that is read; pixels are averaged to the mip of the patches.
        normalize: whether to give mean 0 and std 1 over tissue; else as stored.
        reference: area that normalises; None: the image itself.
    """

    volume: ImageVolume
    mip: int
    normalize: bool
    reference: ReferenceArea | None = None


class FieldSource(NamedTuple):
    """The volumes that fields and their translations are read from.

    Attributes:
        stored: the fields.
        translation_mip: translations are whole pixels of this mip.
        profiled: the fields whose mean is the translation.
        reference: the area around a patch that the mean is taken over; None: the
            patch.
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
    """Image, field and statistics of one section at one location.

    Attributes:
        image: (H, W), as stored or float32 if it was averaged; 0 where there is no
            data or a defect.
        defects: (H, W) bool; None without masks.
        field: (2, h, w) as stored, around the patch at the field's mip.
        translation: x and y, mip-0 pixels, the mean of the vectors. The image was
            moved by it; `PatchReader.field` subtracts it.
        statistics: of the reference area; None: the image's own normalise it.
        blank: fraction of pixels without data, or of vectors if there is no image.
        masked: fraction of pixels under a mask. If there is no image: of the vectors
            whose mean is the translation.
        not_finite: fraction of vectors that are NaN or infinite.
        is_flat: whether the image has one grey level, so that it cannot be normalised
            and becomes blank.
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
    """Where patches are written: h5 files or volumes."""

    is_finished: bool

    def has(self, key: Key) -> bool:
        """Whether an earlier, stopped run has finished a patch."""
        ...

    def put(self, key: Key, patch: SectionPatch) -> None:
        """Store a patch; called from several threads."""
        ...

    def finish(self, without_reference: Sequence[Key]) -> None:
        """Complete the result; `without_reference` patches could not be normalised."""
        ...


class PatchReader:
    """Reads patches of sections.

    Attributes:
        patches: by key, the area of each patch before it is moved; all of one mip.
        image_source: the volume of the images; None to read fields alone.
        field_source: the volumes of the fields; None to read images alone.
        masks: pixels that any of them marks become 0.
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

    def make(self, destination: Destination, what: str, *, parallel: int) -> None:
        """Read all patches that the destination lacks, then let it finish.

        Args:
            destination: gets each patch as soon as it is read.
            what: name of the result, for the progress bar.
            parallel: batches read at a time.

        Raises:
            DatasetError: a volume cannot be read, or `Destination.finish` refuses.
        """
        if destination.is_finished:
            return
        batches = self._batches(
            [key for key in self.patches if not destination.has(key)]
        )
        ahead = -(-parallel // max(len(batches), 1))
        without_reference: list[Key] = []

        def work(batch: list[Key]) -> None:
            for key, patch in self.read(batch, parallel=ahead):
                if patch is None:
                    without_reference.append(key)
                else:
                    destination.put(key, patch)

        if batches:
            in_threads(batches, work, f"{what}: layers of chunks", threads=parallel)
        destination.finish(without_reference)

    def _batches(self, keys: Iterable[Key]) -> list[list[Key]]:
        """Group patches by location; batches of one location share no chunk."""
        by_location: dict[tuple[int, int], list[int]] = {}
        for x, y, z in keys:
            by_location.setdefault((x, y), []).append(z)
        volumes, batches = self.volumes, []
        for (x, y), sections in by_location.items():
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
        """Read the patches of one location, each chunk once.

        Args:
            batch: keys that differ only in z.
            parallel: layers of chunks of each volume read at a time.

        Yields:
            Key and patch, in rising z. The patch is None if it has tissue but its
            reference area has nothing to normalise by.

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
        return move_grid(self.patches[key], patch.translation)

    def image(self, key: Key, patch: SectionPatch, window: Grid) -> np.ndarray:
        """Crop the image of a patch to a window, and normalise it if asked for.

        Args:
            key: of the patch.
            patch: with an image.
            window: an area inside `grid`.

        Returns:
            (H, W) float32.
        """
        assert patch.image is not None and self.image_source is not None
        raw = crop_array(patch.image, self.grid(key, patch), window)
        if not self.image_source.normalize:
            return raw.astype(np.float32)
        # A copy, since a stored patch is read-only; uint8 stays uint8 to save memory.
        image = np.array(raw, np.uint8 if raw.dtype == np.uint8 else np.float32)
        return normalize(torch.from_numpy(image), patch.statistics).numpy()

    def field(self, key: Key, patch: SectionPatch) -> np.ndarray:
        """Resample the field of a patch and subtract its translation.

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
        """Read vectors and translation of each patch, by z."""
        source = self.field_source
        if source is None:
            yield from ((z, SectionPatch()) for z in patches)
            return
        stored, profiled = source.stored, source.profiled
        windows = {z: stored.window(grid) for z, grid in patches.items()}
        areas = {z: source.area(grid) for z, grid in patches.items()}
        masks = self._read_masks(areas, None, parallel)
        volumes = stored.volume, profiled.volume
        for z, vectors, around in _read_both(*volumes, windows, areas, parallel):
            assert around is not None
            marked, _ = next(masks)
            counts = np.ones(areas[z].shape, bool) if marked is None else ~marked
            found = mean_translation(
                profiled.displacements(around), counts, source.translation_mip
            )
            if found is None:
                logger.warning(
                    "%s %s: section %d has no vector to take a mean displacement from "
                    "around %s; its translation is 0",
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
        windows = {
            z: move_grid(grid, fields[z].translation) for z, grid in patches.items()
        }
        stored = {z: window.at_mip(source.mip) for z, window in windows.items()}
        reference, areas, other = source.reference, None, source.volume
        samples: Mapping[int, list[Moments]] = {}
        if reference is not None:
            other = reference.volume
            areas = {z: reference.around(window) for z, window in windows.items()}
            samples = self._measure_samples(source, areas, parallel)
        masks = self._read_masks(windows, areas, parallel)
        layers = _read_both(source.volume, other, stored, areas, parallel)
        for z, layer, around in layers:
            image = self._at_mip(layer, source)
            marked, marked_around = next(masks)
            if marked is not None:
                image[marked] = 0
            statistics = None
            if areas is not None and around is not None:
                area = _clean(around)
                inside = measure_area(area, areas[z], windows[z])
                if marked_around is not None:
                    area[marked_around] = 0
                of_area = tissue_moments(area, areas[z], areas[z], self.mip)
                statistics = reference_statistics([of_area, *inside], samples[z], image)
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
        """Measure each sample of an area at the mip of the images, by z."""
        samples = {z: sample_windows(area, self.mip) for z, area in areas.items()}
        found: dict[int, list[Moments]] = {z: [] for z in areas}
        for number in range(max(map(len, samples.values()))):
            grids = {z: s[number] for z, s in samples.items() if number < len(s)}
            windows = {z: grid.at_mip(source.mip) for z, grid in grids.items()}
            for z, layer in iter_sections(source.volume, windows, parallel=parallel):
                image = self._at_mip(layer, source)
                found[z].append(tissue_moments(image, grids[z], grids[z], self.mip))
        return found

    def _at_mip(self, layer: np.ndarray, source: ImageSource) -> np.ndarray:
        """Average a stored (1, H, W) layer to the mip of the patches: (H, W)."""
        image = _clean(layer)
        if self.mip == source.mip:
            return image
        fine = torch.from_numpy(image.astype(np.float32))[None, None]
        return coarsen_image(fine, self.mip - source.mip)[0, 0].numpy()

    def _read_masks(
        self,
        windows: Mapping[int, Grid],
        areas: Mapping[int, Grid] | None,
        parallel: int,
    ) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """Read the masks of windows and areas, and join them.

        Yields:
            In rising z, (H, W) bool of the window and of the area, True where any
            mask marks a defect; None without masks or without areas.
        """
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


def move_grid(grid: Grid, translation: tuple[int, int]) -> Grid:
    """Move a grid by x and y, mip-0 pixels."""
    x, y = translation
    return Grid(grid.mip, grid.x + x, grid.y + y, grid.rows, grid.cols)


def _read_both(
    volume: Volume,
    other: Volume,
    windows: Mapping[int, Grid],
    areas: Mapping[int, Grid] | None,
    parallel: int,
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Read windows and areas, in one pass if both are of one volume and mip.

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
    """Copy a stored (1, H, W) layer to (H, W), with 0 for NaN and infinity."""
    image = np.array(layer[0], order="C")
    if image.dtype.kind == "f":
        image[~np.isfinite(image)] = 0
    return image
