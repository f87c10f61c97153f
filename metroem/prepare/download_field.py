"""Download field sets from a CloudVolume: displacements that stage 1 starts from.

The mean displacement of each section's field is often larger than a patch. It is
subtracted and kept as the `offset` of the pair's side. The rest of the field is
resampled to the mip of the images.
"""

import logging
from pathlib import Path

from metroem.geometry.grid import Resolution
from metroem.io.field_volume import FieldFormat, FieldVolume
from metroem.io.files import lock, lock_path
from metroem.io.h5 import ImageSet
from metroem.io.volume import Volume
from metroem.prepare.pair_files import PairFiles, PairSet
from metroem.prepare.patches import FieldSource, Key, PatchReader
from metroem.prepare.requests import FieldRequest
from metroem.prepare.sources import open_mask
from metroem.specs.filenames import ImageSetName

logger = logging.getLogger(__name__)


def download_field(request: FieldRequest) -> Path:
    """Download the field set of a request, unless it already exists.

    Each section is read once. It is stored beside the unfinished file, so a run that
    was killed resumes where it was.

    Returns:
        The file.

    Raises:
        DatasetError: the volume lacks something that is asked for, all vectors are
            blank, or a file made with other arguments exists.
    """
    volume = Volume(
        request.cv_path,
        resolution=_resolution_of_images(request),
        only_mip=request.src_mip,
    )
    reader = _open(request, volume)
    sections = [(z, z - 1) for z in range(request.z_start, request.z_end)]
    pair_set = PairSet(
        [(_key(request, src), _key(request, tgt)) for src, tgt in sections],
        _settings(request, reader),
        field_path=request.path,
        field_source=volume.path,
        tag=request.suffix,
    )
    with lock(lock_path(request.path)):
        files = PairFiles(reader, pair_set, overwrite=request.overwrite)
        reader.make(files, request.path.name, parallel=request.parallel)
    if request.suffix is None:
        logger.info("train.py finds it by name only when it is made with --suffix NAME")
    else:
        logger.info("train.py finds it under --checkpoint_name %s", request.suffix)
    return request.path


def _open(request: FieldRequest, volume: Volume) -> PatchReader:
    """Open the volumes, and refuse sections, mips or areas that they lack."""
    volume.check_channels(2, "a field")
    volume.check_mip("--src_mip", request.src_mip)
    volume.check_sections(request.sections, request.src_mip)
    form = FieldFormat(request.channel_order, request.field_unit, request.int16_scale)
    stored = FieldVolume(volume, request.src_mip, form)
    volume.check_covers(request.grid.cover(request.src_mip), "the patch")
    masks = open_mask(request.cv_path_defects, request.mask_val, volume)
    for mask in masks:
        areas = dict.fromkeys(request.sections, stored.window(request.grid))
        mask.check(volume, request.src_mip, areas)
    patches = {_key(request, z): request.grid for z in request.sections}
    source = FieldSource(stored, request.dst_mip, stored)
    return PatchReader(patches, None, source, masks)


def _key(request: FieldRequest, z: int) -> Key:
    return request.x_offset, request.y_offset, z


def _resolution_of_images(request: FieldRequest) -> Resolution | None:
    """Size of mip-0 pixels in the image sets that the fields are for, if known."""
    for path in sorted(request.dst_folder.glob("x*.h5")):
        name = ImageSetName.parse(path.name)
        if name is not None and name.place == request.place_name:
            return ImageSet(path).resolution
    return None


def _settings(request: FieldRequest, reader: PatchReader) -> dict:
    """All settings that determine the content of the file."""
    assert reader.field_source is not None
    stored, mask = reader.field_source.stored, next(iter(reader.masks), None)
    volume = stored.volume
    # Defines src_mip if the volume's finest scale is not mip 0.
    mip_0 = {"resolution": volume.resolution} if volume.mips[0] else {}
    return mip_0 | {
        "cv_path": volume.path,
        "src_mip": request.src_mip,
        "dst_mip": request.dst_mip,
        "patch_size": request.patch_size,
        "corner": [request.x_offset, request.y_offset],
        "z_start": request.z_start,
        "z_end": request.z_end,
        "channel_order": request.channel_order,
        "mip0_px_per_stored_unit": stored.scale,
        "cv_path_defects": mask.volume.path if mask else None,
        "mask_val": mask.threshold if mask else None,
    }
