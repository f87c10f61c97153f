"""One update from one batch, and what held-out pairs say of it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metroem.aligner import Aligner, Prediction
from metroem.data.augment import random_field
from metroem.data.dataset import PairRef
from metroem.data.epoch import ValidationPairs
from metroem.data.sample import Sample, seeded_generator
from metroem.loss import LossTerms, PairLoss, metric_loss, plain_loss
from metroem.masks import PairMaps, weigh
from metroem.specs.augmentations import RandomWarp
from metroem.specs.schedule import Phase
from metroem.training.distributed import largest, rank, total, world_size

# A loss above this is taken for a failure, as in the original.
BAD_LOSS = 1e3
# "Before alignment" of a metric loss with pure_emb, as in the original.
_PURE_EMBEDDING_WARP = RandomWarp(difficulty=2, min_disp=-50, max_disp=50)


class Scores(NamedTuple):
    """How well a network does, as numbers for people."""

    loss: float  # what the phase minimises
    similarity: float  # grey levels (or features) squared
    rigidity: float  # px^2
    before: float  # similarity before alignment, of a metric loss
    field_px: float  # mean length of the field, pixels
    change_px: float  # mean length of what it adds to the prior field, pixels

    def as_text(self) -> str:
        """The scores for a line of a log."""
        return (
            f"{self.loss:.4g} (similarity {self.similarity:.4g}, rigidity "
            f"{self.rigidity:.3g}, field {self.field_px:.2f} px)"
        )


class Step(NamedTuple):
    """What one step did."""

    scores: Tensor  # (6,) `Scores` of this rank's samples
    taken: bool  # False when a rank's loss or gradient was bad
    suspect: bool  # this rank's samples may be why it was not
    stop: int  # largest stop code of all ranks


class TrainingModel(nn.Module):
    """An aligner as DDP wants it: one forward that gives all a loss needs."""

    def __init__(self, aligner: Aligner, precision: str) -> None:
        super().__init__()
        self.net = aligner.net
        self._predict = aligner.predict
        self._is_bf16 = precision == "bf16"

    def forward(self, sample: Sample, levels: tuple[int, ...]) -> Prediction:
        """Field and embeddings of a batch; bf16 inside the network if asked."""
        device = sample.src.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._is_bf16):
            prediction = self._predict(
                sample.src, sample.tgt, sample.prior_field, levels=levels
            )
        embeddings = {
            level: type(pair)(pair.src.float(), pair.tgt.float())
            for level, pair in prediction.embeddings.items()
        }
        return Prediction(prediction.field.float(), embeddings)


def phase_loss(
    phase: Phase,
    sample: Sample,
    prediction: Prediction,
    generator: torch.Generator,
) -> LossTerms:
    """The loss that a phase minimises.

    Args:
        phase: what counts and how much.
        sample: the batch.
        prediction: field and embeddings of it.
        generator: chance for `pure_emb`.
    """
    maps = PairMaps(sample.src, sample.tgt, sample.src_defects, sample.tgt_defects)
    pair = PairLoss(
        prediction.field,
        weigh(phase.similarity_rules, maps),
        weigh(phase.smoothness_rules, maps),
        phase.smoothness,
    )
    if phase.loss.type == "plain":
        return plain_loss(sample.src, sample.tgt, pair)
    levels = [
        (level, prediction.embeddings[level].src, prediction.embeddings[level].tgt)
        for level in phase.loss.levels
    ]
    moved = None
    if phase.loss.pure_emb:
        moved = random_field(sample.src.shape[-2:], _PURE_EMBEDDING_WARP, generator)
        moved = moved.to(sample.src.device)
    return metric_loss(levels, pair, phase.loss, moved=moved)


def train_step(
    predict: Callable[[], Prediction],
    loss_of: Callable[[Prediction], LossTerms],
    optimizer: torch.optim.Optimizer,
    *,
    prior: Tensor | None,
    stop: int,
) -> Step:
    """One update from one batch; skipped on all ranks if any went bad.

    Every rank always runs backward, since DDP waits there for the others. A
    skipped step leaves parameters and optimizer as they were.

    Args:
        predict: runs the model on the batch.
        loss_of: the loss of its prediction.
        optimizer: of the model's parameters.
        prior: prior field of the batch, for the scores.
        stop: this rank's stop code; the largest of all ranks is returned.
    """
    optimizer.zero_grad(set_to_none=True)
    prediction = predict()
    terms = loss_of(prediction)
    terms.total.backward()
    gradients = [
        p.grad
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    ]
    bad_loss = ~(terms.total.detach().abs() <= BAD_LOSS)
    bad_gradient = ~torch.isfinite(torch.nn.utils.get_total_norm(gradients))
    flags = torch.stack([bad_loss, bad_gradient, bad_loss]).float()
    flags[2] = stop
    any_bad_loss, any_bad_gradient, stop_anywhere = largest(flags).tolist()
    taken = not (any_bad_loss or any_bad_gradient)
    scores = scores_of(prediction, terms, prior)
    if taken:
        optimizer.step()
    return Step(
        scores,
        taken,
        # DDP has averaged the gradients: with every loss good, whose pair it was
        # cannot be told, and each rank names its own.
        not taken and (bool(bad_loss) or not any_bad_loss),
        int(stop_anywhere),
    )


def scores_of(prediction: Prediction, terms: LossTerms, prior: Tensor | None) -> Tensor:
    """The `Scores` of a batch, (6,), without gradients."""
    field = prediction.field.detach()
    change = field if prior is None else field - prior
    lengths = [f.norm(dim=1).mean() for f in (field, change)]
    return torch.stack([*(term.detach() for term in terms), *lengths])


def validate(
    model: nn.Module,
    pairs: Sequence[PairRef],
    phase: Phase,
    *,
    seed: int,
    device: torch.device,
) -> Scores | None:
    """Mean scores over the held-out pairs, which the ranks share.

    Args:
        model: a `TrainingModel`, or DDP around one; left in training mode.
        pairs: held out; without any there are no scores.
        phase: whose loss is measured.
        seed: for losses that draw chance.
        device: of the model.
    """
    if not pairs:
        return None
    samples = ValidationPairs(pairs, phase)
    inner = getattr(model, "module", model)
    inner.eval()
    sums = torch.zeros(len(Scores._fields), device=device)
    for index in range(rank(), len(pairs), world_size()):
        sample = samples[index].to(device)
        with torch.no_grad():
            prediction = inner(sample, phase.loss.embedding_levels)
            chance = seeded_generator(seed, index)
            terms = phase_loss(phase, sample, prediction, chance)
        sums += scores_of(prediction, terms, sample.prior_field)
    inner.train()
    return Scores(*(total(sums) / len(pairs)).tolist())
