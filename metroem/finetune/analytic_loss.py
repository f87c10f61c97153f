"""The loss of a field on the features of its pair, with its gradient written out.

Everything that a step reads of src lies in one table, which is gathered from once: the
four neighbours of a place give the value there and both of its slopes. On a CPU this
goes by blocks of rows that stay in its cache. Nothing waits for the host, so that a GPU
is kept busy.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.errors import first_line
from metroem.geometry.rigidity import BORDER_PX as RIGIDITY_BORDER_PX
from metroem.geometry.rigidity import (
    NUM_NEIGHBOURS,
    inside_border,
    row_blocks,
    weighted_rigidity,
)
from metroem.imaging.loss_weights import PairWeight

logger = logging.getLogger(__name__)

# Beyond the outermost pixels and their neighbours all places read the same.
_PAD = 2
# Rows of 512 px and 9 maps at which a CPU is fastest: 16 and 64 take 1.1 times as
# long, all rows at once 1.5 times (2026-11).
_BLOCK_PX = 32 * 512
_FEW_STEPS = 10


@dataclass(frozen=True)
class AdamOptions:
    """How a field is finetuned.

    Attributes:
        smoothness: factor of rigidity.
        rate_px: rate of the first steps, pixels a step.
        num_iter: at most so many steps.
        border: px left out of the loss on each side.
        l2: factor of the mean squared displacement.
        patience: steps without a new best after which the rate is halved.
        max_halvings: a sample ends after so many.
        max_grad_norm: gradients are clipped to this norm, per sample.
        coarseness: what is added to the field is found so many levels coarser,
            so that it bends over 2**coarseness pixels; `rate_px` is then in
            those coarser pixels. Detail of the field itself stays.
        weight_decay: of the field, as torch.optim.Adam has it.
        momentum: None for Adam; a number for gradient descent with it.
    """

    smoothness: float = 30.0
    rate_px: float = 0.1
    num_iter: int = 100
    border: int = 1
    l2: float = 1e-4
    patience: int = 50
    max_halvings: int = 15
    max_grad_norm: float = 0.49
    coarseness: int = 0
    weight_decay: float = 0.0
    momentum: float | None = None

    @property
    def at_several_scales(self) -> bool:
        """Whether changes of several scales are searched for at once.

        By Adam, unless a coarseness is asked for.
        """
        return self.momentum is None and self.coarseness == 0

    @property
    def num_steps(self) -> int:
        """Steps that are made for `num_iter`.

        Those at several scales go so far that a third of them end lower
        (`metroem.finetune.adam`); few are made as they are.
        """
        if not self.at_several_scales:
            return self.num_iter
        return min(self.num_iter, max(_FEW_STEPS, -(-self.num_iter // 3)))


class AnalyticLoss:
    """Similarity + smoothness * rigidity + l2 * mean(field^2), per sample.

    The same numbers as `metroem.loss` gives for a batch of one. The weights of src
    follow the field, and their slopes are part of the gradient, as in the original:
    without them the search ended up to 4 % above it (512 px, 2026-11).
    """

    def __init__(
        self,
        features: tuple[Tensor, Tensor],
        weights: tuple[PairWeight, PairWeight],
        options: AdamOptions,
    ) -> None:
        """Keep what is constant over the search.

        Args:
            features: of src and tgt, (B, C, H, W), float32 or float64.
            weights: of similarity and of rigidity.
            options: see `AdamOptions`.
        """
        src, tgt = features
        self.options = options
        self._num_features = src.shape[1]
        # Features first, then the samples: a block of rows is whole planes then.
        self._tgt = tgt.transpose(0, 1).contiguous()
        similarity, smoothness = weights
        inside = [inside_border(w.tgt, options.border) for w in weights]
        # Where the rigidity of the original is 0 it counts in the mean.
        self._defined = inside_border(torch.ones_like(inside[1]), RIGIDITY_BORDER_PX)
        self._tgt_weights = torch.cat(inside, 1).transpose(0, 1).contiguous()
        src_weights = torch.cat((similarity.src, smoothness.src), 1)
        # Whole tissue is the rule, and warping ones gives ones.
        self._moving = not bool((src_weights == 1).all())
        self._table = _table(src, src_weights if self._moving else None)
        self._places = _places(src)

    def with_gradient(self, field: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, (B,), of a field, (B, 2, H, W) px, and its gradient."""
        if can_use_triton(field):
            return self._by_kernels(field)
        with torch.no_grad():
            options = self.options
            found = self._compare(field)
            totals = found.weights.sum((2, 3))
            shares = 1 / torch.where(totals > 0, totals, 1.0)
            shares[0] /= self._num_features
            shares[1] *= options.smoothness / NUM_NEIGHBOURS
            gradient = found.gradient.mul_(per_sample(2 * shares[0]))
            share = found.weights[1][:, None] * self._defined
            strain, pull = weighted_rigidity(field, share, found.strain)
            gradient += pull.mul_(per_sample(2 * shares[1]))
            costs = torch.stack((found.value, strain)) * shares
            if self._moving:
                self._add_slopes(gradient, found, shares, costs)
            value = costs.sum(0)
            if options.l2:
                size = field[0].numel()
                gradient.add_(field, alpha=2 * options.l2 / size)
                squares = field.square().sum((1, 2, 3)) / size
                value += options.l2 * squares
            return value, gradient

    def _by_kernels(self, field: Tensor) -> tuple[Tensor, Tensor]:
        from metroem.finetune import triton_kernels

        tgt = self._tgt, self._tgt_weights
        pair = triton_kernels.Constants(
            self._table, *tgt, self._defined, _PAD, self._moving
        )
        options = self.options
        factors = triton_kernels.Factors(options.smoothness, NUM_NEIGHBOURS, options.l2)
        return triton_kernels.loss_and_gradient(field, pair, factors)

    def _add_slopes(
        self, gradient: Tensor, found: "_Compared", shares: Tensor, costs: Tensor
    ) -> None:
        """Add what the loss changes by where the weights move.

        A mean changes with a weight by how far the pixel is above the mean.

        Args:
            gradient: (B, 2, H, W), pixels; added to.
            found: of the field.
            shares: of a weighed pixel in each mean, (2, B).
            costs: both means, (2, B), as they are in the loss.
        """
        strain = found.strain[:, 0].mul_(self._defined[:, 0])
        totals = found.weights.sum((2, 3))
        means = costs / torch.where(totals > 0, totals, 1.0)
        for which, squares in enumerate((found.squares, strain)):
            above = squares.mul_(shares[which][:, None, None])
            above -= means[which][:, None, None]
            gradient.addcmul_(above[:, None], found.slopes[which])

    def _compare(self, field: Tensor) -> "_Compared":
        """src as the field has it beside tgt."""
        maps = field.new_zeros if self._moving else field.new_empty
        size = field.shape[-2:] if self._moving else (0, 0)
        found = _Compared(
            field.new_zeros(len(field)),
            torch.empty_like(field),
            torch.empty_like(self._tgt_weights) if self._moving else self._tgt_weights,
            maps(len(field), *size),
            maps(len(field), 1, *size),
            maps(2, len(field), 2, *size),
        )
        for block in row_blocks(field, _BLOCK_PX):
            self._compare_block(field, block, found)
        return found

    def _compare_block(
        self, field: Tensor, block: tuple[slice, slice], found: "_Compared"
    ) -> None:
        samples, rows = block
        num = self._num_features
        sampled, d_cols, d_rows = self._read(field, block)
        tgt_weights = self._tgt_weights[:, samples, rows]
        difference = sampled[:num]
        difference -= self._tgt[:, samples, rows]
        weights = tgt_weights
        if self._moving:
            weights = found.weights[:, samples, rows]
            torch.mul(sampled[num:], tgt_weights, out=weights)
            found.squares[samples, rows] = difference.square().sum(0)
            for axis, slope in enumerate((d_cols, d_rows)):
                slopes = found.slopes[:, samples, axis, rows]
                torch.mul(slope[num:], tgt_weights, out=slopes)
        weighted = difference * weights[0]
        found.gradient[samples, 0, rows] = d_cols[:num].mul_(weighted).sum(0)
        found.gradient[samples, 1, rows] = d_rows[:num].mul_(weighted).sum(0)
        dots = _dot(weighted.transpose(0, 1), difference.transpose(0, 1))
        found.value[samples] += dots

    def _read(
        self, field: Tensor, block: tuple[slice, slice]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """src, and its weights, where a block of the field points.

        Returns:
            Features and weights, (C or C + 2, b, h, W), and their slopes along cols
            and rows, likewise.
        """
        index, col, row = self._nearest(field, block)
        width = field.shape[-1] + 2 * _PAD

        def pick(ahead: int) -> Tensor:
            picked = self._table.index_select(1, index + ahead if ahead else index)
            return picked.unflatten(1, col.shape)

        above, d_above = pick(0), pick(1)
        d_above -= above
        above.addcmul_(d_above, col)
        below, d_below = pick(width), pick(width + 1)
        d_below -= below
        below.addcmul_(d_below, col)
        below -= above
        above.addcmul_(below, row)
        d_below -= d_above
        d_above.addcmul_(d_below, row)
        return above, d_above, below

    def _nearest(
        self, field: Tensor, block: tuple[slice, slice]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where in the table to read.

        Returns:
            The pixel above and left of each place, flat, and how far along cols and
            rows the place lies beyond it, (b, h, W) each.
        """
        samples, rows = block
        height, width = (size + 2 * _PAD for size in field.shape[-2:])
        place = field[samples, :, rows] + self._places[:, :, rows]
        col, row = place.nan_to_num_(0.0).unbind(1)
        left = col.clamp_(0, width - 2).floor()
        top = row.clamp_(0, height - 2).floor()
        col -= left
        row -= top
        index = left.to(torch.int32).add_(top.to(torch.int32), alpha=width)
        if samples.start or samples.stop > 1:
            first = torch.arange(
                samples.start, samples.stop, dtype=torch.int32, device=field.device
            ).mul_(height * width)
            index += first[:, None, None]
        return index.flatten(), col, row


class _Compared(NamedTuple):
    """What comes of comparing src as a field has it with tgt, before means are taken.

    The last three are empty where the weights do not move.
    """

    value: Tensor  # (B,) weighed squares
    gradient: Tensor  # (B, 2, H, W) half of theirs, but for the weights' own
    weights: Tensor  # (2, B, H, W) of similarity and of rigidity
    squares: Tensor  # (B, H, W) of the features, their sum
    strain: Tensor  # (B, 1, H, W) sum over springs, filled in by `weighted_rigidity`
    slopes: Tensor  # (2, B, 2, H, W) of both weights, along cols and rows


def per_sample(values: Tensor) -> Tensor:
    """Shape one number a sample, (B,), so that it multiplies maps: (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, C, h, w) twice -> (B,)."""
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def _table(src: Tensor, weights: Tensor | None) -> Tensor:
    """What is read of src, (C or C + 2, B * padded pixels).

    Beyond the border features are 0 and weights go on.
    """
    around = (_PAD,) * 4
    maps = F.pad(src, around)
    if weights is not None:
        weights = F.pad(weights, around, mode="replicate").to(maps.dtype)
        maps = torch.cat((maps, weights), 1)
    return maps.transpose(0, 1).flatten(1).contiguous()


def _places(like: Tensor) -> Tensor:
    """(1, 2, H, W): col and row of each pixel in the padded map."""
    rows, cols = (
        torch.arange(size, device=like.device, dtype=like.dtype) + _PAD
        for size in like.shape[-2:]
    )
    row, col = torch.meshgrid(rows, cols, indexing="ij")
    return torch.stack([col, row])[None]


def can_use_triton(field: Tensor) -> bool:
    """Whether kernels can be used for a field, (B, 2, H, W), where it is."""
    is_float = field.dtype == torch.float32
    return field.is_cuda and is_float and _kernels_work(field.device)


@cache
def _kernels_work(device: torch.device) -> bool:
    """Triton comes with torch for GPUs, but needs a C compiler beside it."""
    try:
        from metroem.finetune import triton_kernels

        triton_kernels.coarser(torch.zeros(1, 2, 2, 2, device=device), 2)
    except Exception as error:  # it raises whatever its parts raise
        logger.warning(
            "fields are finetuned 6 to 13 times slower than they could be, since "
            "Triton does not work on this machine: %s. It needs a C compiler, for "
            "example apt install gcc",
            first_line(error),
        )
        return False
    return True
