"""Find the field sets to export, and the complete displacements of each section."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metroem.errors import DatasetError
from metroem.export.requests import ExportRequest
from metroem.geometry.grid import Grid, Resolution, in_nm, nm_of, same_resolution
from metroem.io.h5 import Box, FieldSet, ImageSet, find_field_sets
from metroem.io.moved import command_to_move, unlike_offsets
from metroem.io.origins import how_to_make_again, place_digest, why_stale
from metroem.io.volume import Volume
from metroem.specs.filenames import ImageSetName

logger = logging.getLogger(__name__)


class ExportedSet(NamedTuple):
    """A field set and the images that it belongs to."""

    fields: FieldSet
    images: ImageSet | None  # of the fields' location and mip
    tgt_offset: int | None = None  # only pairs with this z of tgt - z of src are taken

    def sides(self) -> Iterator[tuple[int, int]]:
        """Yield (pair, side) of each section to export, in rising order of pairs.

        In consecutive pairs, tgt of a pair is src of the pair before. A section comes
        once if the set has fields for src and tgt, which belong to sections, as in a
        download. Fields for src alone belong to pairs: a section comes once for each
        pair that has it as src.
        """
        pairs = [
            (index, self.fields.grid(index), *self.fields.sections(index))
            for index in range(len(self.fields))
            if self.tgt_offset in (None, self.offset_to_tgt(index))
        ]
        as_src = {(z_src, grid) for _, grid, z_src, _ in pairs}
        seen: set[tuple[int, Grid]] = set()
        for index, grid, z_src, z_tgt in pairs:
            if (z_tgt, grid) not in as_src and (z_tgt, grid) not in seen:
                yield index, 1
            if self.fields.num_sides == 1 or (z_src, grid) not in seen:
                yield index, 0
            seen |= {(z_tgt, grid), (z_src, grid)}

    def offset_to_tgt(self, index: int) -> int:
        """z of tgt minus z of src of a pair; usually -1."""
        z_src, z_tgt = self.fields.sections(index)
        return z_tgt - z_src

    def offsets_to_tgt(self) -> list[int]:
        """Sorted offsets of all pairs; [] if the fields belong to sections."""
        if self.fields.num_sides == 2:
            return []
        return sorted({self.offset_to_tgt(i) for i in range(len(self.fields))})

    def has_field(self, side: int) -> bool:
        """Whether there is a field for src (0) or tgt (1)."""
        return side < self.fields.num_sides

    def moved(self, index: int, side: int) -> tuple[int, int]:
        """(x, y), mip-0 pixels, to add to the vectors to get whole displacements.

        It is the translation that was subtracted from the field, by which its images
        were moved. Fields of version 1.0.0 for src alone do not state it.
        """
        stated = self.fields.offset(index, side)
        if self.fields.num_sides == 2 or any(stated) or self.images is None:
            return stated
        return self.images.offset(index, side)

    def displacements(self, index: int, side: int) -> np.ndarray:
        """Read whole displacements: (2, H, W) float32, pixels of the set's mip.

        Channel 0 is along cols, channel 1 along rows.
        """
        x, y = self.moved(index, side)
        moved = np.array([y, x], np.float32) / (1 << self.fields.mip)
        return self.fields.read(index, side) + moved[:, None, None]

    def resolution(self) -> Resolution | None:
        """nm of a mip-0 voxel along x, y, z; None if the files do not state it."""
        if self.images is None:
            return self.fields.resolution
        return self.fields.resolution or self.images.resolution


def find_exported(request: ExportRequest) -> list[ExportedSet]:
    """Find the field sets of a request, with their images.

    Raises:
        DatasetError: there are none, or they have several mips; or some were made
            from other images than the present ones; or --warped lacks its images.
    """
    folder, name = request.fields_folder, request.checkpoint_name
    all_sets = find_field_sets(folder)
    tagged = [one for one in all_sets if (one.name.tag or "") == name]
    if not tagged:
        tags = sorted({one.name.tag or "no name" for one in all_sets})
        raise DatasetError(
            f"{folder}: no field sets of --checkpoint_name {name!r}, only of "
            f"{', '.join(tags) or 'none'}; write-fields and train.py write them, "
            "and download_field.py with --suffix"
        )
    stages = sorted({one.name.stage for one in tagged})
    stage = stages[-1] if request.stage is None else request.stage
    chosen = [one for one in tagged if one.name.stage == stage]
    mips = sorted({one.mip for one in chosen})
    if request.mip is not None:
        chosen = [one for one in chosen if one.mip == request.mip]
    if not chosen or (request.mip is None and len(mips) > 1):
        raise DatasetError(
            f"{folder}: --checkpoint_name {name} has fields of stages {stages}, of "
            f"stage {stage} at mips {mips}; choose one with --stage and --mip"
        )
    logger.info(
        "fields of stage %d at mip %d: %d sets", stage, chosen[0].mip, len(chosen)
    )
    found = [_with_images(one, request) for one in chosen]
    if not any(True for one in found for _ in one.sides()):
        offsets = {
            one.offset_to_tgt(i) for one in found for i in range(len(one.fields))
        }
        raise DatasetError(
            f"--tgt_offset {request.tgt_offset}: {folder} has no such pairs, only "
            f"pairs with {', '.join(map(str, sorted(offsets)))}; give one of these"
        )
    return found


def _with_images(fields: FieldSet, request: ExportRequest) -> ExportedSet:
    """Find the images of a field set, and refuse fields that do not fit them."""
    if why := why_stale(fields, request.dataset_path):
        raise DatasetError(f"{fields.path}: {why}")
    place = fields.name.place
    named = [
        path
        for path in sorted(request.dataset_path.glob("*.h5"))
        if _is_image_set_of(path, place, fields.mip)
    ]
    images = ImageSet(named[0]) if named else None
    if images is not None and (
        images.num_pairs != fields.num_pairs
        or (fields.is_of_pyramid and place_digest(images) != place_digest(fields))
    ):
        raise DatasetError(
            f"{fields.path}: {fields.num_pairs} pairs, its images {images.path.name} "
            f"have {images.num_pairs}, or lie elsewhere (metroem inspect says where); "
            f"{how_to_make_again(fields, request.dataset_path)}"
        )
    if images is not None:
        fields.check_resolution(images)
    if images is not None and request.warped is not None:
        for index in range(len(fields)):
            for side, taken_out, moved in unlike_offsets(fields, images, index):
                raise DatasetError(
                    f"--warped {request.warped}: side {side} of pair {index} of "
                    f"{images.path.name} was moved by {moved}, its field by "
                    f"{taken_out}; download the images with it: "
                    f"{command_to_move(images, fields.path)}"
                )
    if images is None and request.warped is not None:
        raise DatasetError(
            f"--warped {request.warped}: {fields.path.name} has no image set of its "
            f"location at mip {fields.mip}; download it, or leave --warped out"
        )
    if images is None and fields.num_sides == 1:
        logger.warning(
            "%s: no image set of its location at mip %d, which would state whether its "
            "images were moved; taken as not moved",
            *(fields.path.name, fields.mip),
        )
    return ExportedSet(fields, images, request.tgt_offset)


def _is_image_set_of(path: Path, place: str, mip: int) -> bool:
    """Whether a path names the image set of a location and mip."""
    name = ImageSetName.parse(path.name)
    return name is not None and (name.place, name.mip) == (place, mip)


class VolumeBounds:
    """Bounds and resolution of the volumes to write.

    Attributes:
        resolution: nm of a mip-0 voxel along x, y, z.

    Raises:
        DatasetError: the resolution is not known; or the sets, --resolution and
            --like disagree; or --like cannot be read.
    """

    def __init__(self, request: ExportRequest, sets: Sequence[ExportedSet]) -> None:
        resolution = _resolution(request, sets)
        self._like = None
        if request.like is not None:
            self._like = Volume(
                request.like, flag="--like", resolution=resolution, is_read=False
            )
            resolution = self._like.resolution
        if resolution is None:
            raise DatasetError(
                f"{request.dataset_path}: the size of a mip-0 voxel in nm is needed, "
                "and the sets do not state it; give --resolution X Y Z, or --like and "
                "the volume of the images"
            )
        self.resolution = resolution

    def enclose(self, boxes: Sequence[Box]) -> tuple[Grid, range]:
        """Area at mip 0 and sections of a new volume: of --like, or around `boxes`."""
        if self._like is not None:
            return self._like.extent()
        x, y, z = (min(box[axis] for box in boxes) for axis in range(3))
        x_end, y_end, z_end = (max(box[axis] for box in boxes) for axis in range(3, 6))
        return Grid(0, x, y, x_end - x, y_end - y), range(z, z_end)


def _resolution(
    request: ExportRequest, sets: Sequence[ExportedSet]
) -> Resolution | None:
    """Size of a mip-0 voxel as the sets or --resolution state it; None: neither."""
    known = (one.resolution() for one in sets)
    stated = [resolution for resolution in known if resolution is not None]
    for one in stated:
        if not same_resolution(one, stated[0]):
            raise DatasetError(
                f"{request.dataset_path}: its sets state mip-0 voxels of "
                f"{in_nm(stated[0])} and {in_nm(one)}, but a volume has one size; put "
                "them into separate folders, and export them one by one"
            )
    given = None if request.resolution is None else nm_of(request.resolution)
    if given and stated and not same_resolution(given, stated[0]):
        raise DatasetError(
            f"--resolution {in_nm(given)}: the sets in {request.dataset_path} state "
            f"mip-0 voxels of {in_nm(stated[0])}; leave it out"
        )
    return given or (stated[0] if stated else None)


def check_on_pixels(exported: ExportedSet) -> None:
    """Refuse a set that lies between the pixels of its mip.

    Raises:
        DatasetError: it does.
    """
    mip = exported.fields.mip
    boxes = [
        one.box(index, side)
        for one in (exported.fields, exported.images)
        if one is not None
        for index in range(len(one))
        for side in (0, 1)
    ]
    for x, y, *_ in boxes:
        if x % (1 << mip) or y % (1 << mip):
            raise DatasetError(
                f"{exported.fields.path}: lies between the pixels of mip {mip}, at x "
                f"{x}, y {y}, which a volume cannot hold; expected multiples of "
                f"{1 << mip} mip-0 pixels"
            )
