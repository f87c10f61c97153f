"""What the training of one stage is asked to do."""

from dataclasses import dataclass
from typing import Any

import torch
from msgspec.structs import fields

from metroem.data.dataset import Split
from metroem.errors import UsageError
from metroem.io.origins import origin_digest
from metroem.specs.pyramid import ModuleSpec
from metroem.specs.schedule import Phase
from metroem.training import distributed
from metroem.training.earlier import DATA_KEYS, PAIRS

_ADDED = ("accumulate", "ema")  # keys that phases have had since 1.0


@dataclass(frozen=True)
class TrainingSettings:
    """How a run trains, whatever the stage.

    Attributes:
        checkpoint_name: of the weights.
        device: of this rank.
        seed: what all chance is drawn from.
        batch_size: pairs of a step, over all ranks; None leaves it to the phase.
        num_workers: processes that read samples, per rank.
        precision: "fp32" or "bf16" inside the network.
        compiles: whether the network is compiled.
        checkpoints_activations: whether they are computed again, not kept.
    """

    checkpoint_name: str
    device: torch.device
    seed: int
    batch_size: int | None
    num_workers: int
    precision: str
    compiles: bool = False
    checkpoints_activations: bool = False

    def batch_of(self, phase: Phase) -> int:
        """Pairs of a batch of a phase, over all ranks: at least one each.

        Raises:
            UsageError: the ranks cannot share them evenly.
        """
        ranks = distributed.world_size()
        size = self.batch_size or phase.batch_size or ranks
        if size % ranks:
            raise UsageError(
                f"batch size {size} (--batch_size, or batch_size of the schedule): the "
                f"pairs of a step are shared by {ranks} ranks; expected a multiple of "
                f"{ranks}"
            )
        return size

    def pairs_of_update(self, phase: Phase) -> int:
        """Pairs of one update of the weights: those of all its batches."""
        return self.batch_of(phase) * phase.accumulate


@dataclass(frozen=True)
class StageJob:
    """What is to be trained, and on what.

    Attributes:
        module: what is trained.
        phases: of its schedule, in turn.
        split: its pairs.
        settings: of the run.
        before: the stages before it.
    """

    module: ModuleSpec
    phases: tuple[Phase, ...]
    split: Split
    settings: TrainingSettings
    before: tuple[ModuleSpec, ...] = ()

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a run to go on from a saved state."""
        size = self.settings.batch_size
        if size is None and not all(phase.batch_size for phase in self.phases):
            # One pair a rank: with other ranks, steps would be of other pairs.
            ranks = distributed.world_size()
            size = ranks if ranks > 1 else None
        return {
            "the phases of the schedule": [_described(phase) for phase in self.phases],
            PAIRS: [ref.name for ref in self.split.training],
            **self._data(),
            "--seed": self.settings.seed,
            "--batch_size": size,
            "--precision": self.settings.precision,
        }

    def _data(self) -> dict[str, list[str]]:
        """What the pairs are, those held out too: they say which weights are best."""
        refs = [*self.split.training, *self.split.validation]
        priors = {ref.prior.path: ref.prior for ref in refs if ref.prior is not None}
        values = (
            [ref.images.identity(ref.index) for ref in refs],
            [origin_digest(prior) for prior in priors.values()],
        )
        return dict(zip(DATA_KEYS, values, strict=True))


def _described(phase: Phase) -> str:
    """A phase in words, as states of earlier versions have it.

    Keys that came later are named only where they are used.
    """
    shown = {
        field.name: getattr(phase, field.name)
        for field in fields(phase)
        if field.name not in _ADDED or getattr(phase, field.name) != field.default
    }
    return f"Phase({', '.join(f'{name}={value!r}' for name, value in shown.items())})"
