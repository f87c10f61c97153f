"""Measure how well the sections of an aligned volume fit, and say where they do not.

Any volume can be checked, whoever aligned it. `CheckStep` measures areas of some
sections each, and stores small figures. `CheckReportStep` puts them together as
check.json and report.html. `check_volume` is the command: both steps and a short table.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from metroem import __version__
from metroem.errors import DatasetError
from metroem.evaluation.tables import plain, print_json
from metroem.imaging.masks import dilate
from metroem.io.cloud_paths import cloud_path
from metroem.io.field_volume import FieldVolume
from metroem.io.image_volume import ImageVolume
from metroem.io.volume_write import Notes
from metroem.pyramid import Pyramid
from metroem.stack.block_figures import (
    PX_STEP,
    FieldBlock,
    ImageBlock,
    count_figures,
    describe_cells,
)
from metroem.stack.check_page.page import draw_page
from metroem.stack.check_plan import PLACE_PX, CheckPlan, plan_check
from metroem.stack.check_summary import Summary, describe_place, verdict
from metroem.stack.histogram import Histogram
from metroem.stack.jumps import SEARCH_PX, WINDOW_PX
from metroem.stack.neighbour_scores import CORRELATION_PX, NeighbourScores
from metroem.stack.place import Placement
from metroem.stack.render import RenderStep
from metroem.stack.requests import AlignStackRequest, CheckRequest, with_full_paths
from metroem.stack.task_records import TaskRecords
from metroem.stack.tasks import Block, Step, run_step

logger = logging.getLogger(__name__)

# Version of check.json.
_FORMAT_VERSION = 1
# A pyramid does not see what lies beyond the border of a task's area, or beyond tissue.
# So its own field does not count so many pixels from there. Of the others every fourth
# counts, along both axes.
_FIELD_BORDER_PX, _FIELD_STRIDE = 32, 4
_REPORT = "report"
# Figures of areas that the report reads at once, some 100 kB each: storage in a cloud
# takes as long for one.
_READ_AT_ONCE = 32
_NUM_PRINTED = 5


class CheckStep(Step):
    """Measure all areas of a volume; see `CheckPlan`."""

    name = "check"

    def __init__(
        self, plan: CheckPlan, before: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Make the step.

        Args:
            plan: what is measured.
            before: settings of the steps before, if there are any.
        """
        self.plan = plan
        self.destination = plan.destination
        self.settings = {**before, **plan.settings()}

    def __reduce__(self) -> tuple[Any, ...]:
        # Without what is open: another process opens it again.
        return type(self), (self.plan, self.settings)

    @classmethod
    def of(
        cls,
        destination: str,
        request: AlignStackRequest,
        placement: Placement,
        render: RenderStep,
    ) -> "CheckStep":
        """Make the last step of `align_stack`: the volume that it wrote is checked.

        Args:
            destination: the folder of the stack.
            request: the flags of align-stack.
            placement: where the sections lie.
            render: the step before.
        """
        plan = plan_check(
            CheckRequest(
                cv_path=render.path,
                dst_path=destination,
                z_start=render.sections.start,
                z_end=render.sections.stop,
                mip=render.mip,
                chunk_px=render.chunk_px,
                pyramid_path=request.pyramid_path,
                checkpoint_name=request.checkpoint_name,
                field_path=f"{destination}/field",
                field_mip=render.field_mip,
                before=request.cv_path,
            )
        )
        unplaced = tuple(
            z
            for z, one in sorted(placement.placed.items())
            if one.how == "neighbours" and z in render.sections
        )
        return cls(replace(plan, unplaced=unplaced), render.settings)

    def tasks(self) -> Sequence[str]:
        """List the blocks."""
        return [block.name for block in self.plan.blocks()]

    def run(self, task: str) -> Mapping[str, Any]:
        """Measure one block, and store its figures as `<dst>/check/<task>.json`.

        Raises:
            DatasetError: a volume cannot be read.
        """
        block = Block.parse(task)
        image = ImageBlock(self._image, block)
        readers: list[ImageBlock | FieldBlock] = [image]
        records = [self._record(scores, block) for scores in image.scores()]
        if self._before is not None:
            before = ImageBlock(self._before, block)
            readers.append(before)
            for record, scores in zip(records, before.scores(), strict=True):
                record["before"] = count_figures(scores)
        if self._field is not None:
            fields = FieldBlock(self._field, block)
            readers.append(fields)
            for record, counts in zip(records, fields.counts(), strict=True):
                record["folds"] = counts
        text = json.dumps(plain({"sections": records}), separators=(",", ":"))
        _results(self.plan).put(f"{task}.json", text.encode(), "application/json")
        return {
            "bytes_read": sum(one.bytes_read for one in readers),
            "bytes_needed": sum(one.bytes_needed for one in readers),
        }

    @cached_property
    def _image(self) -> ImageVolume:
        return self.plan.open_image()

    @cached_property
    def _before(self) -> ImageVolume | None:
        return self.plan.open_before(self._image)

    @cached_property
    def _field(self) -> FieldVolume | None:
        return self.plan.open_field(self._image)

    @cached_property
    def _pyramid(self) -> Pyramid:
        assert self.plan.pyramid_path is not None
        return Pyramid.load(Path(self.plan.pyramid_path), self.plan.checkpoint_name)

    def _record(self, scores: NeighbourScores, block: Block) -> dict[str, Any]:
        """Make the figures of one section in a block."""
        record = {"z": scores.z, **count_figures(scores)}
        record["cells"] = describe_cells(scores, block.grid, self.plan.cell_px)
        if self.plan.pyramid_path is not None:
            record["residual"] = self._residual(scores).pairs()
        return record

    def _residual(self, scores: NeighbourScores) -> Histogram:
        """Count the lengths of the pyramid's own field between the two sections."""
        lengths = Histogram(PX_STEP)
        if not (scores.against > 0).any():
            return lengths
        src, tgt = scores.image.numpy(), scores.reference.numpy()
        field = self._pyramid.align(src, tgt, self.plan.mip, finetune=False)
        border = min(_FIELD_BORDER_PX, min(src.shape) // 4)
        inner = (slice(border, -border or None, _FIELD_STRIDE),) * 2
        unseen = (scores.image == 0) | (scores.reference == 0)
        unseen = dilate(unseen[None, None], border)[0, 0].numpy()[inner]
        lengths.add(np.hypot(field[0][inner], field[1][inner])[~unseen])
        return lengths


class CheckReportStep(Step):
    """Put the figures of all blocks together: check.json and report.html."""

    name = "check-report"

    def __init__(self, check: CheckStep) -> None:
        """Make the step.

        Args:
            check: the step before.
        """
        self.plan = check.plan
        self.destination = check.destination
        self.settings = check.settings

    @classmethod
    def of(cls, check: CheckStep) -> "CheckReportStep":
        """Make the step that follows a check."""
        return cls(check)

    def tasks(self) -> Sequence[str]:
        """Name the only task."""
        return [_REPORT]

    def run(self, task: str) -> Mapping[str, Any]:
        """Write both files.

        Raises:
            DatasetError: figures of a block are missing, no section has data, or the
                volume cannot be read.
        """
        plan, summary = self.plan, Summary(self.plan)
        results, blocks = _results(plan), plan.blocks()
        for start in range(0, len(blocks), _READ_AT_ONCE):
            some = blocks[start : start + _READ_AT_ONCE]
            found = results.read([f"{block.name}.json" for block in some])
            for number, block in enumerate(some, start=start):
                name = f"{block.name}.json"
                if name not in found:
                    raise DatasetError(
                        f"{results.path}/{name}: the figures of this area are missing; "
                        "give the same command again, with --again"
                    )
                for record in found[name]["sections"]:
                    summary.add(block, record)
                following = blocks[number + 1 : number + 2]
                if not following or following[0].sections != block.sections:
                    summary.close(block.sections)
        if not summary.has_data:
            raise DatasetError(
                f"--cv_path {plan.cv_path}: no section has data at mip {plan.mip}; "
                "check that this mip was written: what is not there looks like zeros"
            )
        if summary.field_is_zero:
            logger.warning(
                "--field_path %s: all vectors are 0 at mip %d; was this mip written? "
                "Folds are not known",
                *(plan.field_path, plan.field_mip),
            )
        figures = {**_about(plan), **summary.figures()}
        page = draw_page(plan, figures, summary.maps)
        notes = Notes(cloud_path(plan.destination))
        notes.put("report.html", page.encode(), "text/html")
        notes.write("check.json", plain(figures))
        return {}


def check_volume(request: CheckRequest) -> None:
    """Check a volume: measure it, write check.json and report.html, print a table.

    With --shard, the report follows when the tasks of all shards are done.

    Raises:
        DatasetError: a volume cannot be read or does not fit.
        PyramidError, CheckpointError: the pyramid cannot be used at this mip.
        MetroEMError: tasks failed; the log names them.
    """
    plan = plan_check(with_full_paths(request))
    plan.save()
    logger.info(
        "check: sections %d to %d, %d x %d px at mip %d",
        *(plan.sections.start, plan.sections.stop - 1, *plan.area.shape, plan.mip),
    )
    check = CheckStep(plan)
    tasks = check.tasks()
    records = TaskRecords(check.destination, check.name, check.settings)
    if not request.again and len(records.look(tasks).done) == len(tasks):
        logger.warning(
            "these figures were measured before; samples of the volume are unchanged. "
            "If other parts were written again, give --again"
        )
    if run_step(check, request) and run_step(CheckReportStep(check), request):
        print_check(plan.destination)


def print_check(destination: str) -> None:
    """Print the table of a finished check, and its figures as a last line of JSON.

    Raises:
        DatasetError: there is no check.json.
    """
    notes = Notes(cloud_path(destination))
    figures: Any = notes.read(["check.json"]).get("check.json")
    if figures is None:
        raise DatasetError(f"{notes.path}/check.json: no such file; run metroem check")
    stack = figures["stack"]
    logger.info("%s", verdict(figures))
    parts = [stack["before"], stack] if "before" in stack else [stack]
    if "before" in stack:
        _log_row("", "before", "after")
    for label, key, form in (
        ("correlation, median section", "correlation_median", ".3f"),
        ("correlation, worst section", "correlation_worst", ".3f"),
        ("jump, median, px", "jump_median_px", ".2f"),
        ("jump, 95 % below, px", "jump_p95_px", ".2f"),
        ("jitter, median, px", "jitter_median_px", ".2f"),
        ("windows without a match", "lost", ".1%"),
        ("residual, median, px", "residual_median_px", ".2f"),
        ("residual, 95 % below, px", "residual_p95_px", ".2f"),
        ("folded pixels", "folds", ".4%"),
    ):
        if key in stack:
            _log_row(label, *(_formatted(part.get(key), form) for part in parts))
    _log_row("blank sections", str(len(figures["blank"])))
    logger.info("worst places (x, y: mip-0 pixels)")
    for place in figures["worst"][:_NUM_PRINTED]:
        logger.info("  %s", describe_place(place))
    logger.info("%s/report.html", notes.path)
    keys = ("blank", "alone", "unplaced", "stand_out")
    print_json({**stack, **{key: figures[key] for key in keys}})


def _log_row(label: str, *cells: str) -> None:
    logger.info("%s", f"{label:<30}" + "".join(f"{cell:>10}" for cell in cells))


def _formatted(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _about(plan: CheckPlan) -> dict[str, Any]:
    """Return the first keys of check.json: what was measured, and how."""
    return {
        "format_version": _FORMAT_VERSION,
        "version": __version__,
        "cv_path": plan.cv_path,
        "before_path": plan.before,
        "pyramid_path": plan.pyramid_path,
        "field_path": plan.field_path,
        "mip": plan.mip,
        "z_start": plan.sections.start,
        "z_end": plan.sections.stop,
        "corner": [plan.area.x, plan.area.y],
        "size_px": list(plan.area.shape),
        "correlation_window_px": CORRELATION_PX,
        "jump_window_px": WINDOW_PX,
        "search_px": SEARCH_PX,
        "place_px": PLACE_PX,
        "cell_px": plan.cell_px,
    }


def _results(plan: CheckPlan) -> Notes:
    """Open the folder of the tasks' figures."""
    return Notes(cloud_path(f"{plan.destination}/check"))
