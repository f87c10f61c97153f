"""Field sets from a CloudVolume: displacements that stage 1 starts from.

Of each section's field the mean displacement is taken out and kept as the
`offset` of the pair's side, since it is often larger than a patch; what is left
is resampled to the mip of the images.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from metroem import cli
from metroem.create.download import (
    DefectMask,
    already_there,
    open_parts,
    report_blank,
    report_masked,
)
from metroem.create.requests import FieldRequest
from metroem.create.stored_field import (
    FieldFormat,
    StoredField,
    mean_translation,
    residual_field,
)
from metroem.errors import DatasetError
from metroem.grid import Resolution
from metroem.io.h5 import FieldSetMeta, ImageSet, PairFrame, write_field_set
from metroem.io.lock import holding, lock_path
from metroem.io.parts import PartStore, parts_folder
from metroem.io.volume import Volume, cut, read_sections
from metroem.specs.filenames import ImageSetName

logger = logging.getLogger(__name__)


def create_field_set(request: FieldRequest) -> Path:
    """Download the field set of a request, unless it is there.

    Each section is read once. What was read is kept beside the file in the
    making, so a run that was killed goes on where it was.

    Returns:
        The file.

    Raises:
        DatasetError: the volume does not hold what is asked for, all of it is
            blank, or a file is there that other arguments made.
    """
    _FieldFile(request).make()
    if request.suffix is None:
        logger.info("train.py finds it by name only when it is made with --suffix NAME")
    else:
        logger.info("train.py finds it under --checkpoint_name %s", request.suffix)
    return request.path


def _resolution_of_images(request: FieldRequest) -> Resolution | None:
    """What the image sets that the fields are for say of mip 0; None: nothing."""
    for path in sorted(request.dst_folder.glob("x*.h5")):
        name = ImageSetName.parse(path.name)
        if name is not None and name.place == request.place_name:
            return ImageSet(path).resolution
    return None


class _FieldFile:
    """One field set in the making.

    Attributes:
        source: the area read at src_mip.
        core: the part of it that the patch covers; the rest is for resampling.
    """

    def __init__(self, request: FieldRequest) -> None:
        self.request = request
        self.volume = Volume(
            request.cv_path,
            resolution=_resolution_of_images(request),
            only_mip=request.src_mip,
        )
        self.volume.check_channels(2, "a field")
        self.volume.check_mip("--src_mip", request.src_mip)
        self.volume.check_sections(request.sections, request.src_mip)
        form = FieldFormat(
            request.channel_order, request.field_unit, request.int16_scale
        )
        self.stored = StoredField(self.volume, request.src_mip, form)
        self.core = request.grid.cover(request.src_mip)
        self.volume.check_covers(self.core, "the patch")
        self.source = self.stored.window(request.grid)
        self.mask: DefectMask | None = None
        if request.cv_path_defects is not None:
            self.mask = DefectMask(
                request.cv_path_defects, request.mask_val, self.volume
            )
            self.mask.check(
                request.src_mip, dict.fromkeys(request.sections, self.source)
            )

    def make(self) -> None:
        """Download, write the file and drop the parts.

        Raises:
            DatasetError: see `create_field_set`.
            StorageError: another run makes it, or the disk is full.
        """
        with holding(lock_path(self.request.path)):
            self._make(self._wanted())

    def _make(self, wanted: dict) -> None:
        request = self.request
        if already_there(request.path, wanted, overwrite=request.overwrite):
            PartStore.discard(parts_folder(request.path))  # of a run killed at its end
            return
        store = open_parts(request.path, wanted, overwrite=request.overwrite)
        self._fetch(store)
        try:
            self._report(store)
        except DatasetError:
            # So that a second try, with credentials, reads again.
            store.remove()
            raise
        offsets = {z: self._offset(store, z) for z in request.sections}
        frames = [
            PairFrame(request.grid, (z, z - 1), (offsets[z], offsets[z - 1]))
            for z in range(request.z_start, request.z_end)
        ]
        write_field_set(
            request.path, self._fields(store, offsets), self._meta(frames, wanted)
        )
        store.remove()
        logger.info("%s: %d pairs", request.path, len(frames))

    def _fetch(self, store: PartStore) -> None:
        windows = {
            z: self.source for z in self.request.sections if not store.has(f"field-{z}")
        }
        if self.mask is not None:
            self.mask.fetch(store, windows, "mask", self.request.parallel)
        read_sections(
            self.volume,
            windows,
            lambda z, vectors: store.put(f"field-{z}", vectors),
            parallel=self.request.parallel,
            what=f"{self.request.path.name}: layers of chunks",
        )

    def _report(self, store: PartStore) -> None:
        """Log what is blank, masked and not finite; refuse what is all blank."""
        path = self.request.path
        blank, broken = {}, {}
        for z in self.request.sections:
            vectors = store.load(f"field-{z}")
            blank[z] = float((vectors == 0).all(0).mean())
            broken[z] = float((~np.isfinite(vectors)).any(0).mean())
        report_blank(path, self.volume.path, blank)
        if self.mask is not None:
            report_masked(path.name, store, "mask")
        if any(broken.values()):
            logger.warning(
                "%s: vectors that are NaN or infinite, filled from the nearest that "
                "is not: %s",
                path.name,
                ", ".join(f"section {z} {s:.1%}" for z, s in broken.items() if s),
            )

    def _fields(
        self, store: PartStore, offsets: dict[int, tuple[int, int]]
    ) -> Iterator[np.ndarray]:
        """(2 sides, 2, H, W) of each pair; a section is resampled once."""
        made: dict[int, np.ndarray] = {}
        for z in range(self.request.z_start, self.request.z_end):
            made = {
                at: made[at] if at in made else self._resampled(store, at, offsets[at])
                for at in (z, z - 1)
            }
            yield np.stack([made[z], made[z - 1]])

    def _offset(self, store: PartStore, z: int) -> tuple[int, int]:
        """Mean displacement, x and y, rounded down to pixels of dst_mip."""
        vectors = self.stored.displacements(store.load(f"field-{z}"))
        counts = np.ones(self.core.shape, bool)
        if self.mask is not None:
            counts = ~cut(store.load(f"mask-{z}"), self.source, self.core)
        found = mean_translation(
            cut(vectors, self.source, self.core), counts, self.request.dst_mip
        )
        if found is None:
            logger.warning(
                "%s: section %d has no vector to take a mean displacement from; 0",
                self.request.path.name,
                z,
            )
        return found or (0, 0)

    def _resampled(
        self, store: PartStore, z: int, offset: tuple[int, int]
    ) -> np.ndarray:
        """(2, H, W) float32 on the patch, pixels of dst_mip, offset taken out."""
        vectors = self.stored.displacements(store.load(f"field-{z}"))
        return residual_field(vectors, self.source, self.request.grid, offset)

    def _wanted(self) -> dict:
        """All that the content of the file depends on."""
        request, mask = self.request, self.mask
        # What src_mip means, where it is not said by the order of the scales.
        mip_0 = {"resolution": self.volume.resolution} if self.volume.mips[0] else {}
        return mip_0 | {
            "cv_path": self.volume.path,
            "src_mip": request.src_mip,
            "dst_mip": request.dst_mip,
            "patch_size": request.patch_size,
            "corner": [request.x_offset, request.y_offset],
            "z_start": request.z_start,
            "z_end": request.z_end,
            "channel_order": request.channel_order,
            "mip0_px_per_stored_unit": self.stored.scale,
            "cv_path_defects": mask.volume.path if mask else None,
            "mask_val": mask.value if mask else None,
        }

    def _meta(self, frames: list[PairFrame], wanted: dict) -> FieldSetMeta:
        return FieldSetMeta(
            frames,
            source=self.volume.path,
            command=cli.command_line(),
            request=wanted,
            resolution=self.volume.resolution,
            stage=0,
            tag=self.request.suffix,
            num_sides=2,
        )
