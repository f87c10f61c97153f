"""Large sections aligned tile by tile, so that memory does not grow with them.

Tiles overlap. Near its border a tile knows less than the whole section does, so the
outer part of an overlap is thrown away, and over its middle one tile's field gives
way to the next one's. What is true of a whole section, such as its grey levels and
its defects, is found before it is cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.aligner import Aligner, Alignment
from metroem.errors import UsageError
from metroem.field_search import Finetuned
from metroem.finetuning import Defects, pair_maps
from metroem.nets.options import AlignerOptions

# Networks pool over blocks of so many pixels at most: tiles that begin elsewhere
# would cut other blocks than the whole section does.
BLOCK_PX = 256
# By how much a tile's src may lie beside its tgt, px, where the prior says so.
_SHIFT_PX = 64

# (1, 2, h, w) prior field of some rows and cols of a section, pixels.
PriorOf = Callable[[slice, slice], Tensor]


class Span(NamedTuple):
    """The rows, or the cols, of a tile."""

    place: slice
    weight: Tensor  # (n,) float32, what the tile counts at each; all spans sum to 1


class Window(NamedTuple):
    """One tile."""

    rows: Span
    cols: Span

    @property
    def place(self) -> tuple[slice, slice]:
        """Its rows and cols."""
        return self.rows.place, self.cols.place

    @property
    def weight(self) -> Tensor:
        """(h, w) float32, what it counts at each pixel; all tiles sum to 1."""
        return self.rows.weight[:, None] * self.cols.weight


@dataclass(frozen=True)
class Tiling:
    """How a section is cut.

    Attributes:
        tile_px: side of a tile, overlaps included; a multiple of 256. A section
            whose sides are no longer is not cut.
        overlap_px: that neighbours have in common; a multiple of 256, at most half
            of `tile_px`.

    Raises:
        UsageError: other sizes.
    """

    tile_px: int = 2048
    overlap_px: int = 512

    def __post_init__(self) -> None:
        tile, overlap = self.tile_px, self.overlap_px
        if tile % BLOCK_PX or overlap % BLOCK_PX or not 0 < 2 * overlap <= tile:
            raise UsageError(
                f"tiles of {tile} px that overlap by {overlap} px: expected multiples "
                f"of {BLOCK_PX} px, the overlap at most half of the tile, for example "
                "2048 and 512"
            )

    def cuts(self, shape: Sequence[int]) -> bool:
        """Whether a section of (H, W) px is cut at all."""
        return max(shape) > self.tile_px

    def windows(self, shape: Sequence[int]) -> list[Window]:
        """The tiles of a section of (H, W) px, row by row."""
        rows, cols = (self._spans(size) for size in shape)
        return [Window(row, col) for row in rows for col in cols]

    def _spans(self, size: int) -> list[Span]:
        step = self.tile_px - self.overlap_px
        starts = range(0, max(size - self.overlap_px, 1), step)
        return [self._span(start, size) for start in starts]

    def _span(self, start: int, size: int) -> Span:
        end = min(start + self.tile_px, size)
        at = torch.arange(start, end, dtype=torch.float64) + 0.5
        weight = torch.ones(end - start, dtype=torch.float64)
        if start > 0:
            weight *= self._rise(at - start)
        if end < size:
            weight *= 1 - self._rise(at - (end - self.overlap_px))
        return Span(slice(start, end), weight.float())

    def _rise(self, into: Tensor) -> Tensor:
        """From 0 to 1 over the middle half of an overlap, smooth at both ends."""
        share = ((into / self.overlap_px - 0.25) / 0.5).clamp(0, 1)
        return share.square() * (3 - 2 * share)


class TilePair(NamedTuple):
    """A pair too large to be aligned at once, on any device."""

    src: Tensor  # (1, 1, H, W), normalised as a whole, 0 = no data
    tgt: Tensor  # (1, 1, H, W)
    prior: PriorOf | None = None
    defects: Defects = (None, None)  # of src and tgt, (1, 1, H, W) bool


def align_by_tiles(
    aligner: Aligner,
    pair: TilePair,
    tiling: Tiling,
    device: torch.device,
    options: AlignerOptions | None = None,
) -> Alignment:
    """`Aligner.align_pair` tile by tile.

    Args:
        aligner: on `device`.
        pair: a section of any size.
        tiling: how it is cut.
        device: that tiles are moved to, one at a time.
        options: the module's own if None.

    Returns:
        The field, (1, 2, H, W), where the pair lies; and means over the tiles of
        what the finetuner gained.
    """
    options = options or aligner.options
    if options.finetune:
        maps = pair_maps(pair.src, pair.tgt, pair.defects, options)
        pair = pair._replace(defects=(maps.src_defects, maps.tgt_defects))
    size = pair.src.shape[-2:]
    field = pair.src.new_zeros(1, 2, *size)
    gains = []
    for window in tiling.windows(size):
        found = _align_tile(aligner, pair, window, device, options)
        field[(..., *window.place)] += found.field.to(field.device) * window.weight.to(
            field.device
        )
        gains += [found.finetuned] if found.finetuned else []
    return Alignment(field, _mean_gain(field, gains) if gains else None)


def _align_tile(
    aligner: Aligner,
    pair: TilePair,
    window: Window,
    device: torch.device,
    options: AlignerOptions,
) -> Alignment:
    """One tile; its src is cut from where the prior says that it lies."""
    rows, cols = window.place
    prior, shift = None, (0, 0)
    if pair.prior is not None:
        prior = pair.prior(rows, cols).to(device)
        shift = _whole_shift(prior)
        prior = prior - _as_field(shift, prior)
    tgt, tgt_defects = (
        _cut(one, window.place, (0, 0), device) for one in (pair.tgt, pair.defects[1])
    )
    src, src_defects = (
        _cut(one, window.place, shift, device) for one in (pair.src, pair.defects[0])
    )
    assert src is not None and tgt is not None
    found = aligner.align_pair(
        src, tgt, prior, options=options, defects=(src_defects, tgt_defects)
    )
    return found._replace(field=found.field + _as_field(shift, found.field))


def _whole_shift(prior: Tensor) -> tuple[int, int]:
    """The mean displacement along rows and cols, in whole steps, px."""
    d_cols, d_rows = (prior.mean((0, 2, 3)) / _SHIFT_PX).round().tolist()
    return int(d_rows) * _SHIFT_PX, int(d_cols) * _SHIFT_PX


def _as_field(shift: tuple[int, int], like: Tensor) -> Tensor:
    return like.new_tensor([shift[1], shift[0]]).view(1, 2, 1, 1)


def _cut(
    image: Tensor | None,
    place: tuple[slice, slice],
    shift: tuple[int, int],
    device: torch.device,
) -> Tensor | None:
    """A tile of an image, (1, C, h, w), 0 where it reaches beyond."""
    if image is None:
        return None
    inside, pad = [], []
    for axis, size, by in zip(place, image.shape[-2:], shift, strict=True):
        start, stop = axis.start + by, axis.stop + by
        kept = slice(min(max(start, 0), size), max(min(stop, size), 0))
        before = min(max(-start, 0), stop - start)
        inside.append(kept)
        pad = [before, stop - start - before - (kept.stop - kept.start), *pad]
    return F.pad(image[(..., *inside)].to(device), pad)


def _mean_gain(field: Tensor, gains: Sequence[Finetuned]) -> Finetuned:
    before, after = (
        torch.stack([getattr(one, name).cpu() for one in gains]).mean(0)
        for name in ("loss_before", "loss_after")
    )
    return Finetuned(field, before, after, max(one.iterations for one in gains))
