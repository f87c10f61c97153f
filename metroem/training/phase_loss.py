"""Compute the loss of a batch: the weighted sum of the losses of a phase."""

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
# Weight of a pixel whose truth is known, but which one of the images does not show: the
# network has to guess it from its surroundings.
_UNSEEN_WEIGHT = 0.1


def levels_wanted(phase: Phase, options: AlignerOptions) -> tuple[int, ...]:
    """Levels whose embeddings the losses of a phase need.

    Args:
        phase: has the losses.
        options: of the module; name the level that the finetuner works on.
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
    """Compute the loss that a phase minimises: the weighted sum of its losses.

    A loss is taken over the pixels that show tissue under the predicted field. A score
    is taken over the pixels that show tissue under the prior field. So a field that
    points out of the images does not get a better score.

    Args:
        phase: its losses, their weights and mask rules.
        sample: the batch, with complete truth.
        prediction: its field and embeddings.
        generator: random number generator, for `pure_emb`.
        options: how the module is finetuned, for "distil"; the defaults if None.
        is_score: whether a score is computed instead of a loss. It is NaN if the pair
            shows nothing.
    """
    terms = []
    for spec in phase.losses:
        if spec.type == "distil":
            how = replace(options or AlignerOptions(), finetune_iter=spec.iterations)
            target = _distil_target(sample, prediction, how, is_score)
            terms.append(_endpoint_loss(phase, prediction, target, is_score))
        else:
            terms.append(
                _one_loss(spec, phase, sample, prediction, generator, is_score)
            )
    return sum_losses(terms, [spec.weight for spec in phase.losses])


def _one_loss(
    spec: LossSpec,
    phase: Phase,
    sample: Sample,
    prediction: Prediction,
    generator: torch.Generator,
    is_score: bool,
) -> LossTerms:
    if spec.type == "known_warp":
        return _endpoint_loss(
            phase, prediction, _truth_target(sample, is_score), is_score
        )
    maps = PairMasks(sample.src, sample.tgt, sample.src_defects, sample.tgt_defects)
    pair = PairLoss(
        prediction.field,
        pair_weights(phase.similarity_rules, maps),
        pair_weights(phase.smoothness_rules, maps),
        phase.smoothness,
        _usable_prior(sample) if is_score else None,
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
    """Fraction of the pixels to compare that a field keeps in view, 0 to 1, scalar.

    The pixels to compare are those where src under the prior field, and tgt, show
    tissue. A pair that shows none under its prior field is compared unwarped. The
    result is NaN if there are none then, either. If the truth includes a pseudo-label,
    the result is the fraction of `sample.scored` where the truth is valid.

    Args:
        sample: the batch, with complete truth.
        field: (B, 2, H, W), pixels.
    """
    if sample.scored is None:
        wanted = _shown(sample, _usable_prior(sample))
        kept = _shown(sample, field)
    else:
        assert sample.truth_valid is not None
        wanted, kept = sample.scored, sample.truth_valid
    return (wanted & kept).sum() / wanted.sum()


def _usable_prior(sample: Sample) -> Tensor:
    """The prior field, (B, 2, H, W); 0 for pairs that show no tissue under it."""
    prior = or_zeros(sample.prior_field, sample.src)
    shows = _shown(sample, prior).flatten(1).any(1)
    return torch.where(shows.view(-1, 1, 1, 1), prior, 0.0)


def _shown(sample: Sample, field: Tensor) -> Tensor:
    """Find where tgt, and src warped by a field, show tissue, (B, 1, H, W) bool."""
    shown = warp(tissue_mask(sample.src).float(), field) > 0.999
    return shown & tissue_mask(sample.tgt)


def _truth_target(sample: Sample, is_score: bool) -> Target:
    """The truth of a batch, with the weight of each pixel of tgt."""
    assert sample.truth is not None and sample.truth_valid is not None
    truth, counts = sample.truth, sample.truth_valid
    if is_score and sample.scored is not None:
        assert sample.fallback_truth is not None
        truth = torch.where(counts, truth, sample.fallback_truth)
        counts = sample.scored
    seen = _shown(sample, truth)
    return Target(truth, torch.where(seen, 1.0, _UNSEEN_WEIGHT) * counts)


def _distil_target(
    sample: Sample, prediction: Prediction, options: AlignerOptions, is_score: bool
) -> Target:
    """Finetune a prediction; the result counts where both images show tissue.

    In a score, the prior field is the target where the finetuner's field shows none.
    """
    field = prediction.field.detach()
    embedding = prediction.embeddings[options.finetune_level]
    with torch.no_grad():
        maps = find_pair_masks(
            sample.src, sample.tgt, (sample.src_defects, sample.tgt_defects), options
        )
        confidence = prediction.confidence
        result = finetune(field, embedding, maps, options, confidence=confidence)
        finetuned, shown = result.field, _shown(sample, result.field)
        if is_score:
            prior = _usable_prior(sample)
            finetuned = torch.where(shown, finetuned, prior)
            shown = _shown(sample, prior)
    return Target(finetuned, shown.float())


def _endpoint_loss(
    phase: Phase, prediction: Prediction, target: Target, is_score: bool
) -> LossTerms:
    """Distance from the target field, plus smoothness times rigidity if asked for."""
    nothing = float("nan") if is_score else 0.0
    terms = endpoint_loss(prediction.field, prediction.coarse, target, nothing=nothing)
    if not phase.smoothness:
        return terms
    strain = weighted_mean(rigidity_map(prediction.field))
    return terms._replace(
        total=terms.total + phase.smoothness * strain, rigidity=strain
    )
