"""Make a volume with mips of sections in image files: the command `metroem import`.

Without a second path, mips are added to a volume that exists. Each section is read in
bands and written as whole chunks, one section thick; those of thick sources a layer of
chunks at a time. A note marks each that is complete, so the same command resumes. The
info is written last: until then no program can open what is half written.
"""

import logging
import math
import multiprocessing
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from metroem.errors import DatasetError, ResourceError, UsageError
from metroem.geometry.grid import Grid, Resolution, in_nm, nm_of, same_resolution
from metroem.imaging.grey_range import GreyRange, find_grey_range
from metroem.io.cloud_paths import cloud_path, local_folder
from metroem.io.files import lock, lock_path
from metroem.io.image_files import (
    SectionStack,
    UnreadableSection,
    VolumeSections,
    open_stack,
)
from metroem.io.image_volume import ImageVolume
from metroem.io.mip_bands import MipBands
from metroem.io.resume import as_json, describe_differences
from metroem.io.volume_write import MipsWriter, NewVolume, Notes
from metroem.prepare.requests import ImportRequest
from metroem.utils import cli
from metroem.utils.memory import enough_memory
from metroem.utils.processes import start_working
from metroem.utils.progress import progress, size_in_words

logger = logging.getLogger(__name__)

_CHUNK_PX = 512
# By default there are at least _LEAST mips, and the coarsest has at most _COARSEST_PX.
_LEAST, _COARSEST_PX = 3, 512
# The range of greys is found from so many sections, bands of each, rows of each band,
# and pixels of each section.
_SAMPLES, _SAMPLE_BANDS, _SAMPLE_ROWS, _SAMPLE_PX = 16, 8, 64, 2**18
# More pixels of tissue outside of the range than this are worth a warning.
_MUCH_CLIPPED = 0.05
_GREY_TYPES = ("uint8", "uint16", "float32")
_REQUEST = "request.json"


def import_images(request: ImportRequest) -> None:
    """Make a volume of sections in image files, or add mips to a volume.

    Raises:
        DatasetError: sections are missing, broken or in colour; their type or voxel
            size is not known; another volume exists at the destination.
        StorageError, ResourceError: it cannot be written, or a process was killed.
    """
    request.check_paths()
    try:
        with enough_memory("import", "give fewer --workers, or files read in parts"):
            if request.volume is None:
                _add_mips(request)
            else:
                _import(request, request.volume)
    except KeyboardInterrupt:
        logger.info("stopped; the same command resumes, with what is done kept")
        raise


@dataclass(frozen=True)
class _Job:
    """What is read and written; processes get a copy.

    Attributes:
        stack: the sections.
        writer: of the volume.
        area: area of the volume, at the mip of the stack.
        shift: z of the volume minus z of the stack.
        dtype: type of the volume.
        grey: the range of greys, unless they stay as they are.
        allow_missing: a section that cannot be read becomes blank.
    """

    stack: SectionStack
    writer: MipsWriter
    area: Grid
    shift: int
    dtype: np.dtype
    grey: GreyRange | None = None
    allow_missing: bool = False

    @property
    def layers(self) -> list[range]:
        """The sections that are read together, z of the volume."""
        by = self.shift
        return [range(one.start + by, one.stop + by) for one in self.stack.layers()]

    def identity(self, z: int) -> list[Any] | None:
        """Return what tells whether a file is still the same; None if it is missing."""
        section = self.stack.sections.get(z - self.shift)
        return None if section is None else [section.name, *section.stamp]

    def run(self, layer: range) -> dict[str, Any]:
        """Read sections and write all mips of them.

        Returns:
            Their note, JSON-able; with a key "failed" that says why, if they cannot be
            read and may not be blank. Then nothing of them is complete.
        """
        found = {str(z): self.identity(z) for z in layer}
        note: dict[str, Any] = {"sections": found, "clipped": 0, "tissue": 0}
        reason = self.stack.missing.get(layer[0] - self.shift)
        if reason is None:
            try:
                self._write(layer, note)
                return note
            except UnreadableSection as error:
                reason = str(error)
        if not self.allow_missing:
            return {"failed": {str(z): reason for z in layer}}
        self._write(layer, None)
        return {
            **note,
            "clipped": 0,
            "tissue": 0,
            "blank": dict.fromkeys(found, reason),
        }

    def _write(self, layer: range, note: dict[str, Any] | None) -> None:
        """Write all mips of a layer; blank without a note that counts its pixels."""
        mips = self.writer.scales
        chunk_px = self.writer.info["scales"][0]["chunk_sizes"][0][1]
        bands = MipBands(self.area, range(min(mips), max(mips) + 1), chunk_px)
        for start in range(0, self.area.cols, self.stack.band_rows):
            rows = range(start, min(start + self.stack.band_rows, self.area.cols))
            band = np.zeros((len(layer), self.area.rows, len(rows)), self.dtype)
            if note is not None:
                self._read(layer, rows, band, note)
            for values, grid in bands.add(band):
                if grid.mip in mips:
                    self.writer.write(values, grid, layer)

    def _read(
        self, layer: range, rows: range, band: np.ndarray, note: dict[str, Any]
    ) -> None:
        """Read rows of sections into a band; count the pixels that are clipped."""
        by = self.shift
        greys = self.stack.read(range(layer.start - by, layer.stop - by), rows)
        if self.grey is not None:
            try:
                greys, clipped, tissue = self.grey.to_uint8(greys)
            except DatasetError as error:
                name = self.stack.sections[layer[0] - by].name
                raise UnreadableSection(f"{name}: {error}") from error
            note["clipped"] += clipped
            note["tissue"] += tissue
        band[:, : greys.shape[1], : greys.shape[2]] = greys


