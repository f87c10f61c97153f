"""Run networks tile by tile on large sections.

A network needs several times the memory of its images; large sections go tile by tile.

Networks of the template `correlation` go through a section level by level, and each
level goes tile by tile (`metroem.models.correlation_net_tiles`). Their result is that
of the whole section.

This file runs the other networks, and modules that get no prior field. They see one
tile after the other. Tiles overlap, because a network sees less near the border of a
tile than in the whole section. The outer part of an overlap is dropped; over its
middle, the field changes smoothly from one tile's to the next tile's.

Normalisation, finding defects and finetuning work on whole sections. Tiles that are
finetuned separately would differ, since the finetuner's smoothness depends on how
unlike the two sections are as a whole (by 0.09 px in the mean, 0.5 px at the 99th
percentile, 2026-11).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.errors import UsageError
from metroem.models.types import Embedding, Prediction

# Largest blocks that networks pool over, px. Tiles begin where these blocks do, so that
# they have the same blocks as the whole section.
BLOCK_PX = 256
# A tile of src is moved against its tile of tgt in steps of this size, px, to follow
# the prior field.
_SHIFT_STEP_PX = 64


class Span(NamedTuple):
    """The rows, or the cols, of a tile."""

    location: slice
    weight: Tensor  # (n,) float32, of the tile at each pixel; all spans sum to 1


class Window(NamedTuple):
    """One tile: its location and weight."""

    rows: Span
    cols: Span

    @property
    def location(self) -> tuple[slice, slice]:
        """Its rows and cols."""
        return self.rows.location, self.cols.location

    @property
    def weight(self) -> Tensor:
        """(h, w) float32, its weight at each pixel; all tiles sum to 1."""
        return self.rows.weight[:, None] * self.cols.weight


@dataclass(frozen=True)
class Tiling:
    """How sections are split into tiles.

    Attributes:
        tile_px: side of a tile, its overlaps included; a multiple of 256. A section
            that fits into one tile is not split.
        overlap_px: width that neighbours have in common; a multiple of 256, at most
            half of `tile_px`. 7 / 16 of it are dropped on each side. Not used by
            networks of the template `correlation`, whose tiles overlap as far as a
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

    def splits(self, shape: Sequence[int]) -> bool:
        """Whether a section of (H, W) px is split at all."""
        return max(shape) > self.tile_px

    def windows(self, shape: Sequence[int]) -> list[Window]:
        """List the tiles of a section of (H, W) px, row by row."""
        rows, cols = (self._spans(size) for size in shape)
        return [Window(row, col) for row in rows for col in cols]

    def _spans(self, size: int) -> list[Span]:
        """Split one axis of `size` px."""
        step = self.tile_px - self.overlap_px
        starts = range(0, max(size - self.overlap_px, 1), step)
        return [self._span(start, size) for start in starts]

    def _span(self, start: int, size: int) -> Span:
        """Make the span that begins at `start`, with its weights."""
        end = min(start + self.tile_px, size)
        at = torch.arange(start, end, dtype=torch.float64) + 0.5
        weight = torch.ones(end - start, dtype=torch.float64)
        if start > 0:
            weight *= self._rise(at - start)
        if end < size:
            weight *= 1 - self._rise(at - (end - self.overlap_px))
        return Span(slice(start, end), weight.float())

    def _rise(self, into: Tensor) -> Tensor:
        """Rise smoothly from 0 to 1 over the middle eighth of an overlap."""
        fraction = (8 * (into / self.overlap_px - 0.5) + 0.5).clamp(0, 1)
        return fraction.square() * (3 - 2 * fraction)


