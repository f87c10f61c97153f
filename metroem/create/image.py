"""Image sets from a CloudVolume: one file a mip, pairs of neighbouring sections."""

from pathlib import Path

from metroem.create.download import DefectMask, warn_of_integers
from metroem.create.image_file import ImageFile, Sources
from metroem.create.image_request import ImageRequest
from metroem.errors import DatasetError
from metroem.grid import Grid, in_nm, same_resolution
from metroem.io.h5 import FieldSet, PairFrame
from metroem.io.image_volume import ImageVolume

__all__ = ["ImageRequest", "create_image_sets"]


def create_image_sets(request: ImageRequest) -> list[Path]:
    """Download the image sets of a request; those that are there are kept.

    Each section is read once. What was read is kept beside the file in the
    making, so a run that was killed goes on where it was.

    Returns:
        The files, one a mip.

    Raises:
        DatasetError: the volume does not hold what is asked for, all of it is
            blank, or a file is there that other arguments made.
    """
    sources = _open(request)
    # Everything is checked before anything is read.
    files = [
        ImageFile(request, sources, grid, _frames(request, sources.fields, grid))
        for grid in request.grids()
    ]
    for file in files:
        file.check()
    for file in files:
        file.make()
    return [file.path for file in files]


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
