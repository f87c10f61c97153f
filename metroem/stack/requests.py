"""Define the flags of align, place, align-stack, worker, check and view."""

import importlib.util
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from metroem.errors import DatasetError, UsageError
from metroem.io.cloud_paths import (
    check_destination,
    check_exists,
    cloud_path,
    split_format,
)
from metroem.specs.filenames import check_checkpoint_name
from metroem.specs.modules import find_modules
from metroem.utils.cli import Request, flag, flags_of_group

# The steps of align-stack, in order.
STEPS = ("place", "pairs", "relax", "render", "check")
MODELS = ("rigid", "similarity", "affine")

_SECTIONS, _PLACING = "sections", "placement"
_ALIGNING, _RUNNING = "alignment", "where the work is done"
_TASKS, _VOLUME = "size of the tasks", "aligned volume"
_COMPARED = "what it is compared with"
_sections, _placing = flags_of_group(_SECTIONS), flags_of_group(_PLACING)
_aligning, _running = flags_of_group(_ALIGNING), flags_of_group(_RUNNING)
_tasks, _volume = flags_of_group(_TASKS), flags_of_group(_VOLUME)
_compared = flags_of_group(_COMPARED)


@dataclass(frozen=True, kw_only=True)
class RunRequest(Request):
    """Flags that say where the tasks of a step are run."""

    GROUPS = ("", _RUNNING)

    workers: int = _running("processes on this machine, one thread each", 1, least=1)
    shard: str | None = _running(
        "run only the tasks of part i of n, for arrays of jobs: 0/3, 1/3, 2/3",
        unset="all tasks",
        metavar="I/N",
    )
    queue: str | None = _running(
        "put the tasks into this queue, for metroem worker: fq://FOLDER or sqs://NAME",
        unset="run them here",
        metavar="URL",
    )
    again: bool = _running("run finished tasks again, too", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard is not None:
            found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
            if not found or not int(found[1]) < int(found[2]):
                raise UsageError(
                    f"--shard {self.shard}: expected I/N with I from 0 to N - 1, "
                    "for example 0/3"
                )
        if self.queue is not None and self.shard is not None:
            raise UsageError("--queue and --shard: give one of them")
        if self.queue is not None:
            check_queue(self.queue)


def check_queue(url: str) -> None:
    """Refuse the address of a queue that is not read.

    Raises:
        UsageError: it begins with neither fq:// nor sqs://.
    """
    if not re.match(r"(fq|sqs)://.", url):
        raise UsageError(f"--queue {url}: expected fq://FOLDER or sqs://NAME")


@dataclass(frozen=True, kw_only=True)
class SectionsRequest(RunRequest):
    """Flags that place and align-stack share."""

    GROUPS = ("", _SECTIONS, _PLACING, _RUNNING)

    cv_path: str = flag("volume of the raw sections")
    dst_path: str = flag("folder to write: placement.json and the record of the tasks")
    z_start: int = _sections("first section")
    z_end: int = _sections("one past the last section")
    mip: int = _sections("finest mip that is read and written", 0, least=0)
    model: str = _placing("map of a section to its place", "similarity", choices=MODELS)
    flip: bool = _placing("allow mirrored sections", False)
    fix: int | None = _placing(
        "section that stays where it is", unset="the one in the middle of the stack"
    )
    thumbnail_px: int = _placing(
        "longest side of the thumbnails that are matched", 1024, least=128
    )
    allow_unplaced: bool = _placing("exit with 0 even if sections match nothing", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.z_end - self.z_start < 2:
            raise UsageError(
                f"--z_start {self.z_start} --z_end {self.z_end}: expected two sections "
                "or more; --z_end is one past the last"
            )
        if self.fix is not None and not self.z_start <= self.fix < self.z_end:
            raise UsageError(
                f"--fix {self.fix}: expected one of the sections {self.z_start} to "
                f"{self.z_end - 1}"
            )
        check_destination("--dst_path", self.dst_path)

    def check_paths(self) -> None:
        check_exists("--cv_path", self.cv_path)

    def check_not_written(self, name: str, *written: str) -> None:
        """Refuse a volume that is read and would be written to, or lies inside of that.

        Args:
            name: of the field that holds its path; None passes.
            written: paths that are written.

        Raises:
            UsageError: it is one of them.
        """
        if (source := getattr(self, name)) is None:
            return
        source_path = _without_format(source)
        for path in written:
            if f"{source_path}/".startswith(f"{_without_format(path)}/"):
                raise UsageError(
                    f"--{name} {source}: would be overwritten, since this command "
                    f"writes to {path}; name another path to write to"
                )

    @property
    def sections(self) -> range:
        """The range of z."""
        return range(self.z_start, self.z_end)


@dataclass(frozen=True, kw_only=True)
class PlaceRequest(SectionsRequest):
    """Flags of place."""

    HELP = """Find where each section of a volume lies.

    Sections may be shifted and turned by any amount. The same command resumes a run
    that was stopped.

    Example:
        %(prog)s --cv_path sections --dst_path placed --z_start 0 --z_end 100 \\
            --render placed/image
    """

    render: str | None = flag("volume to write with the placed sections", unset="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.render is not None:
            check_destination("--render", self.render)
            self.check_not_written("cv_path", self.render)
        if self.queue is not None:
            raise UsageError(
                f"--queue {self.queue}: workers do not place alone; give --workers or "
                "--shard, or align-stack --steps place --queue"
            )


@dataclass(frozen=True, kw_only=True)
class AlignStackRequest(SectionsRequest):
    """Flags of align-stack."""

    HELP = """Align all sections of a volume, and check the result.

    Steps: place finds where sections lie, pairs aligns each with its neighbours, relax
    turns the fields of pairs into one field a section, render writes the aligned
    volume, check measures what is left. The same command resumes a run that was
    stopped; with a larger --z_end it adds sections.

    Example:
        %(prog)s --cv_path sections --dst_path stack --pyramid_path pyramid \\
            --z_start 0 --z_end 100 --workers 2
    """

    GROUPS = ("", _SECTIONS, _PLACING, _ALIGNING, _VOLUME, _RUNNING, _TASKS)

    dst_path: str = flag("folder to write: image, field, check.json, report.html")
    pyramid_path: Path = flag("trained pyramid that aligns pairs of sections")
    checkpoint_name: str = _aligning("name of the pyramid's weights", "checkpoint")
    steps: list[str] = _aligning("steps to run", list(STEPS), choices=STEPS)
    neighbours: int = _aligning(
        "align each section with so many before it: crosses one bad section less",
        3,
        least=1,
    )
    masks: str | None = _aligning(
        "volume of masks of folds, cracks and dirt: 0 where there are none",
        unset="defects are found",
    )
    chunk_px: int = _tasks("side of the area of a task, px", 2048, least=64)
    block_sections: int = _tasks("sections of a task", 16, least=1)
    window_px: int = _tasks(
        "side of the area that the pyramid runs on at once, px; it needs the most "
        "memory of all",
        2048,
        least=64,
    )
    halo_px: int = _tasks(
        "pixels of each stage's mip around a window that the pyramid also reads",
        256,
        least=0,
    )
    smoothness: float = _aligning("how much bending costs", 1.0, least=0)
    device: str = _aligning("cpu, cuda or cuda:N", "cpu")
    mips: int = _volume("number of mips of the aligned volume", 4, least=1)
    encoding: str | None = _volume(
        "encoding of the aligned volume", unset="that of --cv_path"
    )
    chunk_size: list[int] | None = _volume(
        "chunks of the aligned volume, voxels along x, y, z",
        unset="those of --cv_path, if the area of a task consists of them",
        nargs=3,
        metavar=("X", "Y", "Z"),
    )
    layer: str | None = _volume(
        "also render this volume of the same raw sections, to DST_PATH/layers",
        unset="none",
    )
    nearest: bool = _volume("render --layer without interpolation: labels", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.again and self.shard is not None and len(self.steps) > 1:
            raise UsageError(
                "--again --shard: a step would begin while others still hold results "
                "of before; run one array for each step, --steps place and so on"
            )
        if not math.isfinite(self.smoothness):
            raise UsageError(f"--smoothness {self.smoothness}: expected a number")
        if self.nearest and self.layer is None:
            raise UsageError("--nearest: goes with --layer; give a layer of labels")
        folders = "image", "field", "pairs", "layers"
        written = [f"{self.dst_path.rstrip('/')}/{folder}" for folder in folders]
        for name in ("cv_path", "masks", "layer"):
            self.check_not_written(name, *written)

    def check_paths(self) -> None:
        super().check_paths()
        for name in ("masks", "layer"):
            check_exists(f"--{name}", getattr(self, name))
        find_modules(self.pyramid_path)


@dataclass(frozen=True, kw_only=True)
class WorkerRequest(Request):
    """Flags of worker."""

    HELP = """Do the tasks that align-stack --queue puts into a queue.

    Example:
        %(prog)s --queue fq://tasks --dst_path stack
    """

    queue: str = flag("queue to work on: fq://FOLDER or sqs://NAME", metavar="URL")
    dst_path: str = flag("destination of the stack; tasks of others are refused")
    wait: bool = flag("wait for new tasks for ever; else end with the queue", False)
    lease_s: int = flag(
        "seconds until a task of a dead worker comes back", 600, least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_queue(self.queue)
        check_destination("--dst_path", self.dst_path)


@dataclass(frozen=True, kw_only=True)
class CheckRequest(RunRequest):
    """Flags of check."""

    GROUPS = ("", _SECTIONS, _COMPARED, _RUNNING)
    HELP = """Measure how well neighbouring sections of a volume are aligned.

    The volume may be aligned by any program.

    Example:
        %(prog)s --cv_path stack/image --dst_path checked --pyramid_path pyramid
    """

    cv_path: str = flag("aligned volume, by any program")
    dst_path: str | None = flag(
        "folder for check.json and report.html", unset="the parent of --cv_path"
    )
    z_start: int | None = _sections("first section", unset="the volume's first")
    z_end: int | None = _sections("one past the last section", unset="the volume's end")
    mip: int = _sections("mip to measure at", 0, least=0)
    chunk_px: int = _sections("side of the area of a task, px", 2048, least=64)
    pyramid_path: Path | None = _compared(
        "pyramid whose own field between neighbours is measured", unset="none"
    )
    checkpoint_name: str = _compared("name of the pyramid's weights", "checkpoint")
    field_path: str | None = _compared(
        "volume of the fields that made it, for folds", unset="none"
    )
    field_mip: int | None = _compared(
        "mip of --field_path", unset="the one that it states, or its only one", least=0
    )
    before: str | None = _compared(
        "volume before it was aligned, to compare", unset="none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        start, end = self.z_start, self.z_end
        if start is not None and end is not None and end <= start:
            raise UsageError(
                f"--z_start {start} --z_end {end}: expected a section or more; --z_end "
                "is one past the last"
            )
        if self.field_mip is not None and self.field_path is None:
            raise UsageError(f"--field_mip {self.field_mip}: give --field_path, too")
        check_destination("--dst_path", self.destination)

    def check_paths(self) -> None:
        for name in ("cv_path", "field_path", "before"):
            check_exists(f"--{name}", getattr(self, name))
        if self.pyramid_path is not None:
            find_modules(self.pyramid_path)

    @property
    def destination(self) -> str:
        """The folder to write to."""
        if self.dst_path is not None:
            return self.dst_path
        return split_format(self.cv_path.rstrip("/"))[1].rpartition("/")[0] or "."


@dataclass(frozen=True, kw_only=True)
class ViewRequest(Request):
    """Flags of view."""

    HELP = """Show a volume in neuroglancer, at its worst places.

    The browser needs WebGL 2, but no network: this command serves the page. For a
    volume of align-stack, the raw volume is shown beside it.

    Example:
        %(prog)s --cv_path stack/image
    """

    cv_path: str = flag("volume to look at")
    before: str | None = flag(
        "volume to show beside it", unset="the raw one, for a volume of align-stack"
    )
    check: Path | None = flag(
        "check.json whose worst places are listed", unset="that beside --cv_path"
    )
    place: list[float] | None = flag(
        "where to look first, mip-0 pixels",
        unset="the worst place",
        nargs=3,
        metavar=("X", "Y", "Z"),
    )
    port: int | None = flag(
        "port of this machine that serves it", unset="a free one", least=1
    )

    def check_paths(self) -> None:
        if importlib.util.find_spec("neuroglancer") is None:
            raise UsageError(
                "metroem view: neuroglancer is not installed; get it with pip install "
                "neuroglancer"
            )
        check_exists("--cv_path", self.cv_path)
        check_exists("--before", self.before)
        if self.check is not None and not self.check.is_file():
            raise DatasetError(f"--check {self.check}: no such file")


_PAIR_PYRAMID, _PAIR_RESULTS = "pyramid", "results"
_pair_pyramid, _pair_results = map(flags_of_group, (_PAIR_PYRAMID, _PAIR_RESULTS))


@dataclass(frozen=True, kw_only=True)
class AlignImagesRequest(Request):
    """Flags of align.

    Raises:
        UsageError: a file to write has another ending than its kind, or is named twice.
    """

    GROUPS = ("", _PAIR_PYRAMID, _PAIR_RESULTS)
    HELP = """Align one image to another, and say how sure that is.

    The images are PNG, TIFF, .npy, or another kind that import reads, with pixels of
    the same size; 0 means no data. They may lie anywhere: what is far apart is placed
    first. Images that have nothing in common are refused, and nothing is written.

    Example:
        %(prog)s src.png tgt.png --output aligned.png --report report.html
    """

    src: Path = flag("image that is moved", is_positional=True)
    tgt: Path = flag("image that stays", is_positional=True)
    output: Path = flag(
        "image to write: src as it lies on tgt; .png, .tif or .npy",
        names=("--output", "-o"),
    )
    pyramid_path: Path | None = _pair_pyramid(
        "the trained pyramid", unset="the weights of the package"
    )
    checkpoint_name: str = _pair_pyramid("name of its weights", "checkpoint")
    mip: int = _pair_pyramid(
        "mip of the images: 0 if their pixels are as large as the pyramid's at mip 0",
        0,
        least=0,
    )
    no_finetune: bool = _pair_pyramid("use the networks alone, which is faster", False)
    field: Path | None = _pair_results(
        ".npy to write: (2, rows, cols) float32, px, from each pixel of the output to "
        "its place in src; channel 0 along cols",
        unset="none",
    )
    report: Path | None = _pair_results(
        "HTML file to write: both images, the field and the worst places", unset="none"
    )

    @property
    def written(self) -> list[Path]:
        """The files to write; the first is the image."""
        return [p for p in (self.output, self.field, self.report) if p is not None]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_checkpoint_name(self.checkpoint_name)
        if self.pyramid_path is None and self.checkpoint_name != "checkpoint":
            raise UsageError(
                f"--checkpoint_name {self.checkpoint_name}: expected --pyramid_path, "
                "the pyramid that has these weights, beside it"
            )
        for name, path, endings in (
            ("--output", self.output, (".png", ".tif", ".tiff", ".npy")),
            ("--field", self.field, (".npy",)),
            ("--report", self.report, (".html", ".htm")),
        ):
            if path is not None and path.suffix.lower() not in endings:
                raise UsageError(
                    f"{name} {path}: expected a name that ends with "
                    f"{' or '.join(endings)}"
                )
        if len(set(self.written)) < len(self.written):
            raise UsageError("--output, --field and --report: name different files")

    def check_paths(self) -> None:
        for name, path in (("SRC", self.src), ("TGT", self.tgt)):
            if not path.exists():
                raise DatasetError(f"{name} {path}: no such file; check the path")
        for path in self.written:
            if path.exists():
                raise UsageError(f"{path}: exists already; name another file")
        if self.pyramid_path is not None:
            find_modules(self.pyramid_path)


RequestT = TypeVar("RequestT", bound=SectionsRequest | CheckRequest)


def with_full_paths(request: RequestT) -> RequestT:
    """Make the paths of a request independent of the folder that it runs in.

    They are stored, and other processes read them. So two spellings of a path also mean
    the same.
    """
    names = "cv_path", "dst_path", "masks", "layer", "field_path", "before"
    names += ("pyramid_path",)
    paths = {name: getattr(request, name, None) for name in names}
    full = {
        name: path.resolve() if isinstance(path, Path) else cloud_path(path)
        for name, path in paths.items()
        if path is not None
    }
    return replace(request, **full)


def _without_format(path: str) -> str:
    return split_format(cloud_path(path))[1]
