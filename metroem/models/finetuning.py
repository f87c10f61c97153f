"""How an aligner's field is finetuned on the embeddings that its network made."""

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
    """The images and the defects of a pair; those that are not given are found.

    Args:
        src: (B, 1, H, W), normalised, 0 = no data.
        tgt: (B, 1, H, W).
        defects: masks of src and tgt, (B, 1, H, W) bool, or None.
        options: modules that are finetuned as in the original find what it
            found, gaps of the tissue.
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
    trust: Tensor | None = None,
) -> FinetuneResult:
    """Finetune a field on the embeddings, without their image channel.

    Args:
        field: (B, 2, H, W), pixels.
        embedding: of src and tgt at `options.finetune_level`.
        maps: of the pair.
        options: of the aligner.
        trust: what a pixel of tgt is worth in the comparison, (B, 1, H, W), where
            the network has learned it: what moves from section to section as
            neurites do is worth little (3 % off the error between neighbours, 20 %
            within a section, 2026-11). Not for modules that are finetuned as in
            the original.
    """
    level = options.finetune_level
    # Modules that are finetuned as the original's compare what it compared.
    scale = normalize_features if options.finetune_knots else normalize_jointly
    src, tgt = (
        scale(side[:, 1:].float(), _tissue_at(image, level))
        for side, image in zip(embedding, (maps.src, maps.tgt), strict=True)
    )
    del embedding  # as large as what is made of it
    similarity = pair_weights(options.similarity_rules, maps)
    smoothness = pair_weights(options.smoothness_rules, maps)
    if not options.finetune_knots:
        return finetune_adam(src, tgt, field, similarity, smoothness, options.tuning)
    if trust is not None:
        similarity = similarity._replace(tgt=similarity.tgt * trust)
    weights = (similarity, smoothness)
    return finetune_gauss_newton(
        (src, tgt), field, weights, options.refining, level=level
    )


def _tissue_at(image: Tensor, level: int) -> Tensor:
    """Where a pixel of a level is tissue all over."""
    blank = (~tissue_mask(image)).float()
    return F.max_pool2d(blank, 2**level, ceil_mode=True) == 0


def finetune_iterations(stage: int) -> int:
    """Steps of the finetuner between stages: 300, halved from stage to stage.

    Source: the original's `train.py`.
    """
    return 300 // 2**stage
