"""Run networks tile by tile on large sections.

A network needs several times the memory of its images; large sections go tile by tile.
Networks of the template `correlation` go through a section level by level, each level
by tiles of its own (`metroem.models.correlation_net_tiles`). Their result is that of
the whole section. Others, and modules that get no prior field, see one tile after
the other, as below. Such tiles overlap: near its border a tile knows less than the
whole section does, so the outer part of an overlap is thrown away, and over its
middle one tile's field gives way to the next one's.

All else is done to whole sections: grey levels, defects, and the search of the
finetuner. Finetuned each by itself, tiles would end up apart, since how much a field
may bend depends on how unlike all of the two sections are (0.09 px apart in the mean,
0.5 px at the 99th percentile, 2026-11).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.errors import UsageError
from metroem.models.types import Embedding, Prediction

# Networks pool over blocks of so many pixels at most: tiles that begin elsewhere
# would cut other blocks than the whole section does.
BLOCK_PX = 256
# By how much a tile's src may lie beside its tgt, px, where the prior says so.
_SHIFT_PX = 64


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
        tile_px: side of a tile with all that it is shown; a multiple of 256. A
            section whose sides are no longer is not cut.
        overlap_px: that neighbours have in common; a multiple of 256, at most half
            of `tile_px`. 7 / 16 of it are thrown away on each side. Networks of the
            template `correlation` do not read it: their tiles overlap as far as a
            level sees.

    Raises:
        UsageError: other sizes.
    """

    tile_px: int = 2048
    overlap_px: int = 768

    def __post_init__(self) -> None:
        tile, overlap = self.tile_px, self.overlap_px
        if tile % BLOCK_PX or overlap % BLOCK_PX or not 0 < 2 * overlap <= tile:
            raise UsageError(
                f"tiles of {tile} px that overlap by {overlap} px: expected multiples "
                f"of {BLOCK_PX} px, the overlap at most half of the tile, for example "
                "2048 and 768"
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
        """From 0 to 1 over the middle eighth of an overlap, smooth at both ends."""
        share = (8 * (into / self.overlap_px - 0.5) + 0.5).clamp(0, 1)
        return share.square() * (3 - 2 * share)


def predict_by_tiles(
    predict: Callable[..., Prediction],
    pair: tuple[Tensor, Tensor],
    prior: Tensor | None,
    tiling: Tiling,
    levels: tuple[int, ...] = (),
) -> Prediction:
    """What a network makes of a pair that it is shown tile by tile.

    Args:
        predict: `metroem.aligner.Aligner.predict`, or what behaves like it.
        pair: src and tgt, (B, 1, H, W), normalised as a whole, 0 = no data.
        prior: field of the stage before, (B, 2, H, W), pixels of src.
        tiling: how they are cut.
        levels: of the embeddings wanted; at most 8.

    Returns:
        Of the whole pair: the field, the embeddings, and the trust if the network
        has any.
    """
    src, tgt = pair
    joined: dict[str, Tensor] = {}
    for window in tiling.windows(src.shape[-2:]):
        rows, cols = window.place
        part = None if prior is None else prior[..., rows, cols]
        shift = (0, 0) if part is None else _whole_shift(part)
        if part is not None:
            part = part - _as_field(shift, part)
        there, here = _cut(src, window.place, shift), tgt[..., rows, cols]
        found = predict(there, here, part, levels=() if shift != (0, 0) else levels)
        embeddings = found.embeddings
        if levels and shift != (0, 0):  # those of src are wanted where it lies
            unmoved = src[..., rows, cols]
            embeddings = predict(unmoved, here, None, levels=levels).embeddings
        maps = {"field": (found.field + _as_field(shift, found.field), 0)}
        if found.trust is not None:
            maps["trust"] = (found.trust, 0)
        for level in levels:
            maps[f"src {level}"] = (embeddings[level].src, level)
            maps[f"tgt {level}"] = (embeddings[level].tgt, level)
        for name, (value, level) in maps.items():
            _add(joined, name, value, window, (src.shape[-2:], level))
    both = {n: Embedding(joined[f"src {n}"], joined[f"tgt {n}"]) for n in levels}
    return Prediction(joined["field"], both, trust=joined.get("trust"))


def _add(
    joined: dict[str, Tensor],
    name: str,
    value: Tensor,
    window: Window,
    where: tuple[Sequence[int], int],
) -> None:
    """Add a tile's share of a map, (B, C, h, w) of a level, to that of the whole."""
    shape, level = where
    size = 2**level
    if name not in joined:
        whole = [-(-side // size) for side in shape]
        joined[name] = value.new_zeros(*value.shape[:2], *whole, dtype=torch.float32)
    # Tiles begin at whole pixels of the level, and end there or with the section.
    rows, cols = (slice(s.start // size, -(-s.stop // size)) for s in window.place)
    weight = window.weight[None, None].to(value.device)
    weight = F.avg_pool2d(weight, size, ceil_mode=True, count_include_pad=False)
    joined[name][..., rows, cols] += value.float() * weight


def _whole_shift(prior: Tensor) -> tuple[int, int]:
    """The mean displacement along rows and cols, in whole steps, px."""
    d_cols, d_rows = (prior.mean((0, 2, 3)) / _SHIFT_PX).round().tolist()
    return int(d_rows) * _SHIFT_PX, int(d_cols) * _SHIFT_PX


def _as_field(shift: tuple[int, int], like: Tensor) -> Tensor:
    return like.new_tensor([shift[1], shift[0]]).view(1, 2, 1, 1)


def _cut(image: Tensor, place: tuple[slice, slice], shift: tuple[int, int]) -> Tensor:
    """A tile of an image, (B, C, h, w), 0 where it reaches beyond."""
    inside, pad = [], []
    for axis, size, by in zip(place, image.shape[-2:], shift, strict=True):
        start, stop = axis.start + by, axis.stop + by
        kept = slice(min(max(start, 0), size), max(min(stop, size), 0))
        before = min(max(-start, 0), stop - start)
        after = stop - start - before - max(kept.stop - kept.start, 0)
        inside.append(kept)
        pad = [before, after, *pad]
    return F.pad(image[(..., *inside)], pad)