def predict_tiled(
    predict: Callable[..., Prediction],
    pair: tuple[Tensor, Tensor],
    prior: Tensor | None,
    tiling: Tiling,
    levels: tuple[int, ...] = (),
) -> Prediction:
    """Run a network on a pair, tile by tile.

    Args:
        predict: `metroem.aligner.Aligner.predict`, or a function like it.
        pair: src and tgt, (B, 1, H, W), normalised as a whole, 0 = no data.
        prior: field of the earlier stage, (B, 2, H, W), pixels of src.
        tiling: how they are split.
        levels: levels of the embeddings to return; at most 8.

    Returns:
        The field and the embeddings of the whole pair, and its confidence if the
        network gives one.
    """
    src, tgt = pair
    joined: dict[str, Tensor] = {}
    for window in tiling.windows(src.shape[-2:]):
        rows, cols = window.location
        tile_prior = None if prior is None else prior[..., rows, cols]
        shift = (0, 0) if tile_prior is None else _mean_shift(tile_prior)
        if tile_prior is not None:
            tile_prior = tile_prior - _as_field(shift, tile_prior)
        is_shifted = shift != (0, 0)
        tile_src = _crop_shifted(src, window.location, shift)
        tile_tgt = tgt[..., rows, cols]
        found = predict(
            tile_src, tile_tgt, tile_prior, levels=() if is_shifted else levels
        )
        embeddings = found.embeddings
        if levels and is_shifted:  # embeddings of src are needed without the shift
            unmoved = src[..., rows, cols]
            embeddings = predict(unmoved, tile_tgt, None, levels=levels).embeddings
        maps = {"field": (found.field + _as_field(shift, found.field), 0)}
        if found.confidence is not None:
            maps["confidence"] = (found.confidence, 0)
        for level in levels:
            maps[f"src {level}"] = (embeddings[level].src, level)
            maps[f"tgt {level}"] = (embeddings[level].tgt, level)
        for name, (value, level) in maps.items():
            _add(joined, name, value, window, (src.shape[-2:], level))
    both = {n: Embedding(joined[f"src {n}"], joined[f"tgt {n}"]) for n in levels}
    return Prediction(joined["field"], both, confidence=joined.get("confidence"))


def _add(
    joined: dict[str, Tensor],
    name: str,
    value: Tensor,
    window: Window,
    where: tuple[Sequence[int], int],
) -> None:
    """Add a tile of a map, (B, C, h, w) of a level, times its weight to the whole."""
    shape, level = where
    size = 2**level
    if name not in joined:
        whole = [-(-side // size) for side in shape]
        joined[name] = value.new_zeros(*value.shape[:2], *whole, dtype=torch.float32)
    # Tiles begin at whole pixels of the level, and end there or with the section.
    rows, cols = (slice(s.start // size, -(-s.stop // size)) for s in window.location)
    weight = window.weight[None, None].to(value.device)
    weight = F.avg_pool2d(weight, size, ceil_mode=True, count_include_pad=False)
    joined[name][..., rows, cols] += value.float() * weight


def _mean_shift(prior: Tensor) -> tuple[int, int]:
    """Round the mean displacement along rows and cols to whole steps, px."""
    d_cols, d_rows = (prior.mean((0, 2, 3)) / _SHIFT_STEP_PX).round().tolist()
    return int(d_rows) * _SHIFT_STEP_PX, int(d_cols) * _SHIFT_STEP_PX


def _as_field(shift: tuple[int, int], like: Tensor) -> Tensor:
    """Turn a shift along rows and cols into a field, (1, 2, 1, 1)."""
    return like.new_tensor([shift[1], shift[0]]).view(1, 2, 1, 1)


def _crop_shifted(
    image: Tensor, location: tuple[slice, slice], shift: tuple[int, int]
) -> Tensor:
    """Crop a shifted tile of an image, (B, C, h, w), 0 beyond the image."""
    inside, pad = [], []
    for axis, size, by in zip(location, image.shape[-2:], shift, strict=True):
        start, stop = axis.start + by, axis.stop + by
        part = slice(min(max(start, 0), size), max(min(stop, size), 0))
        before = min(max(-start, 0), stop - start)
        after = stop - start - before - max(part.stop - part.start, 0)
        inside.append(part)
        pad = [before, after, *pad]
    return F.pad(image[(..., *inside)], pad)
