"""The batches of a phase, read ahead by processes that stay for all its epochs."""

import functools
import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metroem.data.dataset import PairRef
from metroem.data.sample import Sample, stack_samples
from metroem.data.sampling import EpochSeed, TrainingEpoch, num_steps
from metroem.errors import MetroEMError, ResourceError
from metroem.specs.schedule import Phase

logger = logging.getLogger(__name__)

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
        key: EpochSeed,
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
            key = EpochSeed(key.seed, key.stage, key.phase, epoch)
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


class _ByPipe:
    """A sample that a process hands over as bytes; it arrives as a `Sample`."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    def __reduce__(self) -> tuple[Any, ...]:
        as_arrays = [v.numpy() if isinstance(v, Tensor) else v for v in self.sample]
        return _from_pipe, (as_arrays,)


def _from_pipe(values: list[Any]) -> Sample:
    _say_that_memory_is_short()
    tensors = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in values]
    return Sample(*tensors)  # type: ignore[arg-type]


@functools.cache  # once is enough
def _say_that_memory_is_short() -> None:
    logger.warning(
        "/dev/shm, the shared memory, is too small for the samples of --num_workers, "
        "which take the slower way through pipes: give the container more "
        "(as Docker with shm-size=2g), or lower --num_workers"
    )


def _stacked(
    batch: list[Sample | MetroEMError],
) -> Sample | _ByPipe | MetroEMError:
    """One sample of all, ready to be handed over, or the first refusal."""
    refusals = (one for one in batch if isinstance(one, MetroEMError))
    if (refusal := next(refusals, None)) is not None:
        return refusal
    sample = stack_samples(batch)  # type: ignore[arg-type]
    if torch.utils.data.get_worker_info() is None:
        return sample
    try:
        # Now: torch would do it in a thread that dies unseen where there is too little
        # of it, as the 64 MB of a Docker container, and training would wait for ever.
        for value in sample:
            if isinstance(value, Tensor):
                value.share_memory_()
    except RuntimeError:
        return _ByPipe(sample)
    return sample


def make_loader(
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
        ResourceError: the processes cannot be started.
        RuntimeError: one of them was killed, as torch says it; see `enough_memory`.
    """
    loader = torch.utils.data.DataLoader(
        _OrRefusals(samples),
        batch_sampler=batches,
        collate_fn=_stacked,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the global one is drawn from
    )
    try:
        read = iter(loader)
    except OSError as error:
        raise ResourceError(
            f"--num_workers {num_workers}: the processes that read cannot be started "
            f"({error}); they need room in /dev/shm (as Docker with shm-size=2g) and "
            "open files (ulimit -n): give more, or --num_workers 0"
        ) from error
    while True:
        try:
            sample = next(read)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:
            raise RuntimeError(
                f"DataLoader worker ended at a sample: {error}"
            ) from error
        if isinstance(sample, MetroEMError):
            raise sample
        yield sample
