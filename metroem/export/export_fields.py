"""Export fields: write them, and the images before and after, as CloudVolumes."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from metroem.errors import DatasetError
from metroem.export.field_files import write_files
from metroem.export.field_sets import (
    ExportedSet,
    VolumeBounds,
    check_on_pixels,
    find_exported,
)
from metroem.export.overlaps import Overlaps, PairSection
from metroem.export.requests import QUARTER, ExportRequest
from metroem.geometry.field import warp
from metroem.geometry.grid import Grid
from metroem.io.h5 import ImageSet
from metroem.io.volume_write import NewVolume, SectionWriter
from metroem.utils import cli
from metroem.utils.progress import progress

logger = logging.getLogger(__name__)


def write_volumes(
    request: ExportRequest,
    sets: Sequence[ExportedSet],
    overlaps: Overlaps,
    command: str,
) -> None:
    """Write the volumes of a request; sections that already exist are kept.

    Args:
        request: the flags.
        sets: the field sets to export.
        overlaps: the overlaps between them, checked.
        command: the command line, for the provenance.

    Raises:
        DatasetError: a volume cannot be written, contains other values, or is of
            another kind.
    """
    bounds = VolumeBounds(request, sets)
    for one in sets:
        check_on_pixels(one)
    # All volumes are opened before any is written.
    writers: list[_FieldWriter | _ImageWriter] = [_FieldWriter(request, sets, bounds)]
    if request.warped is not None:
        writers.append(_ImageWriter(request, sets, bounds))
    for writer in writers:
        for one in sets:
            sections = [
                section for section in overlaps.sections if section.exported is one
            ]
            title = f"{one.fields.path.name}: {writer.content}, sections"
            for section in progress(sections, title, total=len(sections)):
                writer.put(section, overlaps)
        writer.finish(sets, command)


class _FieldWriter:
    """Writes the volume of the fields."""

    content = "fields"

    def __init__(
        self, request: ExportRequest, sets: Sequence[ExportedSet], bounds: VolumeBounds
    ) -> None:
        self._request = request
        mip = sets[0].fields.mip
        # Both sides, so that the volume covers all that download_field.py reads.
        boxes = [
            one.fields.box(index, side)
            for one in sets
            for index in range(len(one.fields))
            for side in (0, 1)
        ]
        wanted = NewVolume(
            *(2, request.dtype, mip, *bounds.enclose(boxes)),
            *(bounds.resolution, request.notes),
        )
        self._writer = SectionWriter(
            request.dst_path, wanted, flag="--dst_path", overwrite=request.overwrite
        )

    def put(self, section: PairSection, overlaps: Overlaps) -> None:
        """Write the field of one section, if it has one."""
        if section.has_field:
            values = overlaps.paint(
                section, PairSection.displacements, lambda other: other.grid
            )
            self._writer.put(self._stored(values, section), section.grid, section.z)

    def finish(self, sets: Sequence[ExportedSet], command: str) -> None:
        """State sources and format in the provenance; log how to read the volume."""
        request, writer = self._request, self._writer
        _describe(writer, sets, {"command": command, **request.notes})
        logger.info(
            "%s: fields at mip %d; read them with download_field.py --channel_order %s "
            "--field_unit %s",
            *(writer.path, sets[0].fields.mip),
            *(request.channel_order, request.field_unit),
        )

    def _stored(self, values: np.ndarray, section: PairSection) -> np.ndarray:
        """Convert (2, H, W) to the channel order, unit and type of the volume."""
        request, fields = self._request, section.exported.fields
        # cols run along the volume's y, so the displacement along y comes first.
        if request.channel_order == "xy":
            values = values[::-1]
        if request.field_unit == "mip0":
            values = values * np.float32(1 << fields.mip)
        if request.dtype == "float32":
            return values
        quarters = np.rint(values / QUARTER)
        most = np.iinfo(np.int16).max
        if (longest := float(np.abs(quarters).max())) > most:
            raise DatasetError(
                f"--dtype int16: {section}: a displacement of "
                f"{longest * QUARTER:.0f} px, int16 holds up to {most * QUARTER:.0f}; "
                "give --dtype float32"
            )
        return quarters.astype(np.int16)


class _ImageWriter:
    """Writes the volumes of the images before and after."""

    content = "images"

    def __init__(
        self, request: ExportRequest, sets: Sequence[ExportedSet], bounds: VolumeBounds
    ) -> None:
        mip = sets[0].fields.mip
        boxes = [
            one.box(index, side)
            for exported in sets
            for one in (exported.fields, _images(exported))
            for index in range(len(one))
            for side in (0, 1)
        ]
        extent = bounds.enclose(boxes)
        self._before, self._after = (
            SectionWriter(
                f"{str(request.warped).rstrip('/')}/{name}",
                NewVolume(
                    *(1, "float32", mip, *extent, bounds.resolution),
                    {"kind": "images", "warped": name == "after"},
                ),
                flag="--warped",
                overwrite=request.overwrite,
            )
            for name in ("before", "after")
        )

    def put(self, section: PairSection, overlaps: Overlaps) -> None:
        """Write one section to both volumes; without a field it is not warped."""
        before = overlaps.paint(section, _image, _image_grid)
        self._before.put(before, _image_grid(section), section.z)
        after = overlaps.paint(section, _warped, _warped_grid)
        self._after.put(after, _warped_grid(section), section.z)

    def finish(self, sets: Sequence[ExportedSet], command: str) -> None:
        """State the sources in the provenance."""
        for writer in (self._before, self._after):
            _describe(writer, sets, {"command": command})
            logger.info("%s: images at mip %d", writer.path, sets[0].fields.mip)


def _images(exported: ExportedSet) -> ImageSet:
    """The images of a set."""
    assert exported.images is not None  # find_exported refuses sets without
    return exported.images


def _image(section: PairSection) -> np.ndarray:
    """Read (1, H, W), the image of a section before warping."""
    return _images(section.exported).read(section.index)[section.side][None]


def _image_grid(section: PairSection) -> Grid:
    """The area that the image was read from."""
    x, y, *_ = _images(section.exported).box(section.index, section.side)
    return Grid(section.grid.mip, x, y, *section.grid.shape)


def _warped(section: PairSection) -> np.ndarray:
    """Read (1, H, W), the image of a section, warped by its field if it has one."""
    image = _image(section)
    if not section.has_field:
        return image
    vectors = section.exported.fields.read(section.index, section.side)
    field = torch.from_numpy(vectors)[None]
    return warp(torch.from_numpy(image)[None], field)[0].numpy()


def _warped_grid(section: PairSection) -> Grid:
    """The area of the warped image."""
    return section.grid if section.has_field else _image_grid(section)


def _describe(
    writer: SectionWriter, sets: Sequence[ExportedSet], method: dict[str, object]
) -> None:
    """Write the provenance of a volume."""
    sources = [str(one.fields.path.resolve()) for one in sets]
    writer.describe(sources, {"method": method, "by": "metroem export-fields"})


def export_fields(request: ExportRequest) -> None:
    """Write the field sets of a data set in the format asked for.

    Displacements are complete: the translation that a download subtracted is added
    again. An export that was killed resumes where it was; a finished one is kept.

    Raises:
        DatasetError: there are no such fields, two fields belong to the same pixels
            of the result, or the destination has other values.
    """
    sets = find_exported(request)
    overlaps = Overlaps(request, sets)
    overlaps.check()
    if request.format == "cloudvolume":
        write_volumes(request, sets, overlaps, cli.command_line())
    else:
        write_files(request, sets)