def _import(request: ImportRequest, path: str) -> None:
    """Make a new volume, or resume."""
    stack = open_stack(request.sections)
    if not stack.sections:
        raise DatasetError(f"no section can be read: {_listed(stack.broken)}")
    if stack.missing and not request.allow_missing:
        raise DatasetError(
            f"{stack.path}: {len(stack.missing)} of {len(stack.span)} sections cannot "
            f"be imported: {_listed(stack.missing)}; repair or add them, or give "
            "--allow_missing, which leaves them blank"
        )
    resolution = _resolution(stack, request)
    height, width = stack.shape
    area = Grid(0, *stack.corner, width, height)
    mips = request.mips or _default_mips(area)
    source_type = next(iter(stack.sections.values())).dtype
    start = request.z_start if request.z_start is not None else stack.span.start
    shift = start - stack.span.start
    sections = range(start, start + len(stack.span))
    wanted = {
        "sections": _absolute(stack.path),
        "content": stack.digest,
        "size": [width, height],
        "type": str(source_type),
        "z": [sections.start, sections.stop],
        "mips": mips,
        "resolution": resolution,
        "grey_range": request.grey_range or "found",
    }
    about: dict[str, Any] = {"kind": "images"}
    new = NewVolume(1, "uint8", 0, area, sections, resolution, about)
    writer = MipsWriter.of_new(path, "VOLUME", new, mips, _CHUNK_PX)
    notes = Notes(f"{writer.path}/import")
    found = notes.read([_REQUEST]).get(_REQUEST)
    _check_destination(path, writer, found, wanted)
    writer.begin()
    with _locked(writer):
        if found is None:
            _check_colour(stack)
            grey = _choose_grey_range(stack, source_type, request)
            found = {"wanted": wanted, "range": grey and [grey.low, grey.high]}
            notes.write(_REQUEST, found)
        grey = GreyRange(*found["range"]) if found["range"] else None
        if grey is not None:
            about["grey_range"] = found["range"]
            writer = MipsWriter.of_new(path, "VOLUME", new, mips, _CHUNK_PX)
        _announce(stack, writer, source_type, area, sections, grey)
        job = _Job(
            *(stack, writer, area, shift, np.dtype(np.uint8)),
            *(grey, request.allow_missing),
        )
        done = _run(job, notes, request.workers, "import, sections")
        _log_clipped(done)
        blank = {int(z): why for one in done for z, why in one.get("blank", {}).items()}
        if len(blank) == len(sections):
            raise DatasetError(f"no section could be read: {_listed(blank)}")
        entry = {"method": {"command": cli.command_line()}, "by": "metroem import"}
        writer.finish([_absolute(stack.path)], entry)
    if blank:
        logger.warning(
            "%s: %d sections are blank: %s", path, len(blank), _listed(blank)
        )
    logger.info(
        "%s: z %d...%d, %d mips. Next: metroem align-stack --cv_path %s "
        "--dst_path stack --pyramid_path pyramid --z_start %d --z_end %d",
        *(path, sections[0], sections[-1], mips, path, sections.start, sections.stop),
    )


