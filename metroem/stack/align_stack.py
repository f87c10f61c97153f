"""Align a volume of sections, step by step: place, pairs, relax, render, check.

<dst>/stack.json       what is aligned, and how: all that a task needs to know
<dst>/placement.json   where each section lies                         (place)
<dst>/greys/           grey levels of each section                     (pairs)
<dst>/pairs/           fields of z on z-k, correlations, defects       (pairs)
<dst>/field            final fields: aligned -> raw section            (relax)
<dst>/image            the aligned volume                              (render)
<dst>/layers/<name>    another layer of the raw volume, --layer        (render)
<dst>/check.json       what is left, worst places                      (check)
<dst>/report.html
<dst>/tasks/           done-markers and failures
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from metroem.errors import DatasetError, UsageError, first_line
from metroem.io.cloud_errors import storage_errors
from metroem.io.cloud_paths import cloud_path
from metroem.io.image_volume import ImageVolume, content_digest
from metroem.io.volume import Volume
from metroem.io.volume_write import Notes
from metroem.models.weights import check_weights, checkpoint_path
from metroem.specs.modules import find_modules
from metroem.stack.check import CheckReportStep, CheckStep
from metroem.stack.check_plan import load_plan
from metroem.stack.pairs import CELL_LEVELS, GreysStep, PairsStep, open_masks
from metroem.stack.place import (
    PlaceMatchStep,
    Placement,
    PlaceSolveStep,
    check_placed,
)
from metroem.stack.relax import RelaxOptions, RelaxStep
from metroem.stack.render import RenderStep, check_rendering, layer_mips
from metroem.stack.requests import (
    STEPS,
    AlignStackRequest,
    PlaceRequest,
    SectionsRequest,
    with_full_paths,
)
from metroem.stack.task_records import TaskRecords
from metroem.stack.tasks import Step, one_command, run_step
from metroem.utils.progress import size_in_words

logger = logging.getLogger(__name__)

_STACK = "stack.json"
# What is run for each step of --steps, in order.
_PARTS = {
    "place": ("place-match", "place-solve"),
    "pairs": ("pairs-greys", "pairs"),
    "relax": ("relax",),
    "render": ("render", "render-layer"),
    "check": ("check", "check-report"),
}
# Settings that say where the work is done, not what it gives.
_NOT_STORED = ("workers", "shard", "queue", "again", "steps", "allow_unplaced")
# Settings that a stack cannot change: they give it another place.
_FIXED = ("cv_path", "z_start", "mip")
# How metroem place --render writes the placed sections.
_RENDERED_PX, _RENDERED_SECTIONS, _RENDERED_MIPS = 2048, 16, 4


def align_stack(request: AlignStackRequest) -> None:
    """Run the steps of a request.

    Raises:
        MetroEMError: see the steps; the message says what to do.
        DatasetError: sections match nothing, unless that is allowed; all steps are
            done then.
    """
    request = with_full_paths(request)
    stack = _check_input(request)
    first = min(STEPS.index(step) for step in request.steps)
    for step in STEPS[:first]:
        _check_complete(stack, step, request.steps)
    with one_command(request.dst_path, request):
        stack.write()
    _announce(request)
    for step in STEPS[first:]:
        if step not in request.steps:
            _check_complete(stack, step, request.steps)
            continue
        for part in stack.parts(step):
            if part == "render-layer" and request.layer is None:
                continue
            if not run_step(stack.step(part), request):
                return  # the tasks of other shards are to be done first
    _name_stale_steps(stack, request.steps)
    if not request.allow_unplaced:
        check_placed(Placement.read(stack.destination))


def make_step(destination: str, name: str) -> Step:
    """Make a step of a stack, or of a check, from what its command stored of it.

    Args:
        destination: the folder of the stack.
        name: "place-match", "pairs", ...: see `_StoredStack.parts`.

    Raises:
        UsageError: there is no such step.
        DatasetError: no stack was begun there, or a step before is not complete.
    """
    if name in _PARTS["check"]:
        with suppress(DatasetError):  # there is no plan: it is the check of a stack
            check = CheckStep(load_plan(destination))
            part = check if name == check.name else CheckReportStep.of(check)
            records = TaskRecords(part.destination, part.name, part.settings)
            if records.stored_digest() == records.digest:
                return part
    stack = _StoredStack.read(destination)
    known = [part for step in STEPS for part in stack.parts(step)]
    if name not in known:
        raise UsageError(f"step {name!r}: expected one of {', '.join(known)}")
    return stack.step(name)


class _StoredStack:
    """A stack that was begun: its settings, and how far it has grown.

    Attributes:
        destination: its folder, with a scheme.
        request: the flags, with those of `_NOT_STORED` at their defaults.
        ends: one past the last section of the first run, and of each run that made the
            stack grow.
        content: digest of samples of the sections of the first run.
    """

    def __init__(
        self,
        destination: str,
        request: AlignStackRequest,
        ends: Sequence[int],
        content: str,
    ) -> None:
        self.destination, self.content = cloud_path(destination), content
        self.request, self.ends = request, tuple(ends)

    @classmethod
    def read(cls, destination: str) -> "_StoredStack":
        """Read what is stored at a destination (DatasetError if there is nothing)."""
        stored = cls.find(destination)
        if stored is None:
            raise DatasetError(
                f"--dst_path {destination}: no stack was begun there (it has no "
                f"{_STACK}); run metroem align-stack"
            )
        return stored

    @classmethod
    def find(cls, destination: str) -> "_StoredStack | None":
        """Read what is stored at a destination; None if there is nothing."""
        with storage_errors("--dst_path", destination):
            note = Notes(cloud_path(destination)).read([_STACK]).get(_STACK)
        if note is None:
            return None
        known = {one.name for one in fields(AlignStackRequest)}
        try:
            flags = dict(note["request"])
            flags["pyramid_path"] = Path(flags["pyramid_path"])
            if unknown := sorted(set(flags) - known):
                raise KeyError(", ".join(unknown))
            request = AlignStackRequest(**flags)
            return cls(destination, request, note["ends"], note["content"])
        except (KeyError, TypeError, UsageError) as error:
            raise DatasetError(
                f"{destination}/{_STACK}: is not what this version writes ({error}); "
                "name another --dst_path"
            ) from error

    def write(self) -> None:
        """Store it."""
        flags = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self.request).items()
            if name not in _NOT_STORED
        }
        note = {"format": 1, "request": flags, "ends": list(self.ends)}
        note["content"] = self.content
        Notes(self.destination).write(_STACK, note)

    def parts(self, step: str) -> list[str]:
        """List what is run for a step of --steps, in order; see `step`."""
        parts = list(_PARTS[step])
        if step == "relax":
            # Blocks that came when the stack grew read the fields of earlier ones.
            parts += [f"relax-{index}" for index in range(1, len(self.ends))]
        return parts

    def step(self, name: str) -> Step:
        """Make one of the steps that `parts` lists."""
        request = self.request
        sections = range(request.z_start, self.ends[-1])
        mips = tuple(module.in_mip for module in find_modules(request.pyramid_path))
        match = _match_step(self.destination, request, sections, self.content)
        if name == match.name:
            return match
        # A stack that grows keeps the borders of its chunks and windows.
        growth_px = math.lcm(request.chunk_px, request.window_px) << request.mip
        block_px = max(_pooled_px(mips), 64 << request.mip)
        block_px = max(block_px, 1 << (request.mip + request.mips - 1))
        solve = PlaceSolveStep(match, request.fix, block_px, growth_px, self.ends)
        if name == solve.name:
            return solve
        placement = Placement.read(self.destination)
        if placement.settings != solve.method or not {*sections} <= {
            *placement.matrices
        }:
            raise DatasetError(
                f"{self.destination}/placement.json: was written by a command with "
                "other settings or sections; run the step place again: --steps place"
            )
        # Sections of the first run keep their places when the stack grows.
        first = placement.digest(range(request.z_start, self.ends[0]))
        placed = {**solve.method, "placement": first}
        greys = GreysStep(
            *(self.destination, request.cv_path, placement, sections),
            *(request.block_sections, mips),
            before=placed,
        )
        if name == greys.name:
            return greys
        resolution = ImageVolume(request.cv_path).resolution
        pairs = PairsStep(
            self.destination,
            request.cv_path,
            request.masks,
            request.pyramid_path,
            request.checkpoint_name,
            request.device,
            placement,
            sections,
            request.mip,
            request.window_px,
            request.block_sections,
            request.halo_px,
            request.neighbours,
            mips,
            weights_digest(request.pyramid_path, request.checkpoint_name),
            resolution,
            before=placed,
        )
        if name == pairs.name:
            return pairs
        relax = RelaxStep(
            self.destination,
            placement,
            self.ends,
            request.z_start,
            request.mip,
            request.chunk_px,
            request.block_sections,
            mips[-1] + CELL_LEVELS,
            request.neighbours,
            resolution,
            RelaxOptions(bending=RelaxOptions.bending * request.smoothness),
            before=pairs.settings,
        )
        if name in self.parts("relax"):
            return replace(relax, generation=self.parts("relax").index(name))
        size = request.chunk_size
        render = RenderStep(
            self.destination,
            f"{self.destination}/image",
            request.cv_path,
            placement,
            mips[-1] + CELL_LEVELS,
            sections,
            request.mip,
            request.mips,
            request.chunk_px,
            request.block_sections,
            resolution,
            request.encoding,
            (size[0], size[1], size[2]) if size else None,
            before=relax.settings,
        )
        if name == render.name:
            return render
        if name == "render-layer":
            if request.layer is None:
                raise DatasetError(
                    f"{self.destination}: no --layer was given to align-stack"
                )
            return render.of_layer(request.layer, request.nearest)
        check = CheckStep.of(self.destination, request, placement, render)
        return check if name == check.name else CheckReportStep.of(check)


def place_stack(request: PlaceRequest) -> None:
    """Place the sections of a volume, and write them if asked for.

    Raises:
        MetroEMError: see the steps; the message says what to do.
    """
    request = with_full_paths(request)
    volume = ImageVolume(request.cv_path)
    volume.check_channels(1, "a volume of sections")
    volume.check_mip("--mip", request.mip)
    volume.check_sections(request.sections, volume.mips[0])
    if request.render is not None:
        check_rendering(
            *(volume, request.mip, _RENDERED_MIPS, _RENDERED_PX, _RENDERED_SECTIONS)
        )
    logger.info(
        "place: %d sections of %s by thumbnails of at most %d px, to %s",
        *(len(request.sections), volume.path, request.thumbnail_px, request.dst_path),
    )
    destination = cloud_path(request.dst_path)
    # Of the first sections: the others may come later.
    first = range(request.z_start, request.z_start + 2)
    content = content_digest(volume, first)
    match = _match_step(destination, request, request.sections, content)
    block_px = _RENDERED_PX << request.mip
    ends = (request.z_end,) if request.again else None
    solve = PlaceSolveStep(match, request.fix, 64 << request.mip, block_px, ends)
    if not (run_step(match, request) and run_step(solve, request)):
        return  # the tasks of other shards are to be done first
    placement = Placement.read(destination)
    if request.render is not None:
        render = RenderStep(
            destination,
            request.render,
            request.cv_path,
            placement,
            None,
            request.sections,
            request.mip,
            _RENDERED_MIPS,
            _RENDERED_PX,
            _RENDERED_SECTIONS,
            volume.resolution,
            before=solve.method,
            name="place-render",
        )
        run_step(render, request)
    if not request.allow_unplaced:
        check_placed(placement)


def _match_step(
    destination: str, request: SectionsRequest, sections: range, content: str
) -> PlaceMatchStep:
    return PlaceMatchStep(
        *(destination, request.cv_path, sections),
        *(request.model, request.flip, request.thumbnail_px, content),
    )


def _pooled_px(mips: Sequence[int]) -> int:
    """Return the largest block that the networks of a pyramid pool, mip-0 px."""
    return 16 << max(mips)


def weights_digest(pyramid: Path, checkpoint_name: str) -> str:
    """Compute a digest of the weights of all modules of a pyramid."""
    digest = hashlib.sha256()
    for module in find_modules(pyramid):
        path = checkpoint_path(module.weights_folder, checkpoint_name)
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _check_input(request: AlignStackRequest) -> _StoredStack:
    """Refuse what cannot work; return the stack with its settings, not stored yet.

    Raises:
        DatasetError: the volume lacks a mip or a section, is not uint8, or another
            stack is at the destination.
        PyramidError, CheckpointError: the pyramid cannot be used.
    """
    modules = find_modules(request.pyramid_path)
    check_weights(modules, request.checkpoint_name, str(request.pyramid_path))
    volume = ImageVolume(request.cv_path)
    volume.check_channels(1, "a volume of sections")
    if str(volume.dtype) != "uint8":
        raise DatasetError(
            f"--cv_path {volume.path}: is {volume.dtype}; expected uint8, as pyramids "
            "are trained on; write its grey levels as 8 bit first, 0 where there is no "
            "data"
        )
    for mip in {request.mip, *(module.in_mip for module in modules)}:
        volume.check_mip("--mip" if mip == request.mip else "mip of a stage", mip)
    if modules[-1].in_mip < request.mip:
        raise UsageError(
            f"--mip {request.mip}: the last stage of {request.pyramid_path} reads mip "
            f"{modules[-1].in_mip}, which is finer; give --mip {modules[-1].in_mip}"
        )
    volume.check_sections(request.sections, volume.mips[0])
    _check_rendering(request, volume)
    block = _pooled_px([module.in_mip for module in modules])
    for name in ("chunk_px", "window_px"):
        if (size := getattr(request, name) << request.mip) % block:
            raise UsageError(
                f"--{name} {size >> request.mip}: expected a multiple of "
                f"{block >> request.mip}, the largest block of px that the networks "
                "pool"
            )
    if request.masks is not None:
        open_masks(request.masks, volume, modules[-1].in_mip, request.sections)
    _check_device(request.device)
    found = _StoredStack.find(request.dst_path)
    ends = (request.z_end,)
    if found is not None and not request.again:
        for name in _FIXED:
            before, now = getattr(found.request, name), getattr(request, name)
            if before != now:
                raise DatasetError(
                    f"--dst_path {request.dst_path}: holds a stack with --{name} "
                    f"{before}, now {now}; name another --dst_path"
                )
        if request.z_end < found.ends[-1]:
            raise DatasetError(
                f"--z_end {request.z_end}: {request.dst_path} holds a stack up to "
                f"section {found.ends[-1]}; give that, or another --dst_path"
            )
        ends = found.ends
        if request.z_end > ends[-1]:
            ends = (*ends, request.z_end)
    defaults = {
        one.name: one.default for one in fields(request) if one.name in _NOT_STORED
    }
    defaults["steps"] = list(STEPS)
    content = content_digest(volume, range(request.z_start, ends[0]))
    return _StoredStack(request.dst_path, replace(request, **defaults), ends, content)


def _check_device(device: str) -> None:
    """Refuse a device that this machine does not have (UsageError)."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {device}: cannot be used here ({first_line(error)}); give cpu, "
            "or cuda on a machine with an NVIDIA GPU"
        ) from error


