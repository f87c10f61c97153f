"""One update from one or more batches, and what held-out pairs say of it."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metroem.aligner import Prediction
from metroem.data.epoch import ValidationPairs
from metroem.data.sample import Sample, seeded_generator
from metroem.loss import LossTerms
from metroem.training.buffers import evaluating
from metroem.training.distributed import largest, rank, total, world_size
from metroem.training.model import TrainingModel, inner_model
from metroem.training.natural import with_natural_field
from metroem.training.objectives import covered, levels_wanted, phase_loss
from metroem.training.priors import StagesBefore

# A loss above this is taken for a failure, as in the original.
BAD_LOSS = 1e3
# A network that leaves less of its pairs to compare has collapsed.
LEAST_COVERED = 0.1


class Scores(NamedTuple):
    """How well a network does, as numbers for people."""

    loss: float  # what the phase minimises
    similarity: float  # grey levels (or features) squared
    rigidity: float  # px^2
    before: float  # similarity before alignment, of a metric loss
    epe_px: float  # distance from the field wanted, of known_warp and distil
    field_px: float  # mean length of the field, pixels
    change_px: float  # mean length of what it adds to the prior field, pixels
    # Share of what the pairs show that the field leaves to compare.
    covered: float = float("nan")

    def as_text(self) -> str:
        """The scores for a line of a log."""
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
        """The scores by name; None for what is not known."""
        return {k: None if v != v else v for k, v in self._asdict().items()}

    @property
    def has_collapsed(self) -> bool:
        """Whether the field leaves next to nothing of the pairs to compare."""
        return self.covered < LEAST_COVERED

    @property
    def is_known(self) -> bool:
        """Whether the loss says how good the network is: of some pixel at least."""
        return math.isfinite(self.loss) and self.covered != 0


class Step(NamedTuple):
    """What one step did."""

    scores: Tensor  # (8,) `Scores` of this rank's samples
    taken: bool  # False when a rank's loss or gradient was bad
    suspects: tuple[bool, ...]  # which batches of this rank may be why it was not
    stop: int  # largest stop code of all ranks


class HeldOut(NamedTuple):
    """What a network makes of a held-out pair."""

    sample: Sample
    field: Tensor  # (B, 2, H, W), px of the sample's mip


class EpochReport(NamedTuple):
    """What is known at the end of some epochs."""

    stage: int
    epochs: int  # of the stage that are done, over all its phases
    training: Scores
    validation: Scores | None  # None without held-out pairs, as the next
    held_out: HeldOut | None  # the first of them


Watch = Callable[[EpochReport], None]
# Runs the model on one batch: what is minimised, and the `Scores`, (8,).
Batch = Callable[[], tuple[LossTerms, Tensor]]


def train_step(
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    num_batches: int = 1,
    stop: int,
    max_grad_norm: float | None = None,
    unsynced: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Step:
    """One update from the mean loss of batches; skipped on all ranks if any went bad.

    Every rank always runs every backward pass, since DDP waits there for the others.
    A skipped step leaves parameters and optimizer as they were.

    Args:
        batches: each runs the model when it is called.
        optimizer: of the model's parameters.
        num_batches: how many there are.
        stop: this rank's stop code; the largest of all ranks is returned.
        max_grad_norm: gradients are clipped to it.
        unsynced: within it DDP leaves the gradients of each rank to themselves,
            until the last batch averages them all.
    """
    optimizer.zero_grad(set_to_none=True)
    bad, scores = [], []
    for number, batch in enumerate(batches, start=1):
        with unsynced() if number < num_batches else nullcontext():
            terms, batch_scores = batch()
            (terms.total / num_batches).backward()
        bad.append(~(terms.total.detach().abs() <= BAD_LOSS))
        scores.append(batch_scores)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in parameters if p.grad is not None]
    )
    bad_losses = torch.stack(bad)
    flags = [bad_losses.any(), ~torch.isfinite(norm), torch.full_like(norm, stop)]
    verdict = largest(torch.stack([flag.float() for flag in flags])).tolist()
    any_bad_loss, any_bad_gradient, stop_anywhere = verdict
    taken = not (any_bad_loss or any_bad_gradient)
    if taken:
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        optimizer.step()
    # DDP has averaged the gradients: with every loss good, whose pair it was cannot
    # be told, and each rank names its own.
    named = bad_losses if any_bad_loss else ~bad_losses
    suspects = tuple(not taken and bool(is_bad) for is_bad in named)
    return Step(torch.stack(scores).nanmean(0), taken, suspects, int(stop_anywhere))


def scores_of(
    prediction: Prediction,
    terms: LossTerms,
    prior: Tensor | None,
    covered: Tensor | None = None,
) -> Tensor:
    """The `Scores` of a batch, (8,), without gradients; NaN for what is not known."""
    field = prediction.field.detach()
    length = _mean_length(field)
    change = length if prior is None else _mean_length(field - prior)
    if covered is None:
        covered = torch.full_like(length, float("nan"))
    return torch.stack([*(term.detach() for term in terms), length, change, covered])


def _mean_length(field: Tensor) -> Tensor:
    # hypot, since a norm over 2 channels takes 80 times as long.
    return torch.hypot(field[:, 0], field[:, 1]).mean()


def validate(
    model: nn.Module,
    samples: ValidationPairs,
    before: StagesBefore,
    *,
    seed: int,
    device: torch.device,
) -> Scores | None:
    """Mean scores over the held-out pairs, which the ranks share.

    Each is a mean over the pairs that have it, and NaN where none has.

    Args:
        model: a `TrainingModel`, or DDP around one; left in the mode that it is in.
        samples: held out, of the phase whose loss is measured; without any there
            are no scores.
        before: the stages before, which give samples of known warps their prior.
        seed: of losses that draw chance.
        device: of the model.
    """
    if not len(samples):
        return None
    phase = samples.phase
    inner = inner_model(model)
    sums = torch.zeros(2, len(Scores._fields), device=device)
    for index in range(rank(), len(samples), world_size()):
        with torch.no_grad(), evaluating(inner):
            sample, prediction = _predict_held_out(
                inner, samples, index, before, device
            )
            chance = seeded_generator(seed, index)
            terms = phase_loss(
                phase, sample, prediction, chance, inner.options, is_score=True
            )
            share = covered(sample, prediction.field)
        scores = scores_of(prediction, terms, sample.prior_field, share)
        known = ~scores.isnan()
        sums += torch.stack((torch.where(known, scores, 0.0), known))
    values, counts = total(sums)
    return Scores(*(values / counts).tolist())


def first_held_out(
    model: nn.Module,
    samples: ValidationPairs,
    before: StagesBefore,
    *,
    device: torch.device,
) -> HeldOut | None:
    """What the network makes of the first held-out pair; None without any.

    For one rank alone: nothing is shared. Arguments as `validate`.
    """
    if not len(samples):
        return None
    inner = inner_model(model)
    with torch.no_grad(), evaluating(inner):
        sample, prediction = _predict_held_out(inner, samples, 0, before, device)
    return HeldOut(sample, prediction.field)


def _predict_held_out(
    model: TrainingModel,
    samples: ValidationPairs,
    index: int,
    before: StagesBefore,
    device: torch.device,
) -> tuple[Sample, Prediction]:
    """A held-out sample, complete, and what the network makes of it."""
    sample = before.with_prior(samples[index].to(device))
    sample = with_natural_field(sample, model, samples.phase.known_warp)
    return sample, model(sample, levels_wanted(samples.phase, model.options))
