"""Write fields as files of other programs: SOFIMA's flow arrays, ITK's fields."""

import json
import logging
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metroem.errors import DatasetError
from metroem.export.field_sets import ExportedSet, VolumeBounds
from metroem.export.requests import ExportRequest
from metroem.geometry.grid import Grid, Resolution
from metroem.io.files import make_folder, replace_file

logger = logging.getLogger(__name__)

_MM_PER_NM = 1e-6


class Stack(NamedTuple):
    """Fields of consecutive sections on one grid.

    Attributes:
        vectors: (2, num_sections, y, x) float32, pixels of the grid's mip; channel 0
            along x, channel 1 along y.
    """

    grid: Grid
    first: int  # z of the first section
    vectors: np.ndarray
    tgt_offset: int | None = None  # None: the same for all fields of the set


def write_files(request: ExportRequest, sets: Sequence[ExportedSet]) -> None:
    """Write each set's fields to a folder, one file per run of consecutive sections.

    Raises:
        DatasetError: another file exists and --overwrite is not given; or the
            resolution is not known.
    """
    bounds = VolumeBounds(request, sets) if request.format == "itk" else None
    folder = Path(request.dst_path).expanduser()
    for one in sets:
        for stack in stacks(one, request.overlap):
            last = stack.first + stack.vectors.shape[1] - 1
            corner = f"x{stack.grid.x}_y{stack.grid.y}_z{stack.first}-{last}"
            if stack.tgt_offset is not None:
                corner += f"_tgt{stack.tgt_offset:+d}"
            path = folder / f"{one.fields.path.stem}_{corner}"
            if bounds is None:
                _write(path.with_name(f"{path.name}.json"), _json(stack), request)
                path = path.with_name(f"{path.name}.npy")
                _write(path, npy_bytes(stack.vectors), request)
            else:
                path = path.with_name(f"{path.name}.mha")
                _write(path, mha_bytes(stack, bounds.resolution), request)
            logger.info("%s: %d sections", path, stack.vectors.shape[1])


def stacks(exported: ExportedSet, overlap: str | None = None) -> Iterator[Stack]:
    """Stack the fields of a set: consecutive sections on one grid form a stack.

    Fields with another distance from src to tgt form stacks of their own.

    Args:
        exported: the set.
        overlap: which of two fields of the same section is taken: "first" or "last".
    """
    fields = exported.fields
    has_several = len(exported.offsets_to_tgt()) > 1
    found: dict[tuple[Grid, int | None], dict[int, tuple[int, int]]] = {}
    for index, side in exported.sides():
        if exported.has_field(side):
            z = fields.sections(index)[side]
            onto = exported.offset_to_tgt(index) if has_several else None
            by_z = found.setdefault((fields.grid(index), onto), {})
            if z not in by_z or overlap == "last":
                by_z[z] = index, side
    for (grid, onto), by_z in found.items():
        for run in _runs(sorted(by_z)):
            vectors = [exported.displacements(*by_z[z]) for z in run]
            # (z, channel, rows = x, cols = y), channel 0 along y.
            swapped = np.stack(vectors)[:, ::-1].transpose(1, 0, 3, 2)
            yield Stack(grid, run.start, np.ascontiguousarray(swapped), onto)


def npy_bytes(vectors: np.ndarray) -> bytes:
    """Encode an array as a .npy file."""
    content = BytesIO()
    np.save(content, vectors, allow_pickle=False)
    return content.getvalue()


def mha_bytes(stack: Stack, resolution: Resolution) -> bytes:
    """Encode fields as an ITK displacement field image (MetaImage).

    Points are mm along x, y, z of the volume, which stand for ITK's axes L, P and S.
    The origin is the corner of the volume's voxel (0, 0, 0); the position of a voxel
    is its centre. As in itk::DisplacementFieldTransform, a vector leads from a point
    of the warped image to the matching point of the image. Its third component,
    along z, is 0. Values are float64, which ITK requires.

    Args:
        stack: the fields.
        resolution: nm of a mip-0 voxel along x, y, z.

    Source: MetaIO's documentation of MetaImage, itk::DisplacementFieldTransform.
    """
    grid = stack.grid
    scale = 1 << grid.mip
    spacing = [
        nm * _MM_PER_NM * times
        for nm, times in zip(resolution, (scale, scale, 1), strict=True)
    ]
    first = (grid.x / scale, grid.y / scale, stack.first)
    origin = [(at + 0.5) * mm for at, mm in zip(first, spacing, strict=True)]
    _, sections, height, width = stack.vectors.shape
    vectors = np.zeros((sections, height, width, 3), "<f8")
    for axis in (0, 1):
        vectors[..., axis] = stack.vectors[axis].astype(np.float64) * spacing[axis]
    header = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": " ".join(map(repr, origin)),
        "CenterOfRotation": "0 0 0",
        "AnatomicalOrientation": "RAI",  # MetaIO's word for LPS
        "ElementSpacing": " ".join(map(repr, spacing)),
        "DimSize": f"{width} {height} {sections}",
        "ElementNumberOfChannels": "3",
        "ElementType": "MET_DOUBLE",
        "ElementDataFile": "LOCAL",
    }
    text = "".join(f"{key} = {value}\n" for key, value in header.items())
    return text.encode("ascii") + vectors.tobytes()


def _runs(zs: Sequence[int]) -> Iterator[range]:
    """Split rising numbers into ranges without gaps."""
    start = 0
    for at in range(1, len(zs) + 1):
        if at == len(zs) or zs[at] != zs[at - 1] + 1:
            yield range(zs[start], zs[at - 1] + 1)
            start = at


def _json(stack: Stack) -> bytes:
    """Describe axes, unit and location of a flow array, which .npy cannot state."""
    grid = stack.grid
    metadata = {
        "axes": "2 (x, y), z, y, x",
        "unit": f"pixels of mip {grid.mip}",
        "direction": "inverse: each entry says where in the image to read",
        "mip": grid.mip,
        "stride": 1,
        "start_xyz": [grid.x >> grid.mip, grid.y >> grid.mip, stack.first],
    }
    if stack.tgt_offset is not None:
        metadata["tgt_offset"] = stack.tgt_offset
    return json.dumps(metadata, indent=1).encode()


def _write(path: Path, content: bytes, request: ExportRequest) -> None:
    """Write a file atomically, unless the same file already exists."""
    if path.exists():
        if path.read_bytes() == content:
            return
        if not request.overwrite:
            raise DatasetError(
                f"{path}: already exists, with other fields; give --overwrite to "
                "replace it, or another --dst_path"
            )
    make_folder(path.parent)
    replace_file(path, content)
