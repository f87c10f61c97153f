"""Compute the loss of a field on the features of its pair, and its gradient.

For a field f, features src_c and tgt_c, and weights w_s (of similarity) and w_r (of
rigidity):

    e_c(p)  = src_c(p + f(p)) - tgt_c(p)
    w(p)    = w_src(p + f(p)) * w_tgt(p)                           for both weights
    S       = sum_p w_s(p) sum_c e_c(p)^2 / (C sum_p w_s(p))       similarity
    R       = sum_p w_r(p) strain(p) / (8 sum_p w_r(p))            rigidity
    loss    = S + smoothness * R + l2 * mean(f^2)

strain(p) is the sum of stretch^2 over the 8 springs of a pixel
(`metroem.geometry.rigidity`), 0 within 2 px of the border. Autograd is not used:

    dS/df(p) = 2 w_s(p) sum_c e_c(p) grad src_c(p + f(p)) / (C sum w_s)
               + (sum_c e_c(p)^2 / C - S) / sum w_s * grad w_s(p)

and R likewise gets a second term from the slope of w_r.

All maps of src lie in one table. The four pixels around a location give the value and
its slopes along cols and rows. A CPU works on blocks of rows that stay in its cache.
Nothing waits for the host, so a GPU is kept busy.
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

# Width of the border of the table, px. All locations further out read the same.
_PAD = 2
# Pixels of a block, for the speed of a CPU: 32 rows of 512 px with 9 maps. 16 and 64
# rows take 1.1 times as long, all rows at once 1.5 times (2026-11).
_BLOCK_PX = 32 * 512
_MIN_STEPS = 10  # at several scales


@dataclass(frozen=True)
class AdamOptions:
    """Options of finetuning by Adam.

    Attributes:
        smoothness: factor of rigidity.
        rate_px: rate of the first steps, pixels a step.
        num_iter: limit of steps, as the original counts them; see `num_steps`.
        border: px left out of the loss on each side.
        l2: factor of the mean squared displacement.
        patience: steps without a new best after which the rate is halved.
        max_halvings: a sample is finished after this number of halvings.
        max_grad_norm: gradients are clipped to this norm, per sample.
        coarseness: level of the change that is added to the field. The change bends
            over 2**coarseness pixels, and `rate_px` is in pixels of that level. Detail
            of the start field stays.
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
        """Whether changes of several scales are optimised at once.

        Adam does so unless `coarseness` is given.
        """
        return self.momentum is None and self.coarseness == 0

    @property
    def num_steps(self) -> int:
        """Number of steps for `num_iter`.

        At several scales a third of `num_iter` ends lower than all of them at one scale
        (`metroem.finetune.adam`). At least 10 are made, if `num_iter` allows.
        """
        if not self.at_several_scales:
            return self.num_iter
        return min(self.num_iter, max(_MIN_STEPS, -(-self.num_iter // 3)))


class AnalyticLoss:
    """Similarity + smoothness * rigidity + l2 * mean(field^2), per sample.

    See the equations at the head of the file. For a batch of one, `metroem.loss` gives
    the same numbers. The weights of src move with the field, and their slopes are part
    of the gradient, as in the original. Without the slopes the search ended up to 4 %
    above the original's (512 px, 2026-11).
    """

    def __init__(
        self,
        features: tuple[Tensor, Tensor],
        weights: tuple[PairWeight, PairWeight],
        options: AdamOptions,
    ) -> None:
        """Prepare the maps that are constant over a search.

        Args:
            features: features of src and tgt, (B, C, H, W), float32 or float64.
            weights: weights of similarity and of rigidity.
            options: see `AdamOptions`.
        """
        src, tgt = features
        self.options = options
        self._num_features = src.shape[1]
        # Channels first, then samples: a block of rows is contiguous in each channel.
        self._tgt = tgt.transpose(0, 1).contiguous()
        similarity, smoothness = weights
        inside = [inside_border(w.tgt, options.border) for w in weights]
        # The original sets rigidity to 0 near the border, but counts it in the mean.
        self._defined = inside_border(torch.ones_like(inside[1]), RIGIDITY_BORDER_PX)
        self._tgt_weights = torch.cat(inside, 1).transpose(0, 1).contiguous()
        src_weights = torch.cat((similarity.src, smoothness.src), 1)
        # Weights of src are often all 1. Warping them then changes nothing.
        self._has_moving_weights = not bool((src_weights == 1).all())
        moving = src_weights if self._has_moving_weights else None
        self._table = _make_table(src, moving)
        self._pixels = _table_positions(src)

    def with_gradient(self, field: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss of a field, (B, 2, H, W) px: (B,), and its gradient."""
        if can_use_triton(field):
            return self._with_gradient_triton(field)
        with torch.no_grad():
            options = self.options
            terms = self._pixel_terms(field)
            totals = terms.weights.sum((2, 3))
            factors = 1 / torch.where(totals > 0, totals, 1.0)
            factors[0] /= self._num_features
            factors[1] *= options.smoothness / NUM_NEIGHBOURS
            gradient = terms.gradient.mul_(per_sample(2 * factors[0]))
            rigidity_weight = terms.weights[1][:, None] * self._defined
            strain, half_gradient = weighted_rigidity(
                field, rigidity_weight, terms.strain
            )
            gradient += half_gradient.mul_(per_sample(2 * factors[1]))
            costs = torch.stack((terms.value, strain)) * factors
            if self._has_moving_weights:
                self._add_weight_slopes(gradient, terms, factors, costs)
            value = costs.sum(0)
            if options.l2:
                size = field[0].numel()
                gradient.add_(field, alpha=2 * options.l2 / size)
                squares = field.square().sum((1, 2, 3)) / size
                value += options.l2 * squares
            return value, gradient

    def _with_gradient_triton(self, field: Tensor) -> tuple[Tensor, Tensor]:
        from metroem.finetune import triton_kernels

        tgt = self._tgt, self._tgt_weights
        pair = triton_kernels.Constants(
            self._table, *tgt, self._defined, _PAD, self._has_moving_weights
        )
        options = self.options
        factors = triton_kernels.Factors(options.smoothness, NUM_NEIGHBOURS, options.l2)
        return triton_kernels.loss_and_gradient(field, pair, factors)

    def _add_weight_slopes(
        self, gradient: Tensor, terms: "_PixelTerms", factors: Tensor, costs: Tensor
    ) -> None:
        """Add the gradient of both means by the weights, which move with the field.

        A weighted mean changes with a pixel's weight in proportion to the pixel's
        value minus the mean.

        Args:
            gradient: (B, 2, H, W), pixels; added to.
            terms: terms of the field.
            factors: factor of a weighted pixel in each mean, (2, B).
            costs: both means, (2, B), with their factors in the loss.
        """
        strain = terms.strain[:, 0].mul_(self._defined[:, 0])
        totals = terms.weights.sum((2, 3))
        means = costs / torch.where(totals > 0, totals, 1.0)
        for which, squares in enumerate((terms.squares, strain)):
            above_mean = squares.mul_(factors[which][:, None, None])
            above_mean -= means[which][:, None, None]
            gradient.addcmul_(above_mean[:, None], terms.slopes[which])

    def _pixel_terms(self, field: Tensor) -> "_PixelTerms":
        """Compare src, warped by the field, with tgt; `strain` is left 0."""
        moving = self._has_moving_weights
        maps = field.new_zeros if moving else field.new_empty
        size = field.shape[-2:] if moving else (0, 0)
        terms = _PixelTerms(
            field.new_zeros(len(field)),
            torch.empty_like(field),
            torch.empty_like(self._tgt_weights) if moving else self._tgt_weights,
            maps(len(field), *size),
            maps(len(field), 1, *size),
            maps(2, len(field), 2, *size),
        )
        for block in row_blocks(field, _BLOCK_PX):
            self._compare_block(field, block, terms)
        return terms

    def _compare_block(
        self, field: Tensor, block: tuple[slice, slice], terms: "_PixelTerms"
    ) -> None:
        """Fill the terms of one block of rows."""
        samples, rows = block
        num = self._num_features
        sampled, d_cols, d_rows = self._read(field, block)
        tgt_weights = self._tgt_weights[:, samples, rows]
        difference = sampled[:num]
        difference -= self._tgt[:, samples, rows]
        weights = tgt_weights
        if self._has_moving_weights:
            weights = terms.weights[:, samples, rows]
            torch.mul(sampled[num:], tgt_weights, out=weights)
            terms.squares[samples, rows] = difference.square().sum(0)
            for axis, slope in enumerate((d_cols, d_rows)):
                slopes = terms.slopes[:, samples, axis, rows]
                torch.mul(slope[num:], tgt_weights, out=slopes)
        weighted = difference * weights[0]
        terms.gradient[samples, 0, rows] = d_cols[:num].mul_(weighted).sum(0)
        terms.gradient[samples, 1, rows] = d_rows[:num].mul_(weighted).sum(0)
        dots = _dot(weighted.transpose(0, 1), difference.transpose(0, 1))
        terms.value[samples] += dots

    def _read(
        self, field: Tensor, block: tuple[slice, slice]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Interpolate src, and its weights, where a block of the field points.

        Returns:
            Features and weights, (C or C + 2, b, h, W), and their slopes along cols
            and along rows, both of the same shape.
        """
        index, col, row = self._table_index(field, block)
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

    def _table_index(
        self, field: Tensor, block: tuple[slice, slice]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Find where in the table to read.

        Returns:
            The flat index of the pixel above and left of each location, and the
            distances from that pixel along cols and rows, (b, h, W) each.
        """
        samples, rows = block
        height, width = (size + 2 * _PAD for size in field.shape[-2:])
        location = field[samples, :, rows] + self._pixels[:, :, rows]
        col, row = location.nan_to_num_(0.0).unbind(1)
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


class _PixelTerms(NamedTuple):
    """Terms of the loss at each pixel, before means are taken.

    The last three are empty if the weights of src are all 1.
    """

    value: Tensor  # (B,) sum of weighted squared differences
    gradient: Tensor  # (B, 2, H, W) half the gradient of `value`, weights held fixed
    weights: Tensor  # (2, B, H, W) of similarity and of rigidity
    squares: Tensor  # (B, H, W) squared differences, summed over features
    strain: Tensor  # (B, 1, H, W) sum over springs, filled in by `weighted_rigidity`
    slopes: Tensor  # (2, B, 2, H, W) slopes of both weights, along cols and rows


def per_sample(values: Tensor) -> Tensor:
    """Reshape one number per sample to multiply maps: (B,) -> (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum products: two tensors (B, C, h, w) -> (B,)."""
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def _make_table(src: Tensor, weights: Tensor | None) -> Tensor:
    """Make the table of src and its weights, (C or C + 2, B * padded pixels).

    Beyond the border features are 0 and weights repeat their border.
    """
    around = (_PAD,) * 4
    maps = F.pad(src, around)
    if weights is not None:
        weights = F.pad(weights, around, mode="replicate").to(maps.dtype)
        maps = torch.cat((maps, weights), 1)
    return maps.transpose(0, 1).flatten(1).contiguous()


def _table_positions(like: Tensor) -> Tensor:
    """Make (1, 2, H, W): col and row of each pixel in the padded map."""
    rows, cols = (
        torch.arange(size, device=like.device, dtype=like.dtype) + _PAD
        for size in like.shape[-2:]
    )
    row, col = torch.meshgrid(rows, cols, indexing="ij")
    return torch.stack([col, row])[None]


def can_use_triton(field: Tensor) -> bool:
    """Whether Triton kernels can run for a field, (B, 2, H, W), on its device."""
    is_float = field.dtype == torch.float32
    return field.is_cuda and is_float and _kernels_work(field.device)


@cache
def _kernels_work(device: torch.device) -> bool:
    """Whether Triton runs on a device. It also needs a C compiler."""
    try:
        from metroem.finetune import triton_kernels

        triton_kernels.upsample_transpose(torch.zeros(1, 2, 2, 2, device=device), 2)
    except Exception as error:  # Triton may raise anything
        logger.warning(
            "fields are finetuned 6 to 13 times slower than they could be, since "
            "Triton does not work on this machine: %s. It needs a C compiler, for "
            "example apt install gcc",
            first_line(error),
        )
        return False
    return True
