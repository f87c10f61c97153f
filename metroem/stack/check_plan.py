"""Decide what a check measures, and open the volumes that it reads.

A plan says all that a task needs, so that any process can run it. It is stored as
`<dst>/check/plan.json`.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from metroem.errors import DatasetError, PyramidError
from metroem.geometry.grid import Grid
from metroem.io.cloud_paths import cloud_path
from metroem.io.field_volume import FieldFormat, FieldVolume
from metroem.io.image_volume import ImageVolume, content_digest
from metroem.io.volume import Volume
from metroem.io.volume_write import NOTES_KEY, Notes
from metroem.models.weights import check_weights
from metroem.specs.modules import find_modules
from metroem.specs.parse_json import parse
from metroem.stack.jumps import WINDOW_PX
from metroem.stack.neighbour_scores import CORRELATION_PX
from metroem.stack.requests import CheckRequest
from metroem.stack.tasks import Block, split_blocks

# Places are squares of so many pixels, two windows long.
PLACE_PX = 2 * WINDOW_PX
# A map has at most so many cells a section; a cell is one or more places.
_MAX_CELLS = 4096
# A task reads a few sections before its own. With so many sections, and so many layers
# of stored chunks, it reads at most a quarter more than it measures.
_MIN_SECTIONS, _MIN_LAYERS = 32, 4
_PLAN = "plan.json"


@dataclass(frozen=True)
class CheckPlan:
    """What is measured, where, and against what.

    Attributes:
        destination: folder for the results.
        cv_path: the aligned volume.
        mip: mip that is measured at.
        area: the area of the volume, at that mip.
        z_ranges: first section and one past the last, of the tasks, in order.
        chunk_px: side of a task's area, px; a multiple of cell_px.
        cell_px: side of a cell of the map, px; a multiple of PLACE_PX.
        content: digest of samples of the volume.
        pyramid_path: pyramid whose own field is measured; None: none.
        checkpoint_name: name of its weights.
        field_path: volume of fields, for folds; None: none.
        field_mip: its mip.
        before: volume before it was aligned; None: none.
        unplaced: sections that matched nothing, as the placement says.
    """

    destination: str
    cv_path: str
    mip: int
    area: Grid
    z_ranges: tuple[tuple[int, int], ...]
    chunk_px: int
    cell_px: int
    content: str
    pyramid_path: str | None = None
    checkpoint_name: str = "checkpoint"
    field_path: str | None = None
    field_mip: int = 0
    before: str | None = None
    unplaced: tuple[int, ...] = ()

    @property
    def sections(self) -> range:
        """The sections that are measured."""
        return range(self.z_ranges[0][0], self.z_ranges[-1][1])

    def blocks(self) -> list[Block]:
        """List the areas of the tasks: those of the first sections first."""
        layers = (range(*limits) for limits in self.z_ranges)
        return [
            block
            for layer in layers
            for block in split_blocks(self.area, layer, self.chunk_px, len(layer))
        ]

    def settings(self) -> dict[str, Any]:
        """Return what the figures depend on, JSON-able."""
        return {key: item for key, item in asdict(self).items() if key != "destination"}

    def open_image(self) -> ImageVolume:
        """Open the aligned volume."""
        return ImageVolume(self.cv_path)

    def open_before(self, image: Volume) -> ImageVolume | None:
        """Open the volume before it was aligned, if there is one."""
        if self.before is None:
            return None
        return ImageVolume(self.before, flag="--before", resolution=image.resolution)

    def open_field(self, image: Volume) -> FieldVolume | None:
        """Open the volume of fields, if there is one."""
        if self.field_path is None:
            return None
        volume = _open_field(self.field_path, image)
        notes = volume.info.get(NOTES_KEY, {})
        form = FieldFormat(
            notes.get("channel_order", "yx"),
            notes.get("field_unit", "relative"),
            notes.get("int16_scale"),
        )
        return FieldVolume(volume, self.field_mip, form)

    @property
    def num_cells(self) -> tuple[int, int]:
        """Rows and columns of the cells of a section."""
        rows, cols = (-(-size // self.cell_px) for size in self.area.shape)
        return rows, cols

    def save(self) -> None:
        """Write the plan below the destination."""
        notes = Notes(cloud_path(f"{self.destination}/check"))
        notes.write(_PLAN, asdict(self))


def load_plan(destination: str) -> CheckPlan:
    """Read the plan of a destination.

    Raises:
        DatasetError: there is none, or it is damaged.
    """
    where = f"{destination}/check/{_PLAN}"
    found = Notes(cloud_path(f"{destination}/check")).read([_PLAN])
    if _PLAN not in found:
        raise DatasetError(f"{where}: no such file; `metroem check` writes it")
    return parse(found[_PLAN], CheckPlan, where, error=DatasetError)


def plan_check(request: CheckRequest) -> CheckPlan:
    """Open all volumes, and decide what is measured.

    Raises:
        DatasetError: a volume cannot be read or does not fit: two channels, no such
            mip, a single section, fewer pixels than can be measured.
        PyramidError, CheckpointError: the pyramid cannot be used at this mip.
    """
    image = ImageVolume(request.cv_path)
    image.check_channels(1, "a volume of grey levels")
    image.check_mip("--mip", request.mip)
    extent, _ = image.extent()
    area = image.clip(extent.cover(request.mip))
    if area is None or min(area.shape) < CORRELATION_PX:
        rows, cols = extent.cover(request.mip).shape
        raise DatasetError(
            f"--cv_path {image.path}: is {rows} x {cols} px at mip {request.mip}; "
            f"windows of {CORRELATION_PX} px are compared: give a finer --mip"
        )
    sections = _sections(request, image)
    chunk_px = -(-request.chunk_px // PLACE_PX) * PLACE_PX
    plan = CheckPlan(
        destination=request.destination,
        cv_path=request.cv_path,
        mip=request.mip,
        area=area,
        z_ranges=_z_ranges(image, request.mip, sections),
        chunk_px=chunk_px,
        cell_px=_cell_px(area, chunk_px),
        content=content_digest(image, sections, area),
        checkpoint_name=request.checkpoint_name,
    )
    if request.pyramid_path is not None:
        _check_pyramid(request, request.pyramid_path)
        plan = replace(plan, pyramid_path=str(request.pyramid_path))
    if request.before is not None:
        plan = replace(plan, before=request.before)
        _check_before(plan, image)
    if request.field_path is not None:
        field = _open_field(request.field_path, image)
        mip = _field_mip(request, field)
        _check_field(field, mip, area, sections)
        plan = replace(plan, field_path=request.field_path, field_mip=mip)
    return plan


def _sections(request: CheckRequest, image: Volume) -> range:
    """Return the sections to measure; the first of a volume has none before it."""
    held = image.sections_at(image.mips[0])
    start = held.start if request.z_start is None else request.z_start
    end = held.stop if request.z_end is None else request.z_end
    image.check_sections(range(start, end), image.mips[0])
    if end - max(start, held.start + 1) < 1:
        raise DatasetError(
            f"--cv_path {image.path}: section {start} has none before it to compare it "
            "with; expected two sections or more"
        )
    return range(start, end)


def _z_ranges(
    image: ImageVolume, mip: int, sections: range
) -> tuple[tuple[int, int], ...]:
    """Group the layers of stored chunks into the sections of tasks."""
    layers = image.slabs(mip, list(sections))
    thickest = max(len(layer) for layer in layers)
    least = max(-(-_MIN_SECTIONS // thickest), _MIN_LAYERS if thickest > 1 else 1)
    grouped = [layers[at : at + least] for at in range(0, len(layers), least)]
    return tuple((group[0].start, group[-1].stop) for group in grouped)


def _cell_px(area: Grid, chunk_px: int) -> int:
    """Choose the side of a cell, so that a map has at most _MAX_CELLS."""
    cell_px = PLACE_PX
    while (
        -(-area.rows // cell_px) * -(-area.cols // cell_px) > _MAX_CELLS
        and chunk_px % (2 * cell_px) == 0
    ):
        cell_px *= 2
    return cell_px


def _check_pyramid(request: CheckRequest, path: Path) -> None:
    modules = find_modules(path)
    check_weights(modules, request.checkpoint_name, f"--pyramid_path {path}")
    if modules[-1].in_mip < request.mip:
        raise PyramidError(
            f"--mip {request.mip}: the last stage of {path} reads mip "
            f"{modules[-1].in_mip}; give this mip or a finer one"
        )


def _check_before(plan: CheckPlan, image: Volume) -> None:
    before = plan.open_before(image)
    assert before is not None
    before.check_channels(1, "a volume of grey levels")
    before.check_mip("--mip", plan.mip)
    held = before.sections_at(before.mips[0])
    if not set(held) & set(plan.sections) or before.clip(plan.area) is None:
        raise DatasetError(
            f"--before {before.path}: has nothing at the location of {image.path}; "
            "expected the same coordinates, x, y in mip-0 pixels and sections"
        )


def _open_field(path: str, image: Volume) -> Volume:
    return Volume(path, flag="--field_path", resolution=image.resolution)


def _field_mip(request: CheckRequest, field: Volume) -> int:
    """Find the mip that was written: mips that were not look like zeros."""
    stated = field.info.get(NOTES_KEY, {}).get("mip")
    if request.field_mip is not None:
        return request.field_mip
    if isinstance(stated, int):
        return stated
    if len(field.mips) > 1:
        raise DatasetError(
            f"--field_path {field.path}: has mips {', '.join(map(str, field.mips))}; "
            "say with --field_mip which of them was written"
        )
    return field.mips[0]


def _check_field(field: Volume, mip: int, area: Grid, sections: range) -> None:
    field.check_channels(2, "a field")
    field.check_mip("--field_mip", mip)
    field.check_covers(area, "the aligned volume", at=mip)
    field.check_sections(sections, mip)