def _add_mips(request: ImportRequest) -> None:
    """Add mips to a volume that exists, or resume."""
    volume = ImageVolume(request.sections, flag="SECTIONS")
    volume.check_channels(1, "a volume of grey levels")
    kind = str(volume.info.get("type"))
    if kind != "image" or str(volume.dtype) not in _GREY_TYPES:
        raise UsageError(
            f"SECTIONS {request.sections}: is a {kind} volume of {volume.dtype}; "
            f"expected images of {', '.join(_GREY_TYPES)}"
        )
    count = request.mips or _default_mips(volume.extent()[0])
    missing = [mip for mip in range(count) if mip not in volume.mips]
    held = ", ".join(map(str, volume.mips))
    if not missing:
        logger.info("%s: has mips %s; there is nothing to add", volume.path, held)
        return
    finest = max(mip for mip in volume.mips if mip < missing[0])
    stack = VolumeSections(request.sections, "SECTIONS", finest)
    writer = MipsWriter.of_existing(volume, finest, range(missing[0], count))
    wanted = {"mips": missing, "from mip": finest, "content": stack.digest}
    writer.begin()
    notes = Notes(f"{writer.path}/add_mips")
    with _locked(writer):
        found = notes.read([_REQUEST]).get(_REQUEST)
        if found and (differences := describe_differences(found, wanted)):
            raise DatasetError(
                f"{notes.path}: a run that was stopped was to add other mips: "
                f"{differences}; give the same flags, or delete that folder"
            )
        notes.write(_REQUEST, wanted)
        logger.info(
            "%s: has mips %s, which stay as they are; adds %s, made of mip %d, in %d "
            "sections of %d x %d px",
            *(volume.path, held, ", ".join(map(str, missing)), finest),
            *(len(stack.span), *stack.area.shape),
        )
        job = _Job(stack, writer, stack.area, 0, volume.dtype)
        _run(job, notes, request.workers, "mips, layers")
        entry = {"method": {"command": cli.command_line()}, "by": "metroem import"}
        writer.finish([], entry)
    notes.delete("")
    if (folder := local_folder(notes.path)) is not None:
        with suppress(OSError):  # only empty folders are left
            (folder / "done").rmdir()
            folder.rmdir()
    logger.info("%s: has mips %s", volume.path, ", ".join(map(str, range(count))))


def _run(job: _Job, notes: Notes, workers: int, what: str) -> list[dict[str, Any]]:
    """Do what is not done yet.

    Returns:
        The notes of all layers.

    Raises:
        DatasetError: a file has changed since it was read; or sections could not be
            read, while all others are done.
    """
    done, todo = _done_before(job, notes)
    if done:
        logger.info("%d of %d are done already", len(done), len(job.layers))
    failed: dict[int, str] = {}
    if not todo:
        return list(done.values())
    with closing(_notes_of(job, todo, workers)) as made:
        for name, note in progress(made, what, total=len(todo)):
            if "failed" in note:
                failed |= {int(z): why for z, why in note["failed"].items()}
            else:
                notes.write(name, note)
                done[name] = note
    if failed:
        raise DatasetError(
            f"{job.stack.path}: {len(failed)} sections cannot be read: "
            f"{_listed(failed)}; all others are done. Repair them and give the same "
            "command, or give --allow_missing, too, which leaves them blank"
        )
    return list(done.values())


def _done_before(
    job: _Job, notes: Notes
) -> tuple[dict[str, dict[str, Any]], list[range]]:
    """Find the layers that are done, by the name of their note, and those to do."""
    by_name = {f"done/z{one.start}-{one.stop}.json": one for one in job.layers}
    stored = notes.read([name for name in notes.names("done/") if name in by_name])
    done = {}
    for name, note in stored.items():
        now = {str(z): as_json({"": job.identity(z)})[""] for z in by_name[name]}
        if note["sections"] == now:
            done[name] = note
        elif "blank" not in note:  # a blank one is read again, since it was repaired
            was = [entry for entry in note["sections"].values() if entry]
            raise DatasetError(
                f"{was[0][0]}: has changed since it was imported, or is no longer "
                f"there; delete {job.writer.path} to begin again, or put it back"
            )
    return done, [layer for name, layer in by_name.items() if name not in done]


