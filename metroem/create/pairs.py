"""A data set from a spec: pairs at any places and distances."""

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from metroem.create.cutouts import Cutter
from metroem.create.pair_files import PairFiles, image_path
from metroem.create.pair_volumes import PairVolumes
from metroem.create.requests import DatasetRequest
from metroem.create.spec import Center, load_spec
from metroem.io.lock import holding, lock_path
from metroem.io.paths import local_folder
from metroem.progress import in_threads

logger = logging.getLogger(__name__)


def make_dataset(request: DatasetRequest) -> None:
    """Make the data set of a spec, unless it is there.

    Each cut-out is kept when it is made, so a run that was killed goes on where
    it was, and ends with the same bytes.

    Raises:
        DatasetError: a volume does not hold what is asked for, all of it is blank,
            or something is there that another spec made; or a pair is not what was
            written, if that is checked.
        UsageError: the spec cannot be read.
        StorageError: another run makes it, or the disk is full.
    """
    cutter = Cutter(load_spec(request.spec_path))
    # Everything is checked before anything is read.
    cutter.check()
    with _claimed(request.dst_path, cutter):
        _make(request, cutter)


def _claimed(dst_path: str, cutter: Cutter) -> AbstractContextManager[None]:
    """The lock of what is made; cloud storage has none."""
    folder = local_folder(dst_path)
    if folder is None:
        return nullcontext()
    is_volume = "://" in dst_path
    return holding(lock_path(folder if is_volume else image_path(cutter.spec, folder)))


def _make(request: DatasetRequest, cutter: Cutter) -> None:
    if "://" in request.dst_path:
        made = PairVolumes(cutter, request.dst_path, overwrite=request.overwrite)
    else:
        folder = Path(request.dst_path).expanduser()
        made = PairFiles(
            cutter, folder, request.checkpoint_name, overwrite=request.overwrite
        )
    if not made.is_finished:
        _make_missing(made, cutter, request)
    if request.verify and isinstance(made, PairFiles):
        made.check()


def _make_missing(
    made: PairFiles | PairVolumes, cutter: Cutter, request: DatasetRequest
) -> None:
    def work(batch: list[Center]) -> None:
        if missing := [center for center in batch if not made.has(center)]:
            for center, cutout in cutter.make(missing):
                made.put(center, cutout)

    what = f"{request.dst_path}: batches of cut-outs"
    in_threads(cutter.batches(), work, what, threads=request.parallel)
    made.finish()
