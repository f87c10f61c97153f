"""Download image sets along z: pairs of neighbouring sections, one file per mip."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid, in_nm, same_resolution
from metroem.io.files import lock, lock_path
from metroem.io.h5 import FieldSet, ImageSet, PairLocation
from metroem.io.image_volume import ImageVolume
from metroem.io.moved import moved_apart
from metroem.io.resume import as_json
from metroem.io.volume import bounding_grid
from metroem.prepare.pair_files import PairFiles, PairSet
from metroem.prepare.patches import ImageSource, Key, PatchReader, move_grid
from metroem.prepare.requests import ImageRequest
from metroem.prepare.sources import (
    DefectMask,
    ReferenceArea,
    open_mask,
    warn_if_integers,
)
from metroem.specs.filenames import ImageSetName

logger = logging.getLogger(__name__)


class _Sources(NamedTuple):
    """The volumes that a download reads, opened and checked."""

    image: ImageVolume
    masks: list[DefectMask]
    reference: ImageVolume | None
    fields: FieldSet | None


def download_image(request: ImageRequest) -> list[Path]:
    """Download the image sets of a request; keep those that already exist.

    Each section is read once. It is stored beside the unfinished file, so a run that
    was killed resumes where it was.

    With a field set, existing images that differ only in not having been moved are
    replaced. So are those of the location's other mips: all mips of a location have
    to be moved alike, or its stages do not fit together.

    Returns:
        The files, one per mip.

    Raises:
        DatasetError: the volume lacks something that is asked for, all pixels are
            blank, or a file made with other arguments exists.
    """
    sources = _open(request)
    with_others = _with_other_mips(request, sources.fields)
    # Everything is checked before anything is read.
    files = [_ImageFile(with_others, sources, grid) for grid in with_others.grids()]
    files = [
        one
        for one in files
        if one.grid.mip in request.mips or one.differs_only_in_offsets()
    ]
    for file in files:
        file.check()
    for file in files:
        file.make()
    _warn_of_others(request)
    return [file.path for file in files]


def _with_other_mips(request: ImageRequest, fields: FieldSet | None) -> ImageRequest:
    """Add the other existing mips of the location that the fields can move."""
    if fields is None:
        return request
    mips, sizes = list(request.mips), list(request.patch_sizes)
    for images in _others(request):
        step = 1 << images.mip
        moved = (fields.offset(i, side) for i in range(len(fields)) for side in (0, 1))
        corner = (request.x_offset, request.y_offset)
        if not any(value % step for at in (*moved, corner) for value in at):
            mips.append(images.mip)
            sizes.append(images.shape[0])
    return replace(request, mips=mips, patch_sizes=sizes)


def _warn_of_others(request: ImageRequest) -> None:
    """Warn of mips of the location that were moved otherwise than the request's."""
    requested = ImageSet(request.path(request.mips[0]))
    for images in _others(request):
        if len(images) == len(requested) and (
            difference := moved_apart(requested, images)
        ):
            logger.warning("%s: %s", images.path, difference)


def _others(request: ImageRequest) -> list[ImageSet]:
    """Existing image sets of the request's location at other mips."""
    own_name = ImageSetName.parse(request.path(0).name)
    assert own_name is not None
    named = [
        (path, name)
        for path in sorted(request.dst_folder.glob("*.h5"))
        if (name := ImageSetName.parse(path.name)) is not None
    ]
    return [
        ImageSet(path)
        for path, name in named
        if name.place == own_name.place and name.mip not in request.mips
    ]


def _open(request: ImageRequest) -> _Sources:
    """Open the volumes, and refuse those of the wrong kind or resolution."""
    image = ImageVolume(request.cv_path)
    image.check_channels(1, "an image")
    masks = open_mask(request.cv_path_defects, request.mask_val, image)
    reference = fields = None
    if request.has_reference:
        reference = ImageVolume(
            request.reference_path or request.cv_path,
            flag="--reference_path" if request.reference_path else "--cv_path",
            resolution=image.resolution,
        )
        reference.check_channels(1, "an image")
    if request.field_dset is not None:
        fields = FieldSet(Path(request.field_dset))
        _check_resolution(fields, image)
    if not request.normalize:
        warn_if_integers(image, "--normalize")
    return _Sources(image, masks, reference, fields)


def _check_resolution(fields: FieldSet, image: ImageVolume) -> None:
    """Refuse fields whose mip-0 pixels differ in size from those of the images."""
    if not same_resolution(fields.resolution, image.resolution):
        raise DatasetError(
            f"--field_dset {fields.path}: its mip-0 pixels are "
            f"{in_nm(fields.resolution)}, those of --cv_path {image.path} "
            f"{in_nm(image.resolution)}; download the fields from a volume whose "
            "scales are mips of the images, into a folder with image sets of these "
            "images, which define mip 0"
        )


def _pair_locations(
    request: ImageRequest, fields: FieldSet | None, grid: Grid
) -> list[PairLocation]:
    """Locate each pair: the patch, its sections, and the offsets of its fields.

    Raises:
        DatasetError: the fields lack a pair, lie elsewhere, or have offsets between
            the pixels of the images.
    """
    sections = [(z, z - 1) for z in range(request.z_start, request.z_end)]
    if fields is None:
        return [PairLocation(grid, pair) for pair in sections]
    index = {fields.sections(i): i for i in range(fields.num_pairs)}
    locations = []
    for pair in sections:
        if pair not in index:
            raise DatasetError(
                f"--field_dset {fields.path}: has no pair of sections {pair[0]} and "
                f"{pair[1]}; download it for the same --z_start and --z_end"
            )
        field_grid = fields.grid(index[pair])
        if not (field_grid.covers(grid) or grid.covers(field_grid)):
            raise DatasetError(
                f"--field_dset {fields.path}: lies on {field_grid}, the patch on "
                f"{grid}; download it for the same --x_offset and --y_offset"
            )
        offsets = fields.offset(index[pair], 0), fields.offset(index[pair], 1)
        if any(value % (1 << grid.mip) for side in offsets for value in side):
            raise DatasetError(
                f"--field_dset {fields.path}: the offsets {offsets} of section "
                f"{pair[0]} are not multiples of 2^{grid.mip}; download it with "
                f"--dst_mip {grid.mip} or coarser"
            )
        locations.append(PairLocation(grid, pair, offsets))
    return locations


