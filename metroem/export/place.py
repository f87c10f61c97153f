"""Where in a volume the exported sets lie, and how large its voxels are."""

from collections.abc import Sequence

from metroem.errors import DatasetError
from metroem.export.request import ExportRequest
from metroem.export.sections import ExportedSet
from metroem.grid import Grid
from metroem.io.h5 import Box
from metroem.io.volume import Volume

Resolution = tuple[float, float, float]


class Place:
    """Bounds and resolution of the volumes that a request makes.

    Attributes:
        resolution: nm of a mip-0 voxel along x, y, z.

    Raises:
        DatasetError: the sets do not say their resolution, or not all the same; or
            --like cannot be read.
    """

    def __init__(self, request: ExportRequest, sets: Sequence[ExportedSet]) -> None:
        self._like = (
            None
            if request.like is None
            else Volume(request.like, flag="--like", is_read=False)
        )
        self.resolution = self._resolution(request, sets)

    def bounds(self, boxes: Sequence[Box]) -> tuple[Grid, range]:
        """The area, at mip 0, and the sections of a new volume that holds `boxes`."""
        if self._like is not None:
            return self._like.extent()
        x, y, z = (min(box[axis] for box in boxes) for axis in range(3))
        x_end, y_end, z_end = (max(box[axis] for box in boxes) for axis in range(3, 6))
        return Grid(0, x, y, x_end - x, y_end - y), range(z, z_end)

    def _resolution(
        self, request: ExportRequest, sets: Sequence[ExportedSet]
    ) -> Resolution:
        if self._like is not None:
            return self._like.resolution
        if request.resolution is not None:
            x, y, z = request.resolution
            return x, y, z
        found = {said for one in sets if (said := one.resolution()) is not None}
        if len(found) != 1:
            said = f"say {sorted(found)}" if found else "do not say it"
            raise DatasetError(
                f"{request.dataset_path}: nm of a mip-0 voxel are needed, and the sets "
                f"{said}; give --resolution X Y Z, or --like and the volume of the "
                "images"
            )
        return found.pop()


def check_on_pixels(exported: ExportedSet) -> None:
    """Refuse a set that lies between the pixels of its mip.

    Raises:
        DatasetError: as said.
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
