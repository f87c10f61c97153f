"""Measure the metrics of a network on the held-out pairs."""

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
    """A held-out pair and the field that the network predicts for it."""

    sample: Sample
    field: Tensor  # (B, 2, H, W), px of the sample's mip


class EpochReport(NamedTuple):
    """Metrics since the last report, and an example."""

    stage: int
    epochs: int  # number of finished epochs of the stage, over all its phases
    training: StepMetrics
    validation: StepMetrics | None  # None without held-out pairs
    held_out: HeldOut | None  # the first held-out pair; None without any


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

    Each metric is a mean over the pairs for which it is known; NaN if there is none.

    Args:
        model: a `TrainingModel`, or DDP around one; its mode is not changed.
        samples: held-out pairs, of the phase whose loss is measured.
        earlier: makes the prior fields of warped samples.
        seed: of the randomness inside losses.
        device: of the model.
        rank: of this process.
        num_ranks: number of ranks that share the pairs.

    Returns:
        None without held-out pairs.
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
            in_view = covered(sample, prediction.field)
        metrics = batch_metrics(prediction, terms, sample.prior_field, in_view)
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
    """Predict the first held-out pair, on one rank only; None without any.

    Args:
        model: as for `validate`, like the rest.
        samples: held-out pairs.
        earlier: makes the prior fields of warped samples.
        device: of the model.
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
    """Complete a held-out sample with prior field and truth, and predict it."""
    sample = earlier.add_prior(samples[index].to(device))
    labeller = earlier.labeller or net
    sample = add_pseudo_label(sample, labeller, samples.phase.known_warp)
    return sample, net(sample, levels_wanted(samples.phase, net.options))
