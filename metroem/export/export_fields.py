"""Fields, and the images before and after them, as CloudVolumes."""

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
from metroem.export.overlaps import Overlaps, Part
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
    """Write the volumes that a request asks for; what is there already is left.

    Args:
        request: what is asked for.
        sets: what is exported.
        overlaps: of them, checked.
        command: for the provenance.

    Raises:
        DatasetError: a volume cannot be written, holds other values, or is of
            another kind.
    """
    place = VolumeBounds(request, sets)
    for one in sets:
        check_on_pixels(one)
    # All volumes are opened before anything is written to one.
    writers: list[_FieldWriter | _ImageWriter] = [_FieldWriter(request, sets, place)]
    if request.warped is not None:
        writers.append(_ImageWriter(request, sets, place))
    for writer in writers:
        for one in sets:
            parts = [part for part in overlaps.parts if part.exported is one]
            what = f"{one.fields.path.name}: {writer.what}, sections"
            for part in progress(parts, what, total=len(parts)):
                writer.put(part, overlaps)
        writer.finish(sets, command)


class _FieldWriter:
    """The volume of the fields in the making."""

    what = "fields"

    def __init__(
        self, request: ExportRequest, sets: Sequence[ExportedSet], place: VolumeBounds
    ) -> None:
        self._request = request
        mip = sets[0].fields.mip
        # Both sides, so that the volume holds all that download_field.py reads.
        boxes = [
            one.fields.box(index, side)
            for one in sets
            for index in range(len(one.fields))
            for side in (0, 1)
        ]
        wanted = NewVolume(
            *(2, request.dtype, mip, *place.bounds(boxes)),
            *(place.resolution, request.notes),
        )
        self._writer = SectionWriter(
            request.dst_path, wanted, flag="--dst_path", overwrite=request.overwrite
        )

    def put(self, part: Part, overlaps: Overlaps) -> None:
        """Write the field of one section, if it has one."""
        if part.has_field:
            values = overlaps.paint(part, Part.displacements, lambda other: other.grid)
            self._writer.put(self._stored(values, part), part.grid, part.z)

    def finish(self, sets: Sequence[ExportedSet], command: str) -> None:
        """Say in the provenance what was written, and how to read it."""
        request, writer = self._request, self._writer
        _describe(writer, sets, {"command": command, **request.notes})
        logger.info(
            "%s: fields at mip %d; read them with download_field.py --channel_order %s "
            "--field_unit %s",
            *(writer.path, sets[0].fields.mip),
            *(request.channel_order, request.field_unit),
        )

    def _stored(self, values: np.ndarray, part: Part) -> np.ndarray:
        """(2, H, W) as the volume holds it."""
        request, fields = self._request, part.exported.fields
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
                f"--dtype int16: {part}: a displacement of "
                f"{longest * QUARTER:.0f} px, int16 holds up to {most * QUARTER:.0f}; "
                "give --dtype float32"
            )
        return quarters.astype(np.int16)


class _ImageWriter:
    """The volumes of the images before and after in the making."""

    what = "images"

    def __init__(
        self, request: ExportRequest, sets: Sequence[ExportedSet], place: VolumeBounds
    ) -> None:
        mip = sets[0].fields.mip
        frames = [
            one.box(index, side)
            for exported in sets
            for one in (exported.fields, _images(exported))
            for index in range(len(one))
            for side in (0, 1)
        ]
        bounds = place.bounds(frames)
        self._before, self._after = (
            SectionWriter(
                f"{str(request.warped).rstrip('/')}/{name}",
                NewVolume(
                    *(1, "float32", mip, *bounds, place.resolution),
                    {"kind": "images", "warped": name == "after"},
                ),
                flag="--warped",
                overwrite=request.overwrite,
            )
            for name in ("before", "after")
        )

    def put(self, part: Part, overlaps: Overlaps) -> None:
        """Write one section to both; without a field it stays as it is."""
        before = overlaps.paint(part, _image, _image_grid)
        self._before.put(before, _image_grid(part), part.z)
        after = overlaps.paint(part, _warped, _warped_grid)
        self._after.put(after, _warped_grid(part), part.z)

    def finish(self, sets: Sequence[ExportedSet], command: str) -> None:
        """Say in the provenance what was written."""
        for writer in (self._before, self._after):
            _describe(writer, sets, {"command": command})
            logger.info("%s: images at mip %d", writer.path, sets[0].fields.mip)


def _images(exported: ExportedSet) -> ImageSet:
    assert exported.images is not None  # find_exported refuses what lacks them
    return exported.images


def _image(part: Part) -> np.ndarray:
    """(1, H, W) as it was read."""
    return _images(part.exported).read(part.index)[part.side][None]


def _image_grid(part: Part) -> Grid:
    """Where it was read."""
    x, y, *_ = _images(part.exported).box(part.index, part.side)
    return Grid(part.grid.mip, x, y, *part.grid.shape)


def _warped(part: Part) -> np.ndarray:
    """(1, H, W) warped by its field, if it has one."""
    image = _image(part)
    if not part.has_field:
        return image
    field = torch.from_numpy(part.exported.fields.read(part.index, part.side))[None]
    return warp(torch.from_numpy(image)[None], field)[0].numpy()


def _warped_grid(part: Part) -> Grid:
    return part.grid if part.has_field else _image_grid(part)


def _describe(
    writer: SectionWriter, sets: Sequence[ExportedSet], method: dict[str, object]
) -> None:
    sources = [str(one.fields.path.resolve()) for one in sets]
    writer.describe(sources, {"method": method, "by": "metroem export-fields"})


def export_fields(request: ExportRequest) -> None:
    """Write the field sets of a data set in the format asked for.

    Displacements are whole: what a download took out of them is put back. An
    export that was killed goes on where it was, and one that is there is left.

    Raises:
        DatasetError: there are no such fields, two of them belong to one place of
            what is written, or that holds something else.
    """
    sets = find_exported(request)
    overlaps = Overlaps(request, sets)
    overlaps.check()
    if request.format == "cloudvolume":
        write_volumes(request, sets, overlaps, cli.command_line())
    else:
        write_files(request, sets)