class _ImageFile:
    """Checks and downloads one image set.

    Attributes:
        grid: the patch.
        path: the file.
    """

    def __init__(self, request: ImageRequest, sources: _Sources, grid: Grid) -> None:
        self._request, self._sources, self.grid = request, sources, grid
        self.path = request.path(grid.mip)
        self._locations = _pair_locations(request, sources.fields, grid)
        # A section belongs to two pairs. If they move it differently, its window covers
        # both areas.
        areas: dict[int, list[Grid]] = {z: [] for z in request.sections}
        for pair in self._locations:
            for z, offset in zip(pair.sections, pair.offsets, strict=True):
                areas[z].append(move_grid(grid, offset))
        self._windows = {z: bounding_grid(grids) for z, grids in areas.items()}
        self._reference = self._reference_area()
        self._reader = PatchReader(
            {self._key(z): window for z, window in self._windows.items()},
            ImageSource(sources.image, grid.mip, request.normalize, self._reference),
            None,
            sources.masks,
        )

    def check(self) -> None:
        """Refuse a patch, sections or mips that the volumes lack.

        Raises:
            DatasetError: they lack one.
        """
        image, mip, sections = (
            self._sources.image,
            self.grid.mip,
            self._request.sections,
        )
        image.check_mip("--mip", mip)
        image.check_sections(sections, mip)
        image.check_covers(self.grid, "the patch")
        beyond = [z for z, w in self._windows.items() if image.clip(w) != w]
        if beyond:
            logger.warning(
                "%s: --field_dset moves sections %s beyond the volume; blank there",
                self.path.name,
                beyond,
            )
        if (reference := self._reference) is not None:
            volume, at = reference.volume, reference.mip
            volume.check_mip("--reference_mip", at)
            volume.check_lies_on(image, at)
            volume.check_sections(sections, at)
        for mask in self._sources.masks:
            mask.check(image, mip, self._windows)

    def differs_only_in_offsets(self) -> bool:
        """Whether the existing images differ only in how far they were moved."""
        try:
            found = ImageSet(self.path).request
        except DatasetError:
            return False
        wanted = as_json(self._settings())
        return found != wanted == found | {"offsets": wanted["offsets"]}

    def make(self) -> None:
        """Download and write the file, unless it already exists.

        With a field set, existing images that were not moved are replaced. Without
        one, existing images that were moved are kept.

        Raises:
            DatasetError: see `download_image`.
            StorageError: another run is making the file, or the disk is full.
        """
        with lock(lock_path(self.path)):
            overwrite = self._request.overwrite
            if not overwrite and self.differs_only_in_offsets():
                if self._sources.fields is None:
                    logger.warning(
                        "%s: already exists, moved by a field (--field_dset); kept. "
                        "Give another --dst_folder or --suffix for images that are not "
                        "moved",
                        self.path,
                    )
                    return
                if ImageSet(self.path).request.get("offsets") is None:
                    logger.info("%s: not moved yet, replaced (--field_dset)", self.path)
                    overwrite = True
            sections = [pair.sections for pair in self._locations]
            pair_set = PairSet(
                [(self._key(src), self._key(tgt)) for src, tgt in sections],
                self._settings(),
                image_path=self.path,
                locations=self._locations,
                anchor=self._request.anchor,
                normalization=self._normalization(),
            )
            files = PairFiles(self._reader, pair_set, overwrite=overwrite)
            self._reader.make(files, self.path.name, parallel=self._request.parallel)

    def _key(self, z: int) -> Key:
        return self.grid.x, self.grid.y, z

    def _reference_area(self) -> ReferenceArea | None:
        """The area that normalises, if the request asks for another than the patch."""
        volume = self._sources.reference
        if volume is None:
            return None
        mip = self._request.reference_mip
        mip = self.grid.mip if mip is None else mip
        size = self._request.reference_size
        size = size or self.grid.at_mip(mip).rows
        return ReferenceArea(volume, mip, size, size)

    def _normalization(self) -> dict:
        """How the images are normalised, in the form that image sets state it."""
        if not self._request.normalize:
            return {"kind": "raw"}
        reference: dict = {"area": "patch"}
        if (area := self._reference) is not None:
            reference = {
                "area": "around the patch",
                "path": area.volume.path,
                "mip": area.mip,
                "size_px": area.rows,
            }
        return {"kind": "tissue", "reference": reference}

    def _settings(self) -> dict:
        """All settings that determine the content of the file."""
        request, mask = self._request, next(iter(self._sources.masks), None)
        offsets = [pair.offsets for pair in self._locations]
        return {
            "cv_path": self._sources.image.path,
            "mip": self.grid.mip,
            "patch_size": self.grid.rows,
            "corner": [self.grid.x, self.grid.y],
            "anchor": request.anchor,
            "z_start": request.z_start,
            "z_end": request.z_end,
            "normalization": self._normalization(),
            "cv_path_defects": mask.volume.path if mask else None,
            "mask_val": mask.threshold if mask else None,
            "offsets": offsets if self._sources.fields else None,
        }
