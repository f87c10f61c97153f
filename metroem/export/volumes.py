"""Fields, and the images before and after them, as CloudVolumes."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from metroem.errors import DatasetError
from metroem.export.place import Place, check_on_pixels
from metroem.export.request import QUARTER, ExportRequest
from metroem.export.sections import ExportedSet
from metroem.field import warp
from metroem.grid import Grid
from metroem.io.h5 import ImageSet
from metroem.io.volume_write import NewVolume, SectionWriter
from metroem.progress import progress

logger = logging.getLogger(__name__)


def write_volumes(
    request: ExportRequest, sets: Sequence[ExportedSet], command: str
) -> None:
    """Write the volumes that a request asks for; what is there already is left.

    Raises:
        DatasetError: a volume cannot be written, holds other values, or is of
            another kind.
    """
    place = Place(request, sets)
    for one in sets:
        check_on_pixels(one)
    # All volumes are opened before anything is written to one.
    writers: list[_FieldWriter | _ImageWriter] = [_FieldWriter(request, sets, place)]
    if request.warped is not None:
        writers.append(_ImageWriter(request, sets, place))
    for writer in writers:
        for one in sets:
            total = sum(1 for _ in one.sides())
            what = f"{one.fields.path.name}: {writer.what}, sections"
            for index, side in progress(one.sides(), what, total=total):
                writer.put(one, index, side)
        writer.finish(sets, command)


class _FieldWriter:
    """The volume of the fields in the making."""

    what = "fields"

    def __init__(
        self, request: ExportRequest, sets: Sequence[ExportedSet], place: Place
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

    def put(self, exported: ExportedSet, index: int, side: int) -> None:
        """Write the field of one section, if it has one."""
        if not exported.has_field(side):
            return
        fields = exported.fields
        self._writer.put(
            self._stored(exported, index, side),
            fields.grid(index),
            fields.sections(index)[side],
        )

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

    def _stored(self, exported: ExportedSet, index: int, side: int) -> np.ndarray:
        """(2, H, W) as the volume holds it."""
        request, fields = self._request, exported.fields
        # cols run along the volume's y, so the displacement along y comes first.
        values = exported.displacements(index, side)
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
                f"--dtype int16: {fields.path.name}, pair {index}: a displacement of "
                f"{longest * QUARTER:.0f} px, int16 holds up to {most * QUARTER:.0f}; "
                "give --dtype float32"
            )
        return quarters.astype(np.int16)


class _ImageWriter:
    """The volumes of the images before and after in the making."""

    what = "images"

    def __init__(
        self, request: ExportRequest, sets: Sequence[ExportedSet], place: Place
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

    def put(self, exported: ExportedSet, index: int, side: int) -> None:
        """Write one section to both; without a field it stays as it is."""
        images = _images(exported)
        image = images.read(index)[side]
        x, y, z, *_ = images.box(index, side)
        grid = exported.fields.grid(index)
        there = Grid(grid.mip, x, y, *images.shape)
        self._before.put(image[None], there, z)
        if not exported.has_field(side):
            self._after.put(image[None], there, z)
            return
        field = torch.from_numpy(exported.fields.read(index, side))[None]
        warped = warp(torch.from_numpy(image)[None, None], field)
        self._after.put(warped[0].numpy(), grid, z)

    def finish(self, sets: Sequence[ExportedSet], command: str) -> None:
        """Say in the provenance what was written."""
        for writer in (self._before, self._after):
            _describe(writer, sets, {"command": command})
            logger.info("%s: images at mip %d", writer.path, sets[0].fields.mip)


def _images(exported: ExportedSet) -> ImageSet:
    assert exported.images is not None  # find_exported refuses what lacks them
    return exported.images


def _describe(
    writer: SectionWriter, sets: Sequence[ExportedSet], method: dict[str, object]
) -> None:
    sources = [str(one.fields.path.resolve()) for one in sets]
    writer.describe(sources, {"method": method, "by": "metroem export-fields"})
