"""Configure the training of one stage, and compare it with an earlier run's config."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metroem.data.dataset import Split
from metroem.data.sampling import EpochSeed, num_steps
from metroem.errors import UsageError
from metroem.io.origins import origin_digest
from metroem.models.weights import checkpoint_path
from metroem.specs.modules import ModuleSpec
from metroem.specs.schedule import Phase
from metroem.training.checkpoint import RunFolder, TrainingState
from metroem.training.write_fields import WriteFieldsConfig

# Keys of a fingerprint that are not flags.
SCHEDULE, PAIRS = "schedule", "training pairs"
IMAGES, PRIORS = "images", "prior fields"


@dataclass(frozen=True)
class StageConfig:
    """The configuration of the training of one stage.

    Attributes:
        module: is trained.
        phases: of its schedule, in order.
        split: its pairs.
        run: folder of the state.
        checkpoint_name: of the weights.
        device: of this rank.
        seed: of all randomness.
        batch_size: pairs of a batch, over all ranks; None leaves it to the phase.
        num_workers: data-loading processes per rank.
        precision: "fp32" or "bf16" inside the network.
        compiles: whether the network is compiled.
        checkpoints_activations: whether activations are computed a second time in the
            backward pass instead of being kept for it.
        earlier: the modules of the earlier stages.
        fields: how its fields are written afterwards; None if they are not.
        keeps_labels: whether the network makes all pseudo-labels as it was at first:
            in trainings that begin from weights.
        rank: of this process.
        num_ranks: number of processes that train.
    """

    module: ModuleSpec
    phases: tuple[Phase, ...]
    split: Split
    run: RunFolder
    checkpoint_name: str
    device: torch.device
    seed: int
    batch_size: int | None
    num_workers: int
    precision: str
    compiles: bool = False
    checkpoints_activations: bool = False
    earlier: tuple[ModuleSpec, ...] = ()
    fields: WriteFieldsConfig | None = None
    keeps_labels: bool = False
    rank: int = 0
    num_ranks: int = 1

    @property
    def stage(self) -> int:
        """Number of the stage."""
        return self.module.stage

    @property
    def best_weights(self) -> Path:
        """Path of the module's checkpoint, to which the best weights are written."""
        return checkpoint_path(self.module.weights_folder, self.checkpoint_name)

    def batch_of(self, phase: Phase) -> int:
        """Pairs of a batch of a phase, over all ranks: see `batch_size_of`."""
        return batch_size_of(phase, self.batch_size, self.num_ranks)

    def pairs_of_update(self, phase: Phase) -> int:
        """Pairs of one update of the weights, over all its batches and ranks."""
        return self.batch_of(phase) * phase.accumulate

    def num_updates(self, phase: Phase) -> int:
        """Updates of one epoch of a phase."""
        num_pairs = len(self.split.training)
        return num_steps(phase, num_pairs, self.pairs_of_update(phase))

    def epoch_seed(self, state: TrainingState) -> EpochSeed:
        """Seed of the samples of a state's current epoch."""
        return EpochSeed(self.seed, self.stage, state.phase, state.epoch)

    def loss_seed(self, state: TrainingState) -> tuple[int, ...]:
        """Seed of the randomness inside the losses of a step."""
        # Negative, since samples use the numbers from 0 up.
        return self.seed, self.stage, state.phase, state.epoch, -1 - state.step

    def fingerprint(self) -> dict[str, Any]:
        """All settings that must be equal for a training to be resumed, as JSON.

        Phases are written with all keys of a schedule, defaults too.
        """
        size = self.batch_size
        if size is None and not all(phase.batch_size for phase in self.phases):
            # One pair per rank: another number of ranks would change the steps.
            size = self.num_ranks if self.num_ranks > 1 else None
        # Held-out pairs too, since they decide which weights are best.
        refs = [*self.split.training, *self.split.validation]
        priors = {ref.prior.path: ref.prior for ref in refs if ref.prior is not None}
        return {
            SCHEDULE: [phase.to_json() for phase in self.phases],
            PAIRS: [ref.name for ref in self.split.training],
            IMAGES: [ref.images.identity(ref.index) for ref in refs],
            PRIORS: [origin_digest(prior) for prior in priors.values()],
            "--seed": self.seed,
            "--batch_size": size,
            "--precision": self.precision,
        }


def batch_size_of(phase: Phase, batch_size: int | None, num_ranks: int) -> int:
    """Pairs of a batch of a phase, over all ranks: at least one each.

    Args:
        phase: may have a batch size of its own.
        batch_size: of --batch_size, which takes precedence over the phase.
        num_ranks: number of ranks that share the batch.

    Raises:
        UsageError: the ranks cannot share the pairs evenly.
    """
    size = batch_size or phase.batch_size or num_ranks
    if size % num_ranks:
        raise UsageError(
            f"batch size {size} (--batch_size, or batch_size of the schedule): the "
            f"pairs of a step are shared by {num_ranks} ranks; expected a multiple of "
            f"{num_ranks}"
        )
    return size


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe for a user how two fingerprints differ; "" if they are equal."""
    said = []
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == SCHEDULE and isinstance(old, list) and isinstance(new, list):
            said += _schedule_differences(old, new)
        elif key == PAIRS and isinstance(old, list) and isinstance(new, list):
            said.append(_pair_differences(old, new))
        elif key == IMAGES:
            said.append("the images of the pairs are not the same")
        elif key == PRIORS:
            said.append("the prior fields of the pairs are not the same")
        else:
            said.append(f"{key} was {_text(old)}, is {_text(new)}")
    return "; ".join(said)


def _schedule_differences(before: list[Any], now: list[Any]) -> Iterator[str]:
    if len(before) != len(now):
        yield f"the schedule had {len(before)} phases, has {len(now)}"
        return
    for number, (old, new) in enumerate(zip(before, now, strict=True), start=1):
        for where, was, is_ in _json_differences(old, new):
            yield f"{where} of phase {number} was {was}, is {is_}"


def _json_differences(
    before: Any, now: Any, where: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Yield each position where two JSON values differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            inner = f"{where} {key}".strip()
            if key not in before:
                yield inner, "not there", _text(now[key])
            elif key not in now:
                yield inner, _text(before[key]), "not there"
            else:
                yield from _json_differences(before[key], now[key], inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _json_differences(old, new, f"{where} {index}")
    elif before != now:
        yield where, _text(before), _text(now)


def _pair_differences(before: list[str], now: list[str]) -> str:
    gone = [name for name in before if name not in set(now)]
    new = [name for name in now if name not in set(before)]
    changes = [
        f"{len(names)} {what}, such as {names[0]}"
        for names, what in ((gone, "are gone"), (new, "are new"))
        if names
    ]
    how = " and ".join(changes) or "their order has changed"
    return f"the pairs to train on are not the same ({how})"


def _text(value: Any) -> str:
    """Format a value as JSON, at most 100 characters."""
    if value is None:
        return "not given"
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else f"{text[:97]}..."
