"""Make one update of the weights from one or more batches, and return its metrics."""

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
from metroem.training.buffers import evaluating, restore_buffers, save_buffers
from metroem.training.model import unwrap_model
from metroem.training.phase_loss import covered, levels_wanted, phase_loss
from metroem.training.targets import NUM_ORIENTATIONS, EarlierStages, add_pseudo_label
from metroem.utils.distributed import all_reduce_max

# A loss above this counts as a failure, as in the original.
BAD_LOSS = 1e3
# A network whose `covered` is below this has collapsed.
LEAST_COVERED = 0.1


class StepMetrics(NamedTuple):
    """Metrics of a network on one or more batches."""

    loss: float  # what the phase minimises
    similarity: float  # grey levels (or features) squared
    rigidity: float  # px^2
    before: float  # similarity before alignment, for a metric loss
    epe_px: float  # distance from the target field, for known_warp and distil
    field_px: float  # mean length of the field, pixels
    change_px: float  # mean length of field - prior field, pixels
    covered: float = float("nan")  # fraction of pixels in view: `phase_loss.covered`

    def as_text(self) -> str:
        """Format the known metrics for a line of the log."""
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
        """The metrics by name; unknown ones are None."""
        return {k: None if v != v else v for k, v in self._asdict().items()}

    @property
    def has_collapsed(self) -> bool:
        """Whether the field keeps less than `LEAST_COVERED` of the pairs in view."""
        return self.covered < LEAST_COVERED

    @property
    def is_known(self) -> bool:
        """Whether the loss is finite and was taken over at least one pixel."""
        return math.isfinite(self.loss) and self.covered != 0


class StepResult(NamedTuple):
    """The result of one step."""

    metrics: Tensor  # (8,) `StepMetrics` of this rank's samples
    applied: bool  # False if the loss or gradient of any rank was bad
    bad_pairs: tuple[str, ...]  # of this rank: pairs that may have been the cause
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
    """Make one update of the weights from the mean loss of batches.

    If a loss or a gradient of any rank is bad, all ranks skip the update. Weights,
    buffers and optimizer then stay as they were. Every rank always runs every backward
    pass, since DDP waits there for the other ranks.

    Args:
        model: a `TrainingModel`, or DDP around one, in training mode.
        optimizer: of its weights.
        batches: `phase.accumulate` batches on the device of the model, read lazily.
        phase: has the losses, `accumulate` and `max_grad_norm`.
        earlier: makes the prior fields of warped samples.
        loss_seed: of the randomness inside losses, the same for each batch.
        stop: this rank's stop code.
    """
    net = unwrap_model(model)
    levels = levels_wanted(phase, net.options)
    buffers = save_buffers(net)
    optimizer.zero_grad(set_to_none=True)
    pairs, bad, metrics = [], [], []
    for number, sample in enumerate(batches, start=1):
        pairs.append(sample.pair)
        sample = earlier.add_prior(sample)
        with evaluating(net):
            labeller = earlier.labeller or net
            drawn = torch.randint(
                NUM_ORIENTATIONS, (), generator=seeded_generator(*loss_seed, number)
            )
            sample = add_pseudo_label(sample, labeller, phase.known_warp, int(drawn))
        # DDP averages the gradients of the ranks once, at the last batch.
        is_last = number == phase.accumulate
        with nullcontext() if is_last else getattr(model, "no_sync", nullcontext)():
            prediction = model(sample, levels)
            generator = seeded_generator(*loss_seed)
            terms = phase_loss(phase, sample, prediction, generator, net.options)
            in_view = covered(sample, prediction.field.detach())
            metrics.append(
                batch_metrics(prediction, terms, sample.prior_field, in_view)
            )
            (terms.total / phase.accumulate).backward()
        bad.append(~(terms.total.detach().abs() <= BAD_LOSS))
        del sample, prediction, terms  # free their memory before the next batch

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
        bad_batches: list[tuple[str, ...]] = []
    else:
        restore_buffers(buffers)
        # DDP has averaged the gradients. If every loss is good, the pair at fault is
        # unknown, and each rank names all of its pairs.
        is_bad = bad_losses if any_bad_loss else ~bad_losses
        bad_batches = list(compress(pairs, is_bad.tolist()))
    return StepResult(
        torch.stack(metrics).nanmean(0),
        applied,
        tuple(name for names in bad_batches for name in names),
        int(stop_anywhere),
    )


def batch_metrics(
    prediction: Prediction,
    terms: LossTerms,
    prior: Tensor | None,
    covered: Tensor | None = None,
) -> Tensor:
    """Compute the `StepMetrics` of a batch, (8,), without gradients; NaN if unknown."""
    field = prediction.field.detach()
    length = _mean_length(field)
    change = length if prior is None else _mean_length(field - prior)
    if covered is None:
        covered = torch.full_like(length, float("nan"))
    return torch.stack([*(term.detach() for term in terms), length, change, covered])


def _mean_length(field: Tensor) -> Tensor:
    # hypot, since a norm over 2 channels takes 80 times as long.
    return torch.hypot(field[:, 0], field[:, 1]).mean()
