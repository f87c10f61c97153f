"""Finetune an aligner's field on the embeddings of its network.

The finetuner makes the features of a pair alike. Where tissue moves from one section to
the next it goes too far: it takes away drift that the network followed, and with it a
part of what the network knew. So small smooth corrections are taken back. With c the
correction of the network's field and m its smooth part,

    held = network's field + (c - m) + m |m|^2 / (|m|^2 + v^2)
    v    = 2 exp(15 (r_network - r) / max(r_network, r)) (1 - r^2) / r^2 px

r is how well the images correlate under the finetuned field, r_network under the
network's own, means over the pair. So v is near 0 for a section on itself, and 4 px for
neighbours with r = 0.7 that agree 5 % less than before. Near defects, where networks
are less sure, v is a tenth of that. Corrections well above v stay.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.finetune.adam import FinetuneResult, finetune_adam
from metroem.finetune.gauss_newton import finetune_gauss_newton
from metroem.finetuner import normalize_jointly
from metroem.geometry.field import downsample_field, upsample_field, warp
from metroem.geometry.regularize import smooth_field
from metroem.imaging.correlation_map import correlation_map
from metroem.imaging.defects import find_defects, find_gaps
from metroem.imaging.loss_weights import PairMasks, pair_weights
from metroem.imaging.masks import tissue_mask
from metroem.loss import normalize_features
from metroem.models.options import AlignerOptions

Defects = tuple[Tensor | None, Tensor | None]

# The factors of v, and mean errors in px on the pairs that they were chosen on. No pair
# was trained on (pretrained pyramid, 2026-11). Networks: the mean of both directions.
#                                       networks   not held   held
#     FIB-SEM: a section on itself          0.25       0.21   0.22
#         neighbours                        1.29       1.28   1.17
#         near a defect                     1.72       1.36   1.37
#     error of the known warp, FIB-SEM      0.44       0.89   0.49
#         nerve cord, 4.6 nm                1.32       4.47   1.33
#         block-face SEM                    0.74       2.21   0.83
#         array tomography                  1.42       2.32   1.38
_HELD, _HELD_IF_WORSE = 2.0, 15.0
# Within so many distances of a defect v is this much less, unless that is most of the
# section: then the tissue only looks like defects, as in array tomography. With v = 0
# there the error of the known warp was 1.53 instead of 1.31 px on nerve cord, which has
# marks that are no defects, and near real defects nothing was gained.
_NEAR_DEFECTS, _LESS_NEAR, _MOST = 4, 0.9, 0.5
_MIN_CORRELATION, _MAX_CORRELATION = 0.05, 0.99


def find_pair_masks(
    src: Tensor, tgt: Tensor, defects: Defects, options: AlignerOptions
) -> PairMasks:
    """Collect the masks of a pair; find the defects that are not given.

    Args:
        src: (B, 1, H, W), normalised, 0 = no data.
        tgt: (B, 1, H, W).
        defects: masks of src and tgt, (B, 1, H, W) bool, or None.
        options: options of the aligner. Without `finetune_knots` only gaps of the
            tissue are found, as in the original.
    """
    find = find_defects if options.finetune_knots else find_gaps
    src_defects, tgt_defects = (
        find(
            image,
            min_thickness=options.min_defect_thickness,
            min_px=options.min_defect_px,
        )
        if given is None
        else given
        for image, given in zip((src, tgt), defects, strict=True)
    )
    return PairMasks(src, tgt, src_defects, tgt_defects)


def finetune(
    field: Tensor,
    embedding: tuple[Tensor, Tensor],
    maps: PairMasks,
    options: AlignerOptions,
    *,
    confidence: Tensor | None = None,
) -> FinetuneResult:
    """Finetune a field on the embeddings, without their image channel.

    Args:
        field: (B, 2, H, W), pixels.
        embedding: embeddings of src and tgt at `options.finetune_level`.
        maps: masks of the pair.
        options: options of the aligner.
        confidence: weight of each pixel of tgt in the comparison, (B, 1, H, W), if the
            network has learned it. It is low where neurites move from section to
            section. It lowers the error between neighbours by 3 %, within a section by
            20 % (2026-11). Not used without `finetune_knots`.

    Returns:
        The finetuned field. With `finetune_knots` it is held to the network's; its
        losses before and after are those of the finetuner, before that.
    """
    level = options.finetune_level
    # Without `finetune_knots` features are normalised as in the original.
    scale = normalize_features if options.finetune_knots else normalize_jointly
    src, tgt = (
        scale(side[:, 1:].float(), _tissue_at(image, level))
        for side, image in zip(embedding, (maps.src, maps.tgt), strict=True)
    )
    del embedding  # as large as src and tgt together
    similarity = pair_weights(options.similarity_rules, maps)
    smoothness = pair_weights(options.smoothness_rules, maps)
    if not options.finetune_knots:
        return finetune_adam(
            src, tgt, field, similarity, smoothness, options.adam_options
        )
    if confidence is not None:
        similarity = similarity._replace(tgt=similarity.tgt * confidence)
    weights = (similarity, smoothness)
    result = finetune_gauss_newton(
        (src, tgt), field, weights, options.gauss_newton_options, level=level
    )
    held = hold_to_network(result.field, field, maps, min(options.finetune_knots))
    return result._replace(field=held)


def hold_to_network(
    found: Tensor, start: Tensor, maps: PairMasks, spacing_px: int
) -> Tensor:
    """Take back small smooth corrections of the finetuner; see the module.

    Args:
        found: the finetuned field, (B, 2, H, W), pixels.
        start: the network's field, the same form.
        maps: masks of the pair.
        spacing_px: distance of the finest control points, px.

    Returns:
        (B, 2, H, W), pixels.
    """
    correction = found - start
    # The smooth part is found at pixels a quarter of its deviation wide.
    level = max(0, int(math.log2(spacing_px)) - 2)
    smooth = downsample_field(correction, level)
    everywhere = torch.ones_like(smooth[:, :1])
    smooth = upsample_field(
        smooth_field(smooth, everywhere, spacing_px >> level), level
    )
    smooth = smooth[..., : correction.shape[-2], : correction.shape[-1]]
    images = zip(maps.src.split(1), maps.tgt.split(1), strict=True)
    fields = zip(start.split(1), found.split(1), strict=True)
    alike = torch.cat(
        [
            torch.cat([correlation_map(warp(src, field), tgt) for field in both], 1)
            for (src, tgt), both in zip(images, fields, strict=True)
        ]
    )
    is_compared = (alike.amin(1, keepdim=True) > 0).float()
    count = is_compared.sum((2, 3), keepdim=True).clamp(min=1)
    alike = (alike * is_compared).sum((2, 3), keepdim=True) / count
    alike = alike.clamp(_MIN_CORRELATION, _MAX_CORRELATION)
    before, after = alike.split(1, 1)
    worse = (before - after) / alike.amax(1, keepdim=True)
    limit = torch.exp(_HELD_IF_WORSE * worse) * (1 - after.square()) / after.square()
    limit = _HELD * limit * (1 - _LESS_NEAR * _near_defects(found, maps, spacing_px))
    length = smooth.square().sum(1, keepdim=True)
    kept = length / (length + limit.square()).clamp(min=1e-12)
    return start + (correction - smooth) + kept * smooth


def _near_defects(field: Tensor, maps: PairMasks, spacing_px: int) -> Tensor:
    """Mark pixels near a defect of warped src or of tgt: (B, 1, H, W), 0 to 1.

    A sample in which they are most pixels gets none.
    """
    marks = torch.zeros_like(field[:, :1])
    if maps.tgt_defects is not None:
        marks = torch.maximum(marks, maps.tgt_defects.float())
    if maps.src_defects is not None:
        marks = torch.maximum(marks, warp(maps.src_defects.float(), field))
    block = max(1, spacing_px // 2)
    coarse = F.max_pool2d(marks, block, ceil_mode=True)
    reach = _NEAR_DEFECTS * spacing_px // block
    coarse = F.max_pool2d(coarse, 2 * reach + 1, 1, reach)
    near = F.interpolate(coarse, scale_factor=block, mode="bilinear")
    near = near[..., : marks.shape[-2], : marks.shape[-1]]
    return near * (near.mean((1, 2, 3), keepdim=True) < _MOST)


def _tissue_at(image: Tensor, level: int) -> Tensor:
    """Mark the pixels of a level that are tissue all over, (B, 1, h, w) bool."""
    blank = (~tissue_mask(image)).float()
    return F.max_pool2d(blank, 2**level, ceil_mode=True) == 0


def finetune_iterations(stage: int) -> int:
    """Compute the finetuner's steps after a stage: 300, halved from stage to stage.

    Source: the original's `train.py`.
    """
    return 300 // 2**stage
