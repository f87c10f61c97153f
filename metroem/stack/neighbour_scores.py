"""Compare each section with the one before it, window by window.

Windows lie side by side, `WINDOW_PX` long, from the corner of the area. They are
complete in themselves: nothing around them is used. So figures do not depend on how an
area is split into tasks.

Where the section before has no data, a window is compared with the one before that, up
to `LOOK_BACK` sections back: a blank section does not hide a jump.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.evaluation.metrics import chunked_correlation
from metroem.stack.jumps import SEARCH_PX, WINDOW_PX, measure_jumps

LOOK_BACK = 3
# Sections before the first one that is asked for: the one before it is compared, too,
# for the change of its displacement.
SECTIONS_BEFORE = LOOK_BACK + 1
CORRELATION_PX = 64
# Fraction of a window that must have data in both sections.
_MIN_FRACTION = 0.5
# A window whose mean correlation is this high fits at least roughly: it is not lost,
# even if its peak is not significant. Unrelated tissue has 0.0, give or take 0.1.
_FITS = 0.25
_BATCH = 64  # windows that are compared at a time: 50 MB of spectra


class NeighbourScores(NamedTuple):
    """A section against those before it; h x w windows.

    Attributes:
        z: the section.
        tissue: (H, W) bool, pixels with data.
        against: (h, w) int, how many sections back each window was compared; 0: there
            was nothing to compare.
        correlation: (h, w, 2, 2) float64, of each quarter of a window (squares of
            `CORRELATION_PX`); NaN if less than half of it has data.
        vectors: (h, w, 2) float64, displacement in px, channel 0 along cols; NaN where
            it is not known.
        jitter: (h, w) float64, px: length of the change of the displacement from the
            section before to this one; NaN where one of them is not known.
        lost: (h, w) bool, compared, but the two do not match within `SEARCH_PX`, nor do
            they correlate.
        image: (H, W) float32, 0 = no data.
        reference: (H, W) float32, what it was compared with.
    """

    z: int
    tissue: np.ndarray
    against: np.ndarray
    correlation: np.ndarray
    vectors: np.ndarray
    jitter: np.ndarray
    lost: np.ndarray
    image: Tensor
    reference: Tensor

    @property
    def jumps(self) -> np.ndarray:
        """(h, w) float64, length of the displacement, px; NaN where it is not known."""
        return np.hypot(self.vectors[..., 0], self.vectors[..., 1])

    @property
    def errors(self) -> np.ndarray:
        """(h, w) float64, as `jumps`, but `SEARCH_PX` where nothing matches."""
        return np.where(self.lost, SEARCH_PX, self.jumps)

    @property
    def num_alone(self) -> int:
        """Number of windows with data, but nothing to compare them with."""
        filled = _split(torch.from_numpy(self.tissue).float()).mean((2, 3)).numpy()
        return int(((filled >= _MIN_FRACTION) & (self.against == 0)).sum())


def score_sections(
    sections: Iterable[tuple[int, np.ndarray]], first: int
) -> Iterator[NeighbourScores]:
    """Compare consecutive sections of one area.

    Args:
        sections: z, one more each time, and (H, W) grey levels of any type, 0 = no
            data. They begin up to `SECTIONS_BEFORE` sections before `first`.
        first: the first section to yield.

    Yields:
        The scores of each section from `first` on.
    """
    history: list[Tensor] = []  # windows of the sections before, the last one first
    before: NeighbourScores | None = None
    for z, grey in sections:
        image = torch.from_numpy(grey.astype(np.float32))
        image = torch.where(torch.isfinite(image), image, 0.0)
        windows = _split(image)
        if z >= first - 1:
            before = _score(z, image, windows, history, before)
            if z >= first:
                yield before
        history = [windows, *history[: LOOK_BACK - 1]]


def _score(
    z: int,
    image: Tensor,
    windows: Tensor,
    history: list[Tensor],
    before: NeighbourScores | None,
) -> NeighbourScores:
    """Compare one section with those before it."""
    shape = windows.shape[:2]
    against = torch.zeros(shape, dtype=torch.int64)
    reference = torch.zeros_like(windows)
    for back, candidate in enumerate(history, start=1):
        overlap = ((windows != 0) & (candidate != 0)).float().mean((2, 3))
        is_chosen = (against == 0) & (overlap >= _MIN_FRACTION)
        against[is_chosen] = back
        reference[is_chosen] = candidate[is_chosen]
    correlation = torch.full((*shape, 2, 2), float("nan"), dtype=torch.float64)
    vectors = torch.full((*shape, 2), float("nan"), dtype=torch.float64)
    lost = torch.zeros(shape, dtype=torch.bool)
    compared = (against > 0).nonzero()
    for start in range(0, len(compared), _BATCH):
        at = compared[start : start + _BATCH].unbind(1)
        src, tgt = windows[at], reference[at]
        jumps = measure_jumps(src, tgt)
        known = torch.where(jumps.matched[:, None], jumps.vectors, float("nan"))
        quarters = chunked_correlation(
            src[:, None],
            tgt[:, None],
            ((src != 0) & (tgt != 0))[:, None],
            chunk_px=CORRELATION_PX,
            min_fraction=_MIN_FRACTION,
        )[:, 0]
        vectors[at], correlation[at] = known.double(), quarters
        lost[at] = jumps.lost & ~(quarters.nanmean((1, 2)) >= _FITS)
    change = np.full((*shape, 2), np.nan)
    if before is not None and before.z == z - 1:
        # A steady drift moves twice as far over two sections.
        steps = np.where(before.against > 0, before.against, 1)
        drift = before.vectors / steps[..., None]
        change = vectors.numpy() - against.numpy()[..., None] * drift
    return NeighbourScores(
        z,
        (image != 0).numpy(),
        against.numpy(),
        correlation.numpy(),
        vectors.numpy(),
        np.hypot(change[..., 0], change[..., 1]),
        lost.numpy(),
        image,
        _join(reference)[: image.shape[0], : image.shape[1]],
    )


def _split(image: Tensor) -> Tensor:
    """Split (H, W) into (h, w, WINDOW_PX, WINDOW_PX), the far borders filled with 0."""
    rows, cols = (-size % WINDOW_PX for size in image.shape)
    padded = F.pad(image, (0, cols, 0, rows))
    return padded.unfold(0, WINDOW_PX, WINDOW_PX).unfold(1, WINDOW_PX, WINDOW_PX)


def _join(windows: Tensor) -> Tensor:
    """Put windows together again: (h * WINDOW_PX, w * WINDOW_PX)."""
    down, across = windows.shape[:2]
    return windows.transpose(1, 2).reshape(down * WINDOW_PX, across * WINDOW_PX)