def _check_rendering(request: AlignStackRequest, volume: ImageVolume) -> None:
    """Refuse an aligned volume, or a layer of it, that could not be written."""
    size = request.chunk_size
    check_rendering(
        *(volume, request.mip, request.mips, request.chunk_px, request.block_sections),
        *(request.encoding, (size[0], size[1], size[2]) if size else None),
    )
    if request.encoding in ("jpeg", "jxl"):
        logger.warning(
            "--encoding %s: leaves dark traces of tissue beside it where the raw "
            "sections are 0; png and raw do not",
            request.encoding,
        )
    if request.layer is None:
        return
    layer = Volume(request.layer, flag="--layer", resolution=volume.resolution)
    mips = layer_mips(layer, range(request.mip, request.mip + request.mips))
    check_rendering(
        *(layer, mips.start, len(mips), request.chunk_px >> mips.start - request.mip),
        *(request.block_sections, None, None, request.nearest),
    )
    layer.check_lies_on(volume, mips.start)
    area = volume.extent()[0].cover(mips.start)
    if (inner := layer.clip(area)) is None:
        raise DatasetError(
            f"--layer {layer.path}: has nothing where the sections of {volume.path} "
            "lie; expected the same coordinates: correct voxel_offset in its info"
        )
    if inner != area:
        logger.warning(
            "--layer %s: covers x %d...%d, y %d...%d of the sections, which have x "
            "%d...%d, y %d...%d (mip-0 pixels); the rest will be 0",
            *(layer.path, inner.x, inner.end[0], inner.y, inner.end[1]),
            *(area.x, area.end[0], area.y, area.end[1]),
        )