def _notes_of(
    job: _Job, layers: Sequence[range], workers: int
) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """Run layers here, or in processes; yields the name and the content of each note.

    Raises:
        ResourceError: a process was killed.
    """
    if workers == 1 or len(layers) < 2:
        for layer in layers:
            yield f"done/z{layer.start}-{layer.stop}.json", job.run(layer)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(layers)),
        mp_context=multiprocessing.get_context("forkserver"),
        initializer=_start_process,
        initargs=(job,),
    )
    try:
        layer_of = {pool.submit(_run_in_process, layer): layer for layer in layers}
        for future in as_completed(layer_of):
            layer = layer_of[future]
            yield f"done/z{layer.start}-{layer.stop}.json", future.result()
    except BrokenProcessPool as error:
        raise ResourceError(
            "a process of --workers was killed or died, most likely for want of "
            "memory; give fewer --workers: the same command resumes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_job: _Job


def _start_process(job: _Job) -> None:
    """Set up a process that runs layers."""
    global _job
    start_working()
    _job = job


def _run_in_process(layer: range) -> dict[str, Any]:
    return _job.run(layer)


@contextmanager
def _locked(writer: MipsWriter) -> Iterator[None]:
    """Keep other runs from writing to a volume on local disk."""
    folder = local_folder(writer.path)
    if folder is None:
        yield
        return
    with lock(lock_path(folder / "import")):
        yield


def _check_destination(
    path: str, writer: MipsWriter, found: dict | None, wanted: Mapping[str, Any]
) -> None:
    """Refuse a destination that has something else than a part of this volume."""
    if found is not None:
        if differences := describe_differences(found["wanted"], wanted):
            raise DatasetError(
                f"VOLUME {path}: was begun with other flags or files: {differences}; "
                "give the same to resume, or delete it, or give another path"
            )
        return
    if writer.found() is not None:
        raise DatasetError(
            f"VOLUME {path}: a volume is there already; give another path, or delete it"
        )
    folder = local_folder(writer.path)
    if folder is not None and folder.exists():
        if held := [one.name for one in folder.iterdir() if one.name[0] != "."]:
            raise DatasetError(
                f"VOLUME {path}: holds other files, such as {sorted(held)[0]}; give a "
                "path that is not there yet"
            )


def _resolution(stack: SectionStack, request: ImportRequest) -> Resolution:
    """Choose the size of a voxel.

    Raises:
        UsageError: neither flag nor files state it.
    """
    stated = stack.resolution
    if request.resolution is not None:
        x, y, z = request.resolution
        known = nm_of([nm or own for nm, own in zip(stated, (x, y, z), strict=True)])
        if not same_resolution(known, (x, y, z)):
            logger.warning(
                "%s: states voxels of %s; --resolution %s is taken",
                *(stack.path, in_nm(known), in_nm((x, y, z))),
            )
        return x, y, z
    x, y, z = stated
    if not (x and y and z):
        known = ", ".join(
            f"{axis} {nm:g} nm" for axis, nm in zip("xyz", stated, strict=True) if nm
        )
        raise UsageError(
            f"--resolution: {stack.path} states "
            f"{known + ' and no more' if known else 'no size of a voxel'}; give "
            "--resolution X Y Z in nm: the size of a pixel is in the microscope's log "
            "or image header, z is the thickness of a section"
        )
    return x, y, z


def _default_mips(area: Grid) -> int:
    """Choose how many mips there are."""
    halvings = math.ceil(math.log2(max(area.shape) / _COARSEST_PX))
    return max(_LEAST, 1 + halvings)


def _probe(stack: SectionStack, count: int) -> Iterator[tuple[int, range]]:
    """List sections all over a stack, and bands of rows all over each."""
    known = sorted(stack.sections)
    chosen = {known[i * (len(known) - 1) // max(count - 1, 1)] for i in range(count)}
    for z in sorted(chosen):
        height = stack.sections[z].shape[0]
        rows = min(_SAMPLE_ROWS, height)
        for band in range(_SAMPLE_BANDS):
            start = (height - rows) * band // max(_SAMPLE_BANDS - 1, 1)
            yield z, range(start, start + rows)


def _check_colour(stack: SectionStack) -> None:
    """Refuse a stack in colour before anything is written: all that is looked at is."""
    if all(section.num_channels == 1 for section in stack.sections.values()):
        return
    wrong: dict[int, UnreadableSection] = {}
    probed = list(_probe(stack, 3))
    for z, rows in probed:
        try:
            stack.read(range(z, z + 1), rows)
        except UnreadableSection as error:
            wrong.setdefault(z, error)
    if len(wrong) == len({z for z, _ in probed}):
        raise wrong[min(wrong)]


def _choose_grey_range(
    stack: SectionStack, dtype: np.dtype, request: ImportRequest
) -> GreyRange | None:
    """Choose the range of greys that are mapped to 8 bit; None: they stay."""
    if request.grey_range is not None:
        return GreyRange(*request.grey_range)
    if dtype == np.uint8:
        return None
    samples = []
    for z, rows in _probe(stack, min(_SAMPLES, len(stack.sections))):
        try:
            pixels = stack.read(range(z, z + 1), rows).reshape(-1)
        except UnreadableSection:  # it is named when its turn comes
            continue
        step = max(len(pixels) * _SAMPLE_BANDS // _SAMPLE_PX, 1)
        samples.append(pixels[::step])
    try:
        return find_grey_range(samples)
    except DatasetError as error:
        raise DatasetError(f"{stack.path}: {error}") from error


def _announce(
    stack: SectionStack,
    writer: MipsWriter,
    dtype: np.dtype,
    area: Grid,
    sections: range,
    grey: GreyRange | None,
) -> None:
    """Log what will be read and written."""
    found = stack.sections.values()
    resolution = nm_of(writer.info["scales"][0]["resolution"])
    num_read = sum(one.shape[0] * one.shape[1] for one in found) * dtype.itemsize
    num_written = len(sections) * sum(
        scale["size"][0] * scale["size"][1] for scale in writer.info["scales"]
    )
    logger.info(
        "%s: %d sections of %d x %d px (x, y), %s, z %d...%d; %s to decode, %s to "
        "write in %d mips, voxels of %s; grey levels %s",
        *(stack.path, len(found), area.rows, area.cols, dtype),
        *(sections[0], sections[-1], size_in_words(num_read)),
        *(size_in_words(num_written), len(writer.scales), in_nm(resolution)),
        f"{grey.low:g} to {grey.high:g} become 1 to 255"
        if grey
        else "stay as they are",
    )
    sizes: dict[tuple[int, int], list[str]] = {}
    for section in found:
        sizes.setdefault(section.shape, []).append(section.name)
    if len(sizes) > 1:
        logger.info(
            "%s: %d sizes: %s; all lie on one canvas of %d x %d px, upper left corners "
            "on each other, and the rest is blank",
            *(stack.path, len(sizes)),
            "; ".join(
                f"{cols} x {rows} px: {len(names)} ({names[0]}"
                f"{' ...' if len(names) > 1 else ''})"
                for (rows, cols), names in sizes.items()
            ),
            *area.shape,
        )


def _log_clipped(notes: Sequence[Mapping[str, Any]]) -> None:
    """Log how many pixels lay outside of the range of greys."""
    clipped, tissue = (sum(one[key] for one in notes) for key in ("clipped", "tissue"))
    if not tissue:
        return
    fraction = clipped / tissue
    is_much = fraction > _MUCH_CLIPPED
    logger.log(
        logging.WARNING if is_much else logging.INFO,
        "%.2g %% of the tissue lay outside of the range of greys and was clipped%s",
        100 * fraction,
        "; --grey_range states a wider one" if is_much else "",
    )


def _listed(reasons: Mapping[int, str]) -> str:
    """Name sections and why they cannot be read; neighbours alike as one."""
    spans: list[tuple[int, int, str]] = []
    for z, why in sorted(reasons.items()):
        if spans and spans[-1][1] == z - 1 and spans[-1][2] == why:
            spans[-1] = spans[-1][0], z, why
        else:
            spans.append((z, z, why))
    return "; ".join(
        f"z {first}: {why}" if first == last else f"z {first}-{last}: {why}"
        for first, last, why in spans
    )


def _absolute(path: str) -> str:
    """Return a path that means the same from every folder."""
    return cloud_path(path) if local_folder(path) is None else str(local_folder(path))
