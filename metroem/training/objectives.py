"""What the losses of a phase say of a batch."""

from collections.abc import Callable

import torch

from metroem.aligner import Prediction
from metroem.data.augment import random_field
from metroem.data.sample import Sample
from metroem.field import compose, warp
from metroem.loss import (
    LossTerms,
    PairLoss,
    Wanted,
    added,
    endpoint_loss,
    metric_loss,
    plain_loss,
    rigidity_map,
    weighted_mean,
)
from metroem.masks import PairMaps, tissue_mask, weigh
from metroem.specs.augmentations import RandomWarp
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase

Predict = Callable[[Sample, tuple[int, ...]], Prediction]

# "Before alignment" of a metric loss with pure_emb, as in the original.
_PURE_EMBEDDING_WARP = RandomWarp(difficulty=2, min_disp=-50, max_disp=50)
# What a pixel counts whose truth is known, but which one of the images does not
# show: a network has to guess there, from what lies around.
_UNSEEN_WEIGHT = 0.1


def with_natural_field(sample: Sample, predict: Predict) -> Sample:
    """Complete the truth of samples whose pairs are not aligned as they came.

    What the network makes of the pair before the known warp is taken for its
    natural field; 0 is, for samples that show one section twice. A network that
    knows nothing yet would learn its own noise: it has to be trained on such
    samples first.

    Args:
        sample: with `unwarped_src`, or left as it is.
        predict: the network; its gradients are not recorded.
    """
    if sample.unwarped_src is None:
        return sample
    assert sample.truth is not None and sample.truth_valid is not None
    before = sample._replace(src=sample.unwarped_src, prior_field=sample.unwarped_prior)
    with torch.no_grad():
        natural = predict(before, ()).field
    is_unknown = tissue_mask(sample.unwarped_src).flatten(1).any(1)
    natural = torch.where(is_unknown.view(-1, 1, 1, 1), natural, 0.0)
    return sample._replace(
        truth=compose(natural, sample.truth),
        truth_valid=warp(sample.truth_valid.float(), natural) > 0.999,
        unwarped_src=None,
        unwarped_prior=None,
    )


def phase_loss(
    phase: Phase,
    sample: Sample,
    prediction: Prediction,
    generator: torch.Generator,
) -> LossTerms:
    """The loss that a phase minimises: the sum of its losses.

    Args:
        phase: what counts and how much.
        sample: the batch, its truth complete.
        prediction: field and embeddings of it.
        generator: chance for `pure_emb`.
    """
    terms = [_loss(spec, phase, sample, prediction, generator) for spec in phase.losses]
    return added(terms, [spec.weight for spec in phase.losses])


def _loss(
    spec: LossSpec,
    phase: Phase,
    sample: Sample,
    prediction: Prediction,
    generator: torch.Generator,
) -> LossTerms:
    if spec.type == "known_warp":
        return _with_rigidity(
            endpoint_loss(prediction.field, prediction.coarse, _truth(sample)),
            phase,
            prediction,
        )
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


def _with_rigidity(terms: LossTerms, phase: Phase, prediction: Prediction) -> LossTerms:
    """The terms and smoothness times the rigidity of the field, if there is any."""
    if not phase.smoothness:
        return terms
    strain = weighted_mean(rigidity_map(prediction.field))
    return terms._replace(
        total=terms.total + phase.smoothness * strain, rigidity=strain
    )
