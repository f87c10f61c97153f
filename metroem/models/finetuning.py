"""Finetune an aligner's field on the embeddings of its network."""

import torch.nn.functional as F
from torch import Tensor

from metroem.finetune.adam import FinetuneResult, finetune_adam
from metroem.finetune.gauss_newton import finetune_gauss_newton
from metroem.finetuner import normalize_jointly
from metroem.imaging.defects import find_defects, find_gaps
from metroem.imaging.loss_weights import PairMasks, pair_weights
from metroem.imaging.masks import tissue_mask
from metroem.loss import normalize_features
from metroem.models.options import AlignerOptions

Defects = tuple[Tensor | None, Tensor | None]


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
        The finetuned field, with its loss before and after.
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
    return finetune_gauss_newton(
        (src, tgt), field, weights, options.gauss_newton_options, level=level
    )


def _tissue_at(image: Tensor, level: int) -> Tensor:
    """Mark the pixels of a level that are tissue all over, (B, 1, h, w) bool."""
    blank = (~tissue_mask(image)).float()
    return F.max_pool2d(blank, 2**level, ceil_mode=True) == 0


def finetune_iterations(stage: int) -> int:
    """Compute the finetuner's steps after a stage: 300, halved from stage to stage.

    Source: the original's `train.py`.
    """
    return 300 // 2**stage
