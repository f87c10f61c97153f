"""What the losses of a phase say of a batch."""

from dataclasses import replace

import torch

from metroem.aligner import Prediction
from metroem.data.augment import random_field
from metroem.data.sample import Sample
from metroem.field import warp
from metroem.finetuning import finetune, pair_maps
from metroem.loss import (
    LossTerms,
    PairLoss,
    Wanted,
    added,
    endpoint_loss,
    metric_loss,
    plain_loss,
    weighted_mean,
)
from metroem.masks import PairMaps, tissue_mask, weigh
from metroem.nets.options import AlignerOptions
from metroem.specs.augmentations import RandomWarp
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase
from metroem.springs import rigidity_map

# "Before alignment" of a metric loss with pure_emb, as in the original.
_PURE_EMBEDDING_WARP = RandomWarp(difficulty=2, min_disp=-50, max_disp=50)
# What a pixel counts whose truth is known, but which one of the images does not
# show: a network has to guess there, from what lies around.
_UNSEEN_WEIGHT = 0.1


def levels_wanted(phase: Phase, options: AlignerOptions) -> tuple[int, ...]:
    """Levels whose embeddings the losses of a phase look at.

    Args:
        phase: has the losses.
        options: of the module; say which level is finetuned on.
    """
    finetuned = {
        options.finetune_level for loss in phase.losses if loss.type == "distil"
    }
    return tuple(sorted({*phase.embedding_levels, *finetuned}))


def phase_loss(
    phase: Phase,
    sample: Sample,
    prediction: Prediction,
    generator: torch.Generator,
    options: AlignerOptions | None = None,
) -> LossTerms:
    """The loss that a phase minimises: the sum of its losses.

    Args:
        phase: what counts and how much.
        sample: the batch, its truth complete.
        prediction: field and embeddings of it.
        generator: chance for `pure_emb`.
        options: how the module is finetuned, for "distil"; the defaults if None.
    """
    terms = []
    for spec in phase.losses:
        if spec.type == "distil":
            how = replace(options or AlignerOptions(), finetune_iter=spec.iterations)
            wanted = _finetuned(sample, prediction, how)
            terms.append(_endpoint(phase, prediction, wanted))
        else:
            terms.append(_loss(spec, phase, sample, prediction, generator))
    return added(terms, [spec.weight for spec in phase.losses])


def _loss(
    spec: LossSpec,
    phase: Phase,
    sample: Sample,
    prediction: Prediction,
    generator: torch.Generator,
) -> LossTerms:
    if spec.type == "known_warp":
        return _endpoint(phase, prediction, _truth(sample))
    maps = PairMaps(sample.src, sample.tgt, sample.src_defects, sample.tgt_defects)
    pair = PairLoss(
        prediction.field,
        weigh(phase.similarity_rules, maps),
        weigh(phase.smoothness_rules, maps),
        phase.smoothness,
    )
    if spec.type == "plain":
        return plain_loss(sample.src, sample.tgt, pair)
    levels = [
        (level, prediction.embeddings[level].src, prediction.embeddings[level].tgt)
        for level in spec.levels
    ]
    moved = None
    if spec.pure_emb:
        moved = random_field(sample.src.shape[-2:], _PURE_EMBEDDING_WARP, generator)
        moved = moved.to(sample.src.device)
    return metric_loss(levels, pair, spec, moved=moved)


def _truth(sample: Sample) -> Wanted:
    """The truth of a batch, with what each pixel of tgt counts."""
    assert sample.truth is not None and sample.truth_valid is not None
    shown = warp(tissue_mask(sample.src).float(), sample.truth) > 0.999
    seen = shown & tissue_mask(sample.tgt)
    weight = torch.where(seen, 1.0, _UNSEEN_WEIGHT) * sample.truth_valid
    return Wanted(sample.truth, weight)


def _finetuned(
    sample: Sample, prediction: Prediction, options: AlignerOptions
) -> Wanted:
    """What the finetuner makes of a prediction, where both images show tissue."""
    field = prediction.field.detach()
    embedding = prediction.embeddings[options.finetune_level]
    with torch.no_grad():
        maps = pair_maps(
            sample.src, sample.tgt, (sample.src_defects, sample.tgt_defects), options
        )
        trust = prediction.trust
        found = finetune(field, embedding, maps, options, trust=trust).field
        shown = warp(tissue_mask(sample.src).float(), found) > 0.999
    return Wanted(found, (shown & tissue_mask(sample.tgt)).float())


def _endpoint(phase: Phase, prediction: Prediction, wanted: Wanted) -> LossTerms:
    """Distance from the field wanted, and smoothness times rigidity if asked for."""
    terms = endpoint_loss(prediction.field, prediction.coarse, wanted)
    if not phase.smoothness:
        return terms
    strain = weighted_mean(rigidity_map(prediction.field))
    return terms._replace(
        total=terms.total + phase.smoothness * strain, rigidity=strain
    )
