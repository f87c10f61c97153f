"""Measure a network on the held-out pairs."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from metroem.data.sample import Sample, seeded_generator
from metroem.data.sampling import ValidationPairs
from metroem.models.types import Prediction
from metroem.training.buffers import evaluating
from metroem.training.model import TrainingModel, unwrap_model
from metroem.training.phase_loss import covered, levels_wanted, phase_loss
from metroem.training.step import StepMetrics, batch_metrics
from metroem.training.targets import EarlierStages, add_pseudo_label
from metroem.utils.distributed import all_reduce_sum


class HeldOut(NamedTuple):
    """A held-out pair and the field that a network finds for it."""

    sample: Sample
    field: Tensor  # (B, 2, H, W), px of the sample's mip


class EpochReport(NamedTuple):
    """What is known at the end of some epochs."""

    stage: int
    epochs: int  # of the stage that are done, over all its phases
    training: StepMetrics
    validation: StepMetrics | None  # None without held-out pairs, as the next
    held_out: HeldOut | None  # the first of them


def validate(
    model: nn.Module,
    samples: ValidationPairs,
    earlier: EarlierStages,
    *,
    seed: int,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
) -> StepMetrics | None:
    """Average the metrics over the held-out pairs, which the ranks share.

    Each is a mean over the pairs that have it, and NaN where none has.

    Args:
        model: a `TrainingModel`, or DDP around one; left in the mode that it is in.
        samples: held out, of the phase whose loss is measured; without any there
            are no metrics.
        earlier: make the prior fields of warped samples.
        seed: of the randomness inside losses.
        device: of the model.
        rank: of this process.
        num_ranks: how many share the pairs.
    """
    if not len(samples):
        return None
    phase = samples.phase
    net = unwrap_model(model)
    sums = torch.zeros(2, len(StepMetrics._fields), device=device)
    for index in range(rank, len(samples), num_ranks):
        with torch.no_grad(), evaluating(net):
            sample, prediction = _predict(net, samples, index, earlier, device)
            generator = seeded_generator(seed, index)
            terms = phase_loss(
                phase, sample, prediction, generator, net.options, is_score=True
            )
            share = covered(sample, prediction.field)
        metrics = batch_metrics(prediction, terms, sample.prior_field, share)
        known = ~metrics.isnan()
        sums += torch.stack((torch.where(known, metrics, 0.0), known))
    values, counts = all_reduce_sum(sums)
    return StepMetrics(*(values / counts).tolist())


def first_held_out(
    model: nn.Module,
    samples: ValidationPairs,
    earlier: EarlierStages,
    *,
    device: torch.device,
) -> HeldOut | None:
    """Predict the first held-out pair, on one rank alone; None without any.

    Arguments as `validate`.
    """
    if not len(samples):
        return None
    net = unwrap_model(model)
    with torch.no_grad(), evaluating(net):
        sample, prediction = _predict(net, samples, 0, earlier, device)
    return HeldOut(sample, prediction.field)


def _predict(
    net: TrainingModel,
    samples: ValidationPairs,
    index: int,
    earlier: EarlierStages,
    device: torch.device,
) -> tuple[Sample, Prediction]:
    """A held-out sample, with prior field and truth, and its prediction."""
    sample = earlier.add_prior(samples[index].to(device))
    sample = add_pseudo_label(sample, net, samples.phase.known_warp)
    return sample, net(sample, levels_wanted(samples.phase, net.options))