def _announce(request: AlignStackRequest) -> None:
    """Log what will be done, on what."""
    volume = ImageVolume(request.cv_path)
    area = volume.extent()[0].cover(request.mip)
    num = len(request.sections)
    chunks, windows = (
        -(-area.rows // px) * -(-area.cols // px)
        for px in (request.chunk_px, request.window_px)
    )
    blocks = -(-num // request.block_sections)
    num_bytes = num * area.rows * area.cols * volume.dtype.itemsize
    logger.info(
        "align-stack: %d sections of %d x %d px at mip %d, %s; %d blocks of %d "
        "sections, %d chunks of %d px: about %d tasks a step, for pairs %d windows of "
        "%d px: about %d tasks; steps %s",
        *(num, area.rows, area.cols, request.mip, volume.path, blocks),
        *(request.block_sections, chunks, request.chunk_px, chunks * blocks),
        *(windows, request.window_px, windows * blocks),
        ", ".join(step for step in STEPS if step in request.steps),
    )
    logger.info(
        "each step reads at least %s; an image of %s and fields of %s go to %s",
        *(size_in_words(num_bytes), size_in_words(num_bytes)),
        *(size_in_words(num_bytes / 8), request.dst_path),
    )


def _check_complete(stack: _StoredStack, step: str, run: Sequence[str]) -> None:
    """Refuse to run steps after one that is not complete.

    What a task did not write looks like zeros, so later steps would give wrong data.

    Raises:
        DatasetError: a step that is not run has open tasks, and a later one is run.
    """
    if STEPS.index(step) > max(STEPS.index(one) for one in run):
        return
    for name in stack.parts(step):
        if name == "render-layer":
            continue
        part = stack.step(name)
        tasks = part.tasks()
        records = TaskRecords(part.destination, part.name, part.settings)
        if num_open := len(tasks) - len(records.look(tasks).done):
            raise DatasetError(
                f"--steps {' '.join(run)}: {num_open} of {len(tasks)} tasks of the "
                f"step {step} before are not done with these settings; run it, too: "
                f"--steps {' '.join(one for one in STEPS if one in (step, *run))}"
            )


def _name_stale_steps(stack: _StoredStack, run: Sequence[str]) -> None:
    """Log the later steps whose results are of other settings than today's."""
    stale = []
    for step in STEPS[max(STEPS.index(one) for one in run) + 1 :]:
        first = stack.parts(step)[0]
        if TaskRecords(stack.destination, first, {}).stored_digest() is None:
            continue  # it was never run
        part = stack.step(first)
        records = TaskRecords(part.destination, part.name, part.settings)
        if records.look(part.tasks()).stale:
            stale.append(step)
    if stale:
        logger.warning(
            "steps %s are stale now: run them again: --steps %s",
            *(", ".join(stale), " ".join(stale)),
        )
