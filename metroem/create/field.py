"""Field sets from a CloudVolume: displacements that stage 1 starts from.

Of each section's field the mean displacement is taken out and kept as the
`offset` of the pair's side, since it is often larger than a patch; what is left
is resampled to the mip of the images.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from metroem.create.download import check_offset, check_range
from metroem.create.pair_files import PairFiles, PairSet
from metroem.create.patches import FieldSource, Key, PatchReader
from metroem.create.sources import open_mask
from metroem.create.stored_field import FieldFormat, StoredField
from metroem.errors import UsageError
from metroem.grid import Grid, Resolution
from metroem.io.h5 import ImageSet
from metroem.io.lock import holding, lock_path
from metroem.io.volume import Volume
from metroem.specs.filenames import FieldSetName, ImageSetName, check_tag

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FieldRequest:
    """What download_field.py is asked for, one field a flag.

    Attributes:
        cv_path: volume of the fields, two channels.
        src_mip: mip that is read.
        dst_mip: mip of the images that the fields are for, <= src_mip.
        patch_size: side of the square patch, pixels of dst_mip.
        z_start: first src section; its tgt is the section before.
        z_end: one past the last src section.
        dst_folder: for the file.
        x_offset: corner of the patch, mip-0 pixels.
        y_offset: likewise.
        channel_order: what channel 0 and 1 of the volume are displacements along.
        field_unit: "mip0": values are mip-0 pixels; "relative": pixels of src_mip.
        int16_scale: what 1 of an int16 volume stands for, in that unit; None: a
            quarter.
        cv_path_defects: volume of defects, left out of the mean displacement.
        mask_val: values of it >= this are defects.
        place: of the image sets that the fields are for, as in their names:
            x<X>_y<Y>_z<Z>[_<suffix>]; None: the corner and z_start. It differs
            where those have a suffix, or share a centre.
        suffix: name of the checkpoint whose stage 0 the fields stand for.
        parallel: layers of chunks read at a time.
        overwrite: replace a file made from other arguments.

    Raises:
        UsageError: flags that cannot work.
    """

    cv_path: str
    src_mip: int
    dst_mip: int
    patch_size: int
    z_start: int
    z_end: int
    dst_folder: Path = Path("dataset01")
    x_offset: int = 0
    y_offset: int = 0
    channel_order: str = "xy"
    field_unit: str = "mip0"
    int16_scale: float | None = None
    cv_path_defects: str | None = None
    mask_val: float = 1
    place: str | None = None
    suffix: str | None = None
    parallel: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_range(self.z_start, self.z_end, self.parallel)
        if not 0 <= self.dst_mip <= self.src_mip:
            raise UsageError(
                f"--src_mip {self.src_mip} --dst_mip {self.dst_mip}: expected 0 <= "
                "dst_mip <= src_mip, since a field is only resampled to finer mips"
            )
        if self.patch_size < 1:
            raise UsageError(f"--patch_size {self.patch_size}: must be >= 1")
        check_offset("--x_offset", self.x_offset, self.dst_mip)
        check_offset("--y_offset", self.y_offset, self.dst_mip)
        FieldFormat(self.channel_order, self.field_unit, self.int16_scale)
        if self.suffix is not None:
            check_tag("--suffix", self.suffix)
        if self.place is not None:
            name = ImageSetName.parse(f"{self.place}_MIP{self.dst_mip}.h5")
            if name is None or name.z != self.z_start:
                raise UsageError(
                    f"--place {self.place}: expected x<X>_y<Y>_z{self.z_start}"
                    "[_<suffix>], as in the name of the image sets"
                )

    @property
    def sections(self) -> range:
        """All sections needed: the src ones and the tgt of the first."""
        return range(self.z_start - 1, self.z_end)

    @property
    def grid(self) -> Grid:
        """The patch, at dst_mip."""
        size = self.patch_size
        return Grid(self.dst_mip, self.x_offset, self.y_offset, size, size)

    @property
    def place_name(self) -> str:
        """What the image sets that the fields are for are called, less their mip."""
        corner = self.x_offset, self.y_offset, self.z_start
        return self.place or ImageSetName(*corner, self.dst_mip).place

    @property
    def path(self) -> Path:
        """The file."""
        name = FieldSetName(0, self.place_name, self.dst_mip, self.suffix)
        return self.dst_folder / name.filename


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
    volume = Volume(
        request.cv_path,
        resolution=_resolution_of_images(request),
        only_mip=request.src_mip,
    )
    reader = _open(request, volume)
    sections = [(z, z - 1) for z in range(request.z_start, request.z_end)]
    pair_set = PairSet(
        [(_key(request, src), _key(request, tgt)) for src, tgt in sections],
        _wanted(request, reader),
        field_path=request.path,
        field_source=volume.path,
        tag=request.suffix,
    )
    with holding(lock_path(request.path)):
        files = PairFiles(reader, pair_set, overwrite=request.overwrite)
        reader.make(files, request.path.name, parallel=request.parallel)
    if request.suffix is None:
        logger.info("train.py finds it by name only when it is made with --suffix NAME")
    else:
        logger.info("train.py finds it under --checkpoint_name %s", request.suffix)
    return request.path


def _open(request: FieldRequest, volume: Volume) -> PatchReader:
    """Open the volumes, and refuse what they do not hold."""
    volume.check_channels(2, "a field")
    volume.check_mip("--src_mip", request.src_mip)
    volume.check_sections(request.sections, request.src_mip)
    form = FieldFormat(request.channel_order, request.field_unit, request.int16_scale)
    stored = StoredField(volume, request.src_mip, form)
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
    """What the image sets that the fields are for say of mip 0; None: nothing."""
    for path in sorted(request.dst_folder.glob("x*.h5")):
        name = ImageSetName.parse(path.name)
        if name is not None and name.place == request.place_name:
            return ImageSet(path).resolution
    return None


def _wanted(request: FieldRequest, reader: PatchReader) -> dict:
    """All that the content of the file depends on."""
    assert reader.field_source is not None
    stored, mask = reader.field_source.stored, next(iter(reader.masks), None)
    volume = stored.volume
    # What src_mip means, where it is not said by the order of the scales.
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
