"""Where in a volume the exported sets lie, and how large its voxels are."""

from collections.abc import Sequence

from metroem.errors import DatasetError
from metroem.export.requests import ExportRequest
from metroem.export.sections import ExportedSet
from metroem.grid import Grid, Resolution, in_nm, nm_of, same_resolution
from metroem.io.h5 import Box
from metroem.io.volume import Volume


class Place:
    """Bounds and resolution of the volumes that a request makes.

    Attributes:
        resolution: nm of a mip-0 voxel along x, y, z.

    Raises:
        DatasetError: nothing says the resolution, or sets, --resolution and --like do
            not say the same; or --like cannot be read.
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
                f"{request.dataset_path}: nm of a mip-0 voxel are needed, and the sets "
                "do not say it; give --resolution X Y Z, or --like and the volume of "
                "the images"
            )
        self.resolution = resolution

    def bounds(self, boxes: Sequence[Box]) -> tuple[Grid, range]:
        """The area, at mip 0, and the sections of a new volume that holds `boxes`."""
        if self._like is not None:
            return self._like.extent()
        x, y, z = (min(box[axis] for box in boxes) for axis in range(3))
        x_end, y_end, z_end = (max(box[axis] for box in boxes) for axis in range(3, 6))
        return Grid(0, x, y, x_end - x, y_end - y), range(z, z_end)


def _resolution(
    request: ExportRequest, sets: Sequence[ExportedSet]
) -> Resolution | None:
    """What the sets and --resolution say of mip 0; None: nothing."""
    found = [said for one in sets if (said := one.resolution()) is not None]
    for said in found:
        if not same_resolution(said, found[0]):
            raise DatasetError(
                f"{request.dataset_path}: for a mip-0 voxel its sets say "
                f"{in_nm(found[0])} and {in_nm(said)}, and a volume has one; put the "
                "sets into a folder for each, and export them one by one"
            )
    given = None if request.resolution is None else nm_of(request.resolution)
    if given and found and not same_resolution(given, found[0]):
        raise DatasetError(
            f"--resolution {in_nm(given)}: the sets in {request.dataset_path} say that "
            f"they have mip-0 voxels of {found[0]} nm; leave it out"
        )
    return given or (found[0] if found else None)


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
