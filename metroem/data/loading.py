"""The batches of a phase, read ahead by processes that stay for all its epochs."""

from collections.abc import Generator, Iterable, Iterator, Sequence

import torch

from metroem.data.dataset import PairRef
from metroem.data.epoch import EpochKey, TrainingEpoch, num_steps
from metroem.data.sample import Sample, stack_samples
from metroem.errors import MetroEMError
from metroem.specs.schedule import Phase

# Epoch of the phase, and position in it.
Place = tuple[int, int]


class PhaseSamples(torch.utils.data.Dataset[Sample]):
    """The samples of all epochs of a phase, by their place.

    A process that reads them goes from epoch to epoch without being started anew,
    and begins the next while the last is validated.

    Raises:
        DatasetError: see `TrainingEpoch`.
    """

    def __init__(
        self,
        pairs: Sequence[PairRef],
        phase: Phase,
        key: EpochKey,
        *,
        update_size: int,
    ) -> None:
        """`key`: of the epoch that is read first; `update_size`: pairs of an update,
        of all batches that it has, over all ranks.
        """
        self.pairs, self.phase, self.update_size = pairs, phase, update_size
        self._epoch = TrainingEpoch(pairs, phase, key, batch_size=update_size)

    def __getitem__(self, place: Place) -> Sample:
        epoch, position = place
        key = self._epoch.key
        if epoch != key.epoch:
            key = EpochKey(key.seed, key.stage, key.phase, epoch)
            self._epoch = TrainingEpoch(
                self.pairs, self.phase, key, batch_size=self.update_size
            )
        return self._epoch[position]

    def batches(
        self, step: int, size: int, *, rank: int, ranks: int
    ) -> Iterator[list[Place]]:
        """One rank's share of each batch from an update of the first epoch on.

        Args:
            step: updates of the epoch that is read first that are done.
            size: pairs of a batch over all ranks; divides those of an update.
            rank: of this process.
            ranks: how many share each batch evenly.
        """
        share = size // ranks
        num_updates = num_steps(self.phase, len(self.pairs), self.update_size)
        for epoch in range(self._epoch.key.epoch, self.phase.num_epochs):
            begin, end = step * self.update_size, num_updates * self.update_size
            for start in range(begin + rank * share, end, size):
                yield [(epoch, start + i) for i in range(share)]
            step = 0


class _OrRefusals(torch.utils.data.Dataset[Sample | MetroEMError]):
    """Samples, or why there is none.

    torch would wrap what a process raises into a traceback of it.
    """

    def __init__(self, samples: PhaseSamples) -> None:
        self.samples = samples

    def __getitem__(self, place: Place) -> Sample | MetroEMError:
        try:
            return self.samples[place]
        except MetroEMError as error:
            return error


def _stacked(batch: list[Sample | MetroEMError]) -> Sample | MetroEMError:
    """One sample of all, or the first refusal."""
    refusals = (one for one in batch if isinstance(one, MetroEMError))
    return next(refusals, None) or stack_samples(batch)  # type: ignore[arg-type]


def read_ahead(
    samples: PhaseSamples,
    batches: Iterable[list[Place]],
    *,
    num_workers: int,
    pin_memory: bool,
) -> Generator[Sample, None, None]:
    """Read batches in their order.

    Args:
        samples: read from.
        batches: places of the samples of each.
        num_workers: processes that read ahead, two batches each; 0 reads when
            asked. They end when this is closed.
        pin_memory: into memory that a GPU copies from while it works.

    Raises:
        MetroEMError: a sample cannot be read, in whichever process.
    """
    for sample in torch.utils.data.DataLoader(
        _OrRefusals(samples),
        batch_sampler=batches,
        collate_fn=_stacked,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the global one is drawn from
    ):
        if isinstance(sample, MetroEMError):
            raise sample
        yield sample
