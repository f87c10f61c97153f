"""Which section has which field, and what its whole displacement is."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metroem.errors import DatasetError
from metroem.export.request import ExportRequest
from metroem.io.h5 import FieldSet, ImageSet, find_field_sets
from metroem.io.origins import how_to_make_again, place_digest, why_stale
from metroem.specs.filenames import ImageSetName

logger = logging.getLogger(__name__)


class ExportedSet(NamedTuple):
    """A field set and the images that it belongs to."""

    fields: FieldSet
    images: ImageSet | None  # of the fields' place and mip

    def sides(self) -> Iterator[tuple[int, int]]:
        """Pair and side of each section, once, in rising order of pairs.

        tgt of a pair is src of the pair before where pairs are consecutive.
        """
        grids = [self.fields.grid(index) for index in range(len(self.fields))]
        sections = [self.fields.sections(index) for index in range(len(self.fields))]
        seen = {(z, grid) for (z, _), grid in zip(sections, grids, strict=True)}
        for index, ((_, z_tgt), grid) in enumerate(zip(sections, grids, strict=True)):
            if (z_tgt, grid) not in seen:
                seen.add((z_tgt, grid))
                yield index, 1
            yield index, 0

    def has_field(self, side: int) -> bool:
        """Whether there is a field for src (0) or tgt (1)."""
        return side < self.fields.num_sides

    def moved(self, index: int, side: int) -> tuple[int, int]:
        """(x, y), mip-0 pixels, that the displacements are longer than the vectors.

        What was taken out of a downloaded field; of fields that training wrote, how
        far from their frame the images were read.
        """
        if self.fields.num_sides == 2:
            return self.fields.offset(index, side)
        return (0, 0) if self.images is None else self.images.offset(index, side)

    def displacements(self, index: int, side: int) -> np.ndarray:
        """(2, H, W) float32, pixels of the set's mip, along cols and along rows."""
        x, y = self.moved(index, side)
        moved = np.array([y, x], np.float32) / (1 << self.fields.mip)
        return self.fields.read(index, side) + moved[:, None, None]

    def resolution(self) -> tuple[float, float, float] | None:
        """nm of a mip-0 voxel along x, y, z; None where the files do not say."""
        for one in (self.fields, self.images):
            found = None if one is None else one.attributes.get("resolution")
            if found is not None:
                x, y, z = (float(nm) for nm in found)
                return x, y, z
        return None


def find_exported(request: ExportRequest) -> list[ExportedSet]:
    """The field sets that a request means, with their images.

    Raises:
        DatasetError: there are none, or of several mips, or some were made from other
            images than those there now, or --warped needs images that are not there.
    """
    folder, name = request.fields_folder, request.checkpoint_name
    there = find_field_sets(folder)
    tagged = [one for one in there if (one.name.tag or "") == name]
    if not tagged:
        tags = sorted({one.name.tag or "no name" for one in there})
        raise DatasetError(
            f"{folder}: no field sets of --checkpoint_name {name!r}, those there are "
            f"of {', '.join(tags) or 'none'}; write-fields and train.py write them, "
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
    return [_with_images(one, request) for one in chosen]


def _with_images(fields: FieldSet, request: ExportRequest) -> ExportedSet:
    if why := why_stale(fields, request.dataset_path):
        raise DatasetError(f"{fields.path}: {why}")
    place = fields.name.place
    named = [
        path
        for path in sorted(request.dataset_path.glob("*.h5"))
        if _is_of(path, place, fields.mip)
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
    if images is None and request.warped is not None:
        raise DatasetError(
            f"--warped {request.warped}: {fields.path.name} has no image set of its "
            f"place at mip {fields.mip}; download it, or leave --warped out"
        )
    if images is None and fields.num_sides == 1:
        logger.warning(
            "%s: no image set of its place at mip %d, which would say whether its "
            "images were moved; taken as not moved",
            *(fields.path.name, fields.mip),
        )
    return ExportedSet(fields, images)


def _is_of(path: Path, place: str, mip: int) -> bool:
    name = ImageSetName.parse(path.name)
    return name is not None and (name.place, name.mip) == (place, mip)
