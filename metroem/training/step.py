"""Make one update of the weights from one or more batches, and measure them."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metroem.data.sample import Sample, seeded_generator
from metroem.loss import LossTerms
from metroem.models.types import Prediction
from metroem.specs.schedule import Phase
from metroem.training.buffers import evaluating, keep_buffers, restore_buffers
from metroem.training.model import unwrap_model
from metroem.training.phase_loss import covered, levels_wanted, phase_loss
from metroem.training.targets import EarlierStages, add_pseudo_label
from metroem.utils.distributed import all_reduce_max

# A loss above this is taken for a failure, as in the original.
BAD_LOSS = 1e3
# A network that leaves less of its pairs to compare has collapsed.
LEAST_COVERED = 0.1


class StepMetrics(NamedTuple):
    """How well a network does, as numbers for people."""

    loss: float  # what the phase minimises
    similarity: float  # grey levels (or features) squared
    rigidity: float  # px^2
    before: float  # similarity before alignment, of a metric loss
    epe_px: float  # distance from the target field, of known_warp and distil
    field_px: float  # mean length of the field, pixels
    change_px: float  # mean length of what it adds to the prior field, pixels
    # Fraction of what the pairs show that the field leaves to compare.
    covered: float = float("nan")

    def as_text(self) -> str:
        """The metrics for a line of a log."""
        parts = {
            "epe": f"{self.epe_px:.3f} px",
            "similarity": f"{self.similarity:.4g}",
            "rigidity": f"{self.rigidity:.3g}",
            "field": f"{self.field_px:.2f} px",
            "covers": f"{self.covered:.0%}",
        }
        known = [f"{name} {text}" for name, text in parts.items() if "nan" not in text]
        return f"{self.loss:.4g} ({', '.join(known)})"

    def as_json(self) -> dict[str, float | None]:
        """The metrics by name; None for what is not known."""
        return {k: None if v != v else v for k, v in self._asdict().items()}

    @property
    def has_collapsed(self) -> bool:
        """Whether the field leaves next to nothing of the pairs to compare."""
        return self.covered < LEAST_COVERED

    @property
    def is_known(self) -> bool:
        """Whether the loss says how good the network is: of some pixel at least."""
        return math.isfinite(self.loss) and self.covered != 0


class StepResult(NamedTuple):
    """What one step did."""

    metrics: Tensor  # (8,) `StepMetrics` of this rank's samples
    applied: bool  # False when a rank's loss or gradient was bad
    bad_pairs: tuple[str, ...]  # of this rank, that may be why it was not applied
    stop: int  # largest stop code of all ranks


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Sample],
    phase: Phase,
    earlier: EarlierStages,
    *,
    loss_seed: tuple[int, ...],
    stop: int,
) -> StepResult:
    """Make one update from the mean loss of batches.

    If a loss or a gradient of any rank went bad, all ranks skip the update, which
    leaves weights, buffers and optimizer as they were. Every rank always runs every
    backward pass, since DDP waits there for the others.

    Args:
        model: a `TrainingModel`, or DDP around one, in training mode.
        optimizer: of its weights.
        batches: `phase.accumulate` of them, on the device of the model; read one by
            one.
        phase: the loss, and how batches and gradients are treated.
        earlier: make the prior fields of warped samples.
        loss_seed: of the randomness inside losses, the same for each batch.
        stop: this rank's stop code.
    """
    net = unwrap_model(model)
    levels = levels_wanted(phase, net.options)
    buffers = keep_buffers(net)
    optimizer.zero_grad(set_to_none=True)
    pairs, bad, metrics = [], [], []
    for number, sample in enumerate(batches, start=1):
        pairs.append(sample.pair)
        sample = earlier.add_prior(sample)
        with evaluating(net):
            sample = add_pseudo_label(sample, net, phase.known_warp)
        # DDP averages the gradients of the ranks at the last batch, for all of them.
        is_last = number == phase.accumulate
        with nullcontext() if is_last else getattr(model, "no_sync", nullcontext)():
            prediction = model(sample, levels)
            generator = seeded_generator(*loss_seed)
            terms = phase_loss(phase, sample, prediction, generator, net.options)
            share = covered(sample, prediction.field.detach())
            metrics.append(batch_metrics(prediction, terms, sample.prior_field, share))
            (terms.total / phase.accumulate).backward()
        bad.append(~(terms.total.detach().abs() <= BAD_LOSS))
        del sample, prediction, terms  # else they stay during the next batch

    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = torch.nn.utils.get_total_norm(
        [weight.grad for weight in weights if weight.grad is not None]
    )
    bad_losses = torch.stack(bad)
    flags = [bad_losses.any(), ~torch.isfinite(norm), torch.full_like(norm, stop)]
    agreed = all_reduce_max(torch.stack([flag.float() for flag in flags])).tolist()
    any_bad_loss, any_bad_gradient, stop_anywhere = agreed
    applied = not (any_bad_loss or any_bad_gradient)
    if applied:
        if phase.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(weights, phase.max_grad_norm, norm)
        optimizer.step()
        suspects: list[tuple[str, ...]] = []
    else:
        restore_buffers(buffers)
        # DDP has averaged the gradients: if every loss is good, nobody can tell whose
        # pair it was, and each rank names its own.
        is_suspect = bad_losses if any_bad_loss else ~bad_losses
        suspects = list(compress(pairs, is_suspect.tolist()))
    return StepResult(
        torch.stack(metrics).nanmean(0),
        applied,
        tuple(name for pair in suspects for name in pair),
        int(stop_anywhere),
    )


def batch_metrics(
    prediction: Prediction,
    terms: LossTerms,
    prior: Tensor | None,
    covered: Tensor | None = None,
) -> Tensor:
    """The `StepMetrics` of a batch, (8,), without gradients; NaN if not known."""
    field = prediction.field.detach()
    length = _mean_length(field)
    change = length if prior is None else _mean_length(field - prior)
    if covered is None:
        covered = torch.full_like(length, float("nan"))
    return torch.stack([*(term.detach() for term in terms), length, change, covered])


def _mean_length(field: Tensor) -> Tensor:
    # hypot, since a norm over 2 channels takes 80 times as long.
    return torch.hypot(field[:, 0], field[:, 1]).mean()
