"""One image set in the making: what is read, kept, normalised and written."""

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from metroem import cli
from metroem.create.download import (
    DefectMask,
    already_there,
    open_parts,
    report_blank,
    report_masked,
    warn_unless_normalized,
)
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
from metroem.create.requests import ImageRequest
from metroem.errors import DatasetError
from metroem.grid import Grid
from metroem.io.h5 import (
    FieldSet,
    ImageSet,
    ImageSetMeta,
    Pair,
    PairFrame,
    write_image_set,
)
from metroem.io.image_volume import ImageVolume
from metroem.io.lock import holding, lock_path
from metroem.io.parts import PartStore, as_json, parts_folder
from metroem.io.volume import Volume, covering, cut, read_sections
from metroem.normalize import GreyStatistics, normalize
from metroem.progress import in_threads

logger = logging.getLogger(__name__)


class Sources(NamedTuple):
    """The volumes that a download reads, opened and checked."""

    image: ImageVolume
    mask: DefectMask | None
    reference: ImageVolume | None
    fields: FieldSet | None


class ImageFile:
    """One image set in the making.

    Attributes:
        path: of the file.
        windows: by z, what is cut out of that section (one area, if both pairs
            that a section belongs to move it alike).
    """

    def __init__(
        self,
        request: ImageRequest,
        sources: Sources,
        grid: Grid,
        frames: list[PairFrame],
    ) -> None:
        self.request, self.sources, self.grid = request, sources, grid
        self.frames = frames
        self.path = request.path(grid.mip)
        cutouts: dict[int, list[Grid]] = {z: [] for z in request.sections}
        for frame in frames:
            for side, z in enumerate(frame.sections):
                cutouts[z].append(_moved(frame, side))
        self.windows = {z: covering(grids) for z, grids in cutouts.items()}
        self.reference = self._reference()

    def check(self) -> None:
        """Refuse what the volumes do not hold.

        Raises:
            DatasetError: as said.
        """
        image, mip = self.sources.image, self.grid.mip
        image.check_mip("--mip", mip)
        image.check_sections(self.request.sections, mip)
        image.check_covers(self.grid, "the patch")
        beyond = [z for z, w in self.windows.items() if image.clip(w) != w]
        if beyond:
            logger.warning(
                "%s: --field_dset moves sections %s beyond the volume; blank there",
                self.path.name,
                beyond,
            )
        if self.reference is not None:
            volume, at = self.reference.volume, self.reference.mip
            volume.check_mip("--reference_mip", at)
            volume.check_lies_on(image, at)
            volume.check_sections(self.request.sections, at)
        if self.sources.mask is not None:
            self.sources.mask.check(mip, self.windows)

    def may_move(self) -> bool:
        """Whether the images that are there differ in where they were read alone."""
        try:
            found = ImageSet(self.path).request
        except DatasetError:
            return False
        wanted = as_json(self._wanted())
        return found != wanted == found | {"offsets": wanted["offsets"]}

    def make(self) -> None:
        """Download, unless the file is there; then write it and drop the parts.

        Images that are the same but were not moved by the field are replaced; those
        that one has moved since are kept.

        Raises:
            DatasetError: see `create_image_sets`.
            StorageError: another run makes it, or the disk is full.
        """
        with holding(lock_path(self.path)):
            overwrite = self.request.overwrite
            if not overwrite and self.may_move():
                if self.sources.fields is None:
                    logger.warning(
                        "%s: is there already, moved by a field (--field_dset); kept. "
                        "Take another --dst_folder or --suffix for images that are not",
                        self.path,
                    )
                    return
                if ImageSet(self.path).request.get("offsets") is None:
                    logger.info("%s: not moved yet, replaced (--field_dset)", self.path)
                    overwrite = True
            self._make(self._wanted(), overwrite)

    def _make(self, wanted: dict, overwrite: bool) -> None:
        if already_there(self.path, wanted, overwrite=overwrite):
            PartStore.discard(parts_folder(self.path))  # of a run killed at its end
            return
        store = open_parts(self.path, wanted, overwrite=overwrite)
        self._fetch(store)
        if self.sources.mask is not None:
            report_masked(self.path.name, store, "mask")
        try:
            report_blank(self.path, self.sources.image.path, self._blank(store))
        except DatasetError:
            # So that a second try, with credentials, reads again.
            store.remove()
            raise
        self._check_reference(store)
        if not self.request.normalize and self.sources.image.dtype.kind == "f":
            images = (store.load(f"image-{z}") for z in self.windows)
            warn_unless_normalized(self.path, images, "--normalize")
        write_image_set(
            self.path,
            self._pairs(store),
            self._meta(wanted),
            defects=self._masks(store),
        )
        store.remove()
        logger.info("%s: %d pairs", self.path, len(self.frames))

    def _reference(self) -> Reference | None:
        volume = self.sources.reference
        if volume is None:
            return None
        mip = self.request.reference_mip
        mip = self.grid.mip if mip is None else mip
        size = self.request.reference_size
        size = size or self.grid.at_mip(mip).rows
        return Reference(volume, mip, size, size)

    def _fetch(self, store: PartStore) -> None:
        reference = self.reference
        if reference is None:
            self._read(store, "image", self.sources.image, self.windows, {})
            return
        areas = {z: reference.around(window) for z, window in self.windows.items()}
        image = self.sources.image
        if (reference.volume.path, reference.mip) == (image.path, self.grid.mip):
            self._read(store, "image", image, self.windows, areas)
        else:
            self._read(store, "greys", reference.volume, {}, areas)
            self._read(store, "image", image, self.windows, {})
            self._measure(store, areas)

    def _read(
        self,
        store: PartStore,
        key: str,
        volume: Volume,
        windows: Mapping[int, Grid],
        areas: Mapping[int, Grid],
    ) -> None:
        """Read sections once, for what is cut out and for what normalises.

        Args:
            store: gets "image-<z>", "greys-<z>" (moments of the area, of the patch and
                of each sample, at the mip of the area) and, with a defect mask,
                "defects-<z>": the mask over the area of the image.
            key: of the part that comes last.
            volume: where from.
            windows: by z, what is cut out, may be {}.
            areas: by z, what normalises, of the same mip; may be {}.
        """
        hulls = {
            z: covering([grids[z] for grids in (windows, areas) if z in grids])
            for z in self.request.sections
            if (z in windows and not store.has(f"image-{z}"))
            or (z in areas and not store.has(f"greys-{z}"))
        }
        masks = "mask" if key == "image" else "reference_mask"
        if self.sources.mask is not None:
            parallel = self.request.parallel
            self.sources.mask.fetch(store, hulls, masks, parallel)

        def take(z: int, layers: np.ndarray) -> None:
            image = np.array(layers[0], order="C")
            image[~np.isfinite(image)] = 0
            measured = []
            if z in areas:
                around = cut(image, hulls[z], areas[z])
                measured = measure(around, areas[z], self.windows[z])
            if self.sources.mask is not None:
                marked = store.load(f"{masks}-{z}")
                image[marked] = 0
                if z in windows:
                    store.put(f"defects-{z}", cut(marked, hulls[z], windows[z]))
            if z in areas:
                area = moments_of(image, hulls[z], areas[z], self.grid.mip)
                store.put(f"greys-{z}", np.array([area, *measured]))
            if z in windows:
                store.put(f"image-{z}", cut(image, hulls[z], windows[z]))

        read_sections(
            volume,
            hulls,
            take,
            parallel=self.request.parallel,
            what=f"{self.path.name}: {key}, layers of chunks",
        )

    def _measure(self, store: PartStore, areas: Mapping[int, Grid]) -> None:
        """Read the samples of the areas at the mip of the images: "sample<i>-<z>"."""
        image, mip = self.sources.image, self.grid.mip
        windows: dict[int, dict[int, Grid]] = {}
        for z, area in areas.items():
            for number, window in enumerate(samples_of(area, mip)):
                if not store.has(f"sample{number}-{z}"):
                    windows.setdefault(number, {})[z] = window

        def take(item: tuple[int, range]) -> None:
            number, slab = item
            for z, layers in image.read_layer(windows[number], slab):
                values = np.where(np.isfinite(layers[0]), layers[0], 0)
                grid = windows[number][z]
                moments = moments_of(values, grid, grid, mip)
                store.put(f"sample{number}-{z}", np.array(moments))

        items = [
            (number, slab)
            for number, grids in windows.items()
            for slab in image.slabs(mip, sorted(grids))
        ]
        if items:
            what = f"{self.path.name}: samples of the reference, layers of chunks"
            in_threads(items, take, what, threads=self.request.parallel)

    def _statistics(self, store: PartStore, z: int) -> GreyStatistics | None:
        """What normalises a section; None where its reference has nothing."""
        coarse = [Moments(*row) for row in store.load(f"greys-{z}")]
        fine = [
            Moments(*store.load(f"sample{number}-{z}"))
            for number in range(len(coarse) - 2)
        ]
        return statistics_for(coarse, fine, store.load(f"image-{z}"))

    def _check_reference(self, store: PartStore) -> None:
        """Refuse a reference that has nothing where the images have tissue.

        Raises:
            DatasetError: so; the sections are named.
        """
        if self.reference is None:
            return
        lacking = [
            z
            for z in self.windows
            if self._statistics(store, z) is None
            and has_contrast(store.load(f"image-{z}"))
        ]
        for z in lacking:  # so that a second try reads them again
            store.drop(f"greys-{z}")
            store.drop(f"image-{z}")
        if lacking:
            raise no_reference(self.reference, lacking, "--reference_mip")

    def _blank(self, store: PartStore) -> dict[int, float]:
        """By z, the share of pixels that will be without data in the file."""
        shares, flat = {}, []
        for z in self.windows:
            image = store.load(f"image-{z}")
            shares[z] = float((image == 0).mean())
            by_itself = self.reference is None or self._statistics(store, z) is None
            if self.request.normalize and by_itself and not has_contrast(image):
                flat += [z] if shares[z] < 1 else []
                shares[z] = 1.0
        if flat:
            logger.warning(
                "%s: sections %s are of one grey level, which is no tissue: blank",
                *(self.path.name, flat),
            )
        return shares

    def _pairs(self, store: PartStore) -> Iterator[Pair]:
        """The pairs, each section normalised once while it is src and then tgt."""
        made: dict[tuple[int, Grid], np.ndarray] = {}
        for frame in self.frames:
            wanted = [(z, _moved(frame, side)) for side, z in enumerate(frame.sections)]
            made = {
                key: made[key] if key in made else self._image(store, *key)
                for key in wanted
            }
            yield Pair(made[wanted[0]], made[wanted[1]])

    def _masks(self, store: PartStore) -> Iterator[Pair] | None:
        """The defects of each pair, or None without a mask."""
        if self.sources.mask is None:
            return None
        return (
            Pair(
                *(
                    cut(
                        store.load(f"defects-{z}"), self.windows[z], _moved(frame, side)
                    )
                    for side, z in enumerate(frame.sections)
                )
            )
            for frame in self.frames
        )

    def _image(self, store: PartStore, z: int, window: Grid) -> np.ndarray:
        raw = cut(store.load(f"image-{z}"), self.windows[z], window)
        if not self.request.normalize:
            return raw.astype(np.float32)
        # A copy, since a part cannot be written to; as it is stored if 8 bit will do.
        image = np.array(raw, np.uint8 if raw.dtype == np.uint8 else np.float32)
        statistics = self._statistics(store, z) if self.reference else None
        return normalize(torch.from_numpy(image), statistics).numpy()

    def _normalization(self) -> dict:
        if not self.request.normalize:
            return {"kind": "raw"}
        reference: dict = {"area": "patch"}
        if self.reference is not None:
            reference = {
                "area": "around the patch",
                "path": self.reference.volume.path,
                "mip": self.reference.mip,
                "size_px": self.reference.rows,
            }
        return {"kind": "tissue", "reference": reference}

    def _wanted(self) -> dict:
        """All that the content of the file depends on."""
        grid, mask = self.grid, self.sources.mask
        return {
            "cv_path": self.sources.image.path,
            "mip": grid.mip,
            "patch_size": grid.rows,
            "corner": [grid.x, grid.y],
            "anchor": self.request.anchor,
            "z_start": self.request.z_start,
            "z_end": self.request.z_end,
            "normalization": self._normalization(),
            "cv_path_defects": mask.volume.path if mask else None,
            "mask_val": mask.value if mask else None,
            "offsets": [f.offsets for f in self.frames]
            if self.sources.fields
            else None,
        }

    def _meta(self, wanted: dict) -> ImageSetMeta:
        return ImageSetMeta(
            self.frames,
            source=self.sources.image.path,
            command=cli.command_line(),
            request=wanted,
            resolution=self.sources.image.resolution,
            anchor=self.request.anchor,
            normalization=self._normalization(),
        )


def _moved(frame: PairFrame, side: int) -> Grid:
    """Where one side of a pair is read."""
    grid, (x, y) = frame.grid, frame.offsets[side]
    return Grid(grid.mip, grid.x + x, grid.y + y, grid.rows, grid.cols)
