"""Image sets from a CloudVolume: one file a mip, pairs of neighbouring sections."""

import logging
from dataclasses import replace
from pathlib import Path

from metroem.create.download import DefectMask, warn_of_integers
from metroem.create.image_file import ImageFile, Sources
from metroem.create.requests import ImageRequest
from metroem.errors import DatasetError
from metroem.grid import Grid, in_nm, same_resolution
from metroem.io.h5 import FieldSet, ImageSet, PairFrame
from metroem.io.image_volume import ImageVolume
from metroem.io.moved import moved_apart
from metroem.specs.filenames import ImageSetName

logger = logging.getLogger(__name__)


def create_image_sets(request: ImageRequest) -> list[Path]:
    """Download the image sets of a request; those that are there are kept.

    Each section is read once. What was read is kept beside the file in the
    making, so a run that was killed goes on where it was. With a field set, images
    that are there and are the same but for having been moved are replaced, and so
    are those of the place's other mips: a place is moved as a whole, or its stages
    do not fit together.

    Returns:
        The files, one a mip.

    Raises:
        DatasetError: the volume does not hold what is asked for, all of it is
            blank, or a file is there that other arguments made.
    """
    sources = _open(request)
    wider = _with_other_mips(request, sources.fields)
    # Everything is checked before anything is read.
    files = [
        ImageFile(wider, sources, grid, _frames(wider, sources.fields, grid))
        for grid in wider.grids()
    ]
    files = [one for one in files if one.grid.mip in request.mips or one.may_move()]
    for file in files:
        file.check()
    for file in files:
        file.make()
    _warn_of_others(request)
    return [file.path for file in files]


def _with_other_mips(request: ImageRequest, fields: FieldSet | None) -> ImageRequest:
    """The request with those mips of its place that are there and could be moved."""
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
    """Name the mips of the place that were not moved as those of the request."""
    made = ImageSet(request.path(request.mips[0]))
    for images in _others(request):
        if len(images) == len(made) and (apart := moved_apart(made, images)):
            logger.warning("%s: %s", images.path, apart)


def _others(request: ImageRequest) -> list[ImageSet]:
    """The image sets of the place of a request that are there, of other mips."""
    place = ImageSetName.parse(request.path(0).name)
    assert place is not None
    named = [
        (path, name)
        for path in sorted(request.dst_folder.glob("*.h5"))
        if (name := ImageSetName.parse(path.name)) is not None
    ]
    return [
        ImageSet(path)
        for path, name in named
        if name.place == place.place and name.mip not in request.mips
    ]


def _open(request: ImageRequest) -> Sources:
    image = ImageVolume(request.cv_path)
    image.check_channels(1, "an image")
    mask = reference = fields = None
    if request.cv_path_defects is not None:
        mask = DefectMask(request.cv_path_defects, request.mask_val, image)
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
        warn_of_integers(image, "--normalize")
    return Sources(image, mask, reference, fields)


def _check_resolution(fields: FieldSet, image: ImageVolume) -> None:
    if not same_resolution(fields.resolution, image.resolution):
        raise DatasetError(
            f"--field_dset {fields.path}: its mip-0 pixels are "
            f"{in_nm(fields.resolution)}, those of --cv_path {image.path} "
            f"{in_nm(image.resolution)}; download the fields from a volume whose "
            "scales are mips of the images, into a folder that holds image sets of "
            "these, which say what mip 0 is"
        )


def _frames(
    request: ImageRequest, fields: FieldSet | None, grid: Grid
) -> list[PairFrame]:
    sections = [(z, z - 1) for z in range(request.z_start, request.z_end)]
    if fields is None:
        return [PairFrame(grid, pair) for pair in sections]
    index = {fields.sections(i): i for i in range(fields.num_pairs)}
    frames = []
    for pair in sections:
        if pair not in index:
            raise DatasetError(
                f"--field_dset {fields.path}: has no pair of sections {pair[0]} and "
                f"{pair[1]}; download it for the same --z_start and --z_end"
            )
        there = fields.grid(index[pair])
        if not (there.covers(grid) or grid.covers(there)):
            raise DatasetError(
                f"--field_dset {fields.path}: lies on {there}, the patch on {grid}; "
                "download it for the same --x_offset and --y_offset"
            )
        offsets = fields.offset(index[pair], 0), fields.offset(index[pair], 1)
        if any(value % (1 << grid.mip) for side in offsets for value in side):
            raise DatasetError(
                f"--field_dset {fields.path}: the offsets {offsets} of section "
                f"{pair[0]} are no multiples of 2^{grid.mip}; download it with "
                f"--dst_mip {grid.mip} or coarser"
            )
        frames.append(PairFrame(grid, pair, offsets))
    return frames
