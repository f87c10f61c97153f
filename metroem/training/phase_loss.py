"""Compute the loss of a batch: the sum of the losses of a phase."""

from dataclasses import replace

import torch
from torch import Tensor

from metroem.data.augment import random_field
from metroem.data.sample import Sample
from metroem.geometry.field import warp
from metroem.geometry.rigidity import rigidity_map
from metroem.imaging.loss_weights import PairMasks, pair_weights
from metroem.imaging.masks import tissue_mask
from metroem.loss import (
    LossTerms,
    PairLoss,
    Target,
    endpoint_loss,
    metric_loss,
    plain_loss,
    sum_losses,
    weighted_mean,
)
from metroem.models.finetuning import find_pair_masks, finetune
from metroem.models.options import AlignerOptions
from metroem.models.types import Prediction, or_zeros
from metroem.specs.augmentations import RandomWarp
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase

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
    *,
    is_score: bool = False,
) -> LossTerms:
    """The loss that a phase minimises: the sum of its losses.

    A loss is taken over the pixels that the field leaves to compare. A score is taken
    over those that the pair shows as its prior field has it, so that a field which
    points out of the images gains nothing.

    Args:
        phase: what counts and how much.
        sample: the batch, its truth complete.
        prediction: field and embeddings of it.
        generator: chance for `pure_emb`.
        options: how the module is finetuned, for "distil"; the defaults if None.
        is_score: whether it is to say how good a network is. It is NaN where the pair
            shows nothing.
    """
    terms = []
    for spec in phase.losses:
        if spec.type == "distil":
            how = replace(options or AlignerOptions(), finetune_iter=spec.iterations)
            target = _finetuned(sample, prediction, how, is_score)
            terms.append(_endpoint(phase, prediction, target, is_score))
        else:
            terms.append(_loss(spec, phase, sample, prediction, generator, is_score))
    return sum_losses(terms, [spec.weight for spec in phase.losses])


def _loss(
    spec: LossSpec,
    phase: Phase,
    sample: Sample,
    prediction: Prediction,
    generator: torch.Generator,
    is_score: bool,
) -> LossTerms:
    if spec.type == "known_warp":
        return _endpoint(phase, prediction, _truth(sample, is_score), is_score)
    maps = PairMasks(sample.src, sample.tgt, sample.src_defects, sample.tgt_defects)
    pair = PairLoss(
        prediction.field,
        pair_weights(phase.similarity_rules, maps),
        pair_weights(phase.smoothness_rules, maps),
        phase.smoothness,
        _before(sample) if is_score else None,
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


def covered(sample: Sample, field: Tensor) -> Tensor:
    """How much of what a pair shows a field leaves to compare, 0 to 1, scalar.

    What the pair shows is what tgt and src have in common as the prior field has it, or
    as they came where it shows nothing; NaN where that is nothing, too. Where the truth
    rests on the field that the network found before a known warp, it is what that
    leaves of the truth.

    Args:
        sample: the batch, its truth complete.
        field: (B, 2, H, W), pixels.
    """
    if sample.truth_due is None:
        due = _shown(sample, _before(sample))
        left = _shown(sample, field)
    else:
        assert sample.truth_valid is not None
        due, left = sample.truth_due, sample.truth_valid
    return (due & left).sum() / due.sum()


def _before(sample: Sample) -> Tensor:
    """The prior field, (B, 2, H, W); none for pairs that it shows nothing of."""
    prior = or_zeros(sample.prior_field, sample.src)
    shows = _shown(sample, prior).flatten(1).any(1)
    return torch.where(shows.view(-1, 1, 1, 1), prior, 0.0)


def _shown(sample: Sample, field: Tensor) -> Tensor:
    """Where tgt, and src as a field has it, show tissue, (B, 1, H, W) bool."""
    shown = warp(tissue_mask(sample.src).float(), field) > 0.999
    return shown & tissue_mask(sample.tgt)


def _truth(sample: Sample, is_score: bool) -> Target:
    """The truth of a batch, with what each pixel of tgt counts."""
    assert sample.truth is not None and sample.truth_valid is not None
    truth, counts = sample.truth, sample.truth_valid
    if is_score and sample.truth_due is not None:
        assert sample.truth_lost is not None
        truth = torch.where(counts, truth, sample.truth_lost)
        counts = sample.truth_due
    seen = _shown(sample, truth)
    return Target(truth, torch.where(seen, 1.0, _UNSEEN_WEIGHT) * counts)


def _finetuned(
    sample: Sample, prediction: Prediction, options: AlignerOptions, is_score: bool
) -> Target:
    """What the finetuner makes of a prediction, where both images show tissue.

    In a score the prior field is the target where the finetuner has lost the tissue.
    """
    field = prediction.field.detach()
    embedding = prediction.embeddings[options.finetune_level]
    with torch.no_grad():
        maps = find_pair_masks(
            sample.src, sample.tgt, (sample.src_defects, sample.tgt_defects), options
        )
        confidence = prediction.confidence
        found = finetune(field, embedding, maps, options, confidence=confidence).field
        shown = _shown(sample, found)
        if is_score:
            before = _before(sample)
            found, shown = torch.where(shown, found, before), _shown(sample, before)
    return Target(found, shown.float())


def _endpoint(
    phase: Phase, prediction: Prediction, target: Target, is_score: bool
) -> LossTerms:
    """Distance from the target field, and smoothness times rigidity if asked for."""
    nothing = float("nan") if is_score else 0.0
    terms = endpoint_loss(prediction.field, prediction.coarse, target, nothing=nothing)
    if not phase.smoothness:
        return terms
    strain = weighted_mean(rigidity_map(prediction.field))
    return terms._replace(
        total=terms.total + phase.smoothness * strain, rigidity=strain
    )
