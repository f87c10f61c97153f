"""What downloads of images and of fields share: resuming, masks, blank sections."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

import h5py
import numpy as np
import torch

from metroem.errors import DatasetError
from metroem.grid import Grid
from metroem.io.parts import PartStore, differences, parts_folder
from metroem.io.volume import WHAT_TO_CHECK, Volume, cut, read_sections
from metroem.normalize import looks_normalized, tissue_statistics

logger = logging.getLogger(__name__)

# A section that is blanker than this is named in the log.
_MUCH = 0.5


def already_there(path: Path, wanted: Mapping, *, overwrite: bool) -> bool:
    """Whether the file that a request asks for is there, made from that request.

    Raises:
        DatasetError: a file of that name was made from other arguments, and
            `overwrite` is not given.
    """
    if overwrite or not path.exists():
        return False
    try:
        with h5py.File(path, "r") as file:
            found = file.attrs.get("request")
    except OSError:
        found = None
    if not isinstance(found, str):
        raise DatasetError(
            f"{path}: is there already and does not say how it was made; give "
            "--overwrite to replace it, or write elsewhere"
        )
    if unlike := differences(json.loads(found), wanted):
        raise DatasetError(
            f"{path}: is there already, made with other arguments: {unlike}; give "
            "--overwrite to replace it, or write elsewhere"
        )
    logger.info("%s: is there already, nothing to do", path)
    return True


def open_parts(path: Path, wanted: Mapping, *, overwrite: bool) -> PartStore:
    """The parts of the file to be, those of a run that was killed among them.

    Raises:
        DatasetError: there are parts made from other arguments, and `overwrite`
            is not given.
    """
    folder = parts_folder(path)
    try:
        store = PartStore(folder, wanted)
    except DatasetError:
        if not overwrite:
            raise
        logger.info("%s: replaced, made with other arguments", folder)
        PartStore.discard(folder)
        store = PartStore(folder, wanted)
    if done := len(store.keys()):
        logger.info("%s: goes on with %d parts that were finished", path, done)
    return store


class DefectMask:
    """A volume that marks folds, cracks and dirt.

    Its scales and coordinates are those of the volume that it belongs to. A mip
    that it does not have is made from the next finer one, or else from the next
    coarser one; a mip that is in its info but was never written reads as "no
    defect".

    Attributes:
        volume: whose values are compared.
        value: values >= this are defects.

    Raises:
        DatasetError: it cannot be opened, or none of its scales is a mip of the
            volume that it belongs to.
    """

    def __init__(self, path: str, value: float, of: Volume) -> None:
        self.volume = Volume(path, flag="--cv_path_defects", resolution=of.resolution)
        self.volume.check_channels(1, "a defect mask")
        self.value, self._of = value, of

    def check(self, mip: int, windows: Mapping[int, Grid]) -> None:
        """Refuse a mask that does not reach over what is masked by it.

        Args:
            mip: of what is masked.
            windows: by z, what is read of the volume that the mask belongs to.

        Raises:
            DatasetError: so, or the mask lies elsewhere.
        """
        source = self._source_mip(mip)
        self.volume.check_mip("mip", source)
        self.volume.check_lies_on(self._of, source)
        self.volume.check_sections(range(min(windows), max(windows) + 1), source)
        for window in set(windows.values()):
            if (inside := self._of.clip(window)) is not None:
                self.volume.check_covers(inside, "what is masked", at=source)

    def _source_mip(self, mip: int) -> int:
        """The mip of the mask that is read for a mip of what is masked."""
        finer = [m for m in self.volume.mips if m <= mip]
        return finer[-1] if finer else self.volume.mips[0]

    def fetch(
        self, store: PartStore, windows: Mapping[int, Grid], prefix: str, parallel: int
    ) -> None:
        """Read the mask of some sections into the store; see `load`.

        Args:
            store: keeps a (H, W) bool part a section.
            windows: by z, the area wanted.
            prefix: of the keys.
            parallel: reads at a time.
        """
        missing = {
            z: grid.cover(self._source_mip(grid.mip))
            for z, grid in windows.items()
            if not store.has(f"{prefix}-{z}")
        }

        def take(z: int, layers: np.ndarray) -> None:
            marked = layers[0] >= self.value
            store.put(f"{prefix}-{z}", marks_on(windows[z], marked, missing[z]))

        what = f"{store.folder.name[1:-6]}: defect mask, layers of chunks"
        read_sections(self.volume, missing, take, parallel=parallel, what=what)


def marks_on(window: Grid, marked: np.ndarray, source: Grid) -> np.ndarray:
    """Bring a mask to the pixels of another mip.

    Args:
        window: area wanted.
        marked: (H, W) bool on `source`.
        source: covers `window` on whole pixels of its own mip.

    Returns:
        (window.rows, window.cols) bool: where any finer pixel is marked, or the
        coarser one is.
    """
    levels = source.mip - window.mip
    if levels <= 0:
        rows, cols = window.shape
        blocks = marked.reshape(rows, 1 << -levels, cols, 1 << -levels)
        return np.asarray(blocks.any((1, 3)))
    fine = marked.repeat(1 << levels, 0).repeat(1 << levels, 1)
    grid = Grid(window.mip, source.x, source.y, fine.shape[0], fine.shape[1])
    return cut(fine, grid, window)


def warn_of_integers(volume: Volume, cure: str) -> None:
    """Say before anything is read that images will not be normalised.

    Args:
        volume: of images that are kept as stored.
        cure: what is to be given.
    """
    if volume.dtype.kind in "iu":
        logger.warning(
            "%s %s: is %s and is kept as stored, which train.py refuses; give %s, or "
            "normalise the files yourself",
            *(volume.flag, volume.path, volume.dtype, cure),
        )


def warn_unless_normalized(
    path: PurePath, images: Iterable[np.ndarray], cure: str
) -> None:
    """Say that images that are kept as stored are not normalised.

    Args:
        path: the file in the making.
        images: as stored; the first that has tissue is looked at.
        cure: what is to be given.
    """
    found = (tissue_statistics(torch.from_numpy(np.array(image))) for image in images)
    first = next((statistics for statistics in found if statistics), None)
    if first is not None and not looks_normalized(first):
        logger.warning(
            "%s: not normalised: tissue has mean %.3g and std %.3g, expected 0 and 1; "
            "train.py refuses it; give %s",
            *(path.name, first.mean, first.std, cure),
        )


def report_masked(name: str, store: PartStore, prefix: str) -> None:
    """Log how much a defect mask covers; warn when that is nothing."""
    keys = [key for key in store.keys() if key.startswith(f"{prefix}-")]
    share = float(np.mean([store.load(key).mean() for key in keys]))
    if share:
        logger.info("%s: %.2f%% masked as defects", name, 100 * share)
    else:
        logger.warning(
            "%s: --cv_path_defects marks nothing here; is it written at this mip, and "
            "is --mask_val right?",
            name,
        )


def report_blank(
    path: PurePath, source: str, shares: Mapping[int, float], what: str = "sections"
) -> None:
    """Log how much of the sections is blank, and name those that mostly are.

    Args:
        path: the file in the making.
        source: the volume that was read.
        shares: by z (or what else is counted), the share of pixels without data.
        what: is counted.

    Raises:
        DatasetError: all of every one is blank.
    """
    if min(shares.values()) == 1:
        raise DatasetError(
            f"{path}: all {len(shares)} {what} of {source} are blank here; "
            f"{WHAT_TO_CHECK}"
        )
    values = list(shares.values())
    logger.info(
        "%s: %d %s, blank %.1f%% (%.1f%%...%.1f%%)",
        *(path.name, len(values), what),
        *(100 * float(value) for value in (np.mean(values), min(values), max(values))),
    )
    if mostly := {z: share for z, share in shares.items() if share > _MUCH}:
        named = ", ".join(f"{z} ({share:.0%})" for z, share in sorted(mostly.items()))
        logger.warning("%s: mostly blank: %s %s", path.name, what, named)
