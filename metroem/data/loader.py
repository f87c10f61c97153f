"""Read the batches of a phase ahead, by worker processes that serve all its epochs."""

import functools
import logging
import time
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

# Seconds in which the system tells of a worker that was killed.
_DYING_S = 1.0
# (epoch of the phase, position in the epoch)
Position = tuple[int, int]


class PhaseSamples(torch.utils.data.Dataset[Sample]):
    """The samples of all epochs of a phase, by epoch and position.

    A worker process reads one epoch after the other without being started again. It
    begins the next epoch while the last one is validated.

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
        """Start at an epoch.

        Args:
            pairs: to train on.
            phase: of the schedule.
            key: of the epoch that is read first.
            update_size: pairs of an update: of all its batches, over all ranks.
        """
        self.pairs, self.phase, self.update_size = pairs, phase, update_size
        self._epoch = TrainingEpoch(pairs, phase, key, batch_size=update_size)

    def __getitem__(self, index: Position) -> Sample:
        epoch, position = index
        key = self._epoch.key
        if epoch != key.epoch:
            key = EpochSeed(key.seed, key.stage, key.phase, epoch)
            self._epoch = TrainingEpoch(
                self.pairs, self.phase, key, batch_size=self.update_size
            )
        return self._epoch[position]

    def batches(
        self, step: int, size: int, *, rank: int, ranks: int
    ) -> Iterator[list[Position]]:
        """Yield one rank's part of each batch, from an update of the first epoch on.

        Args:
            step: number of updates that are already done in the first epoch.
            size: pairs of a batch over all ranks; divides the pairs of an update.
            rank: of this process.
            ranks: number of ranks, which share each batch evenly.
        """
        per_rank = size // ranks
        num_updates = num_steps(self.phase, len(self.pairs), self.update_size)
        for epoch in range(self._epoch.key.epoch, self.phase.num_epochs):
            begin, end = step * self.update_size, num_updates * self.update_size
            for start in range(begin + rank * per_rank, end, size):
                yield [(epoch, start + i) for i in range(per_rank)]
            step = 0


class _SamplesOrErrors(torch.utils.data.Dataset[Sample | MetroEMError]):
    """Samples, or the error of one that cannot be read.

    Errors are returned, since torch would add the worker's traceback to the message of
    a raised one.
    """

    def __init__(self, samples: PhaseSamples) -> None:
        self.samples = samples

    def __getitem__(self, index: Position) -> Sample | MetroEMError:
        try:
            return self.samples[index]
        except MetroEMError as error:
            return error


class _PipedSample:
    """A sample that a worker sends as bytes; it arrives as a `Sample`."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    def __reduce__(self) -> tuple[Any, ...]:
        as_arrays = [v.numpy() if isinstance(v, Tensor) else v for v in self.sample]
        return _receive_piped, (as_arrays,)


def _receive_piped(values: list[Any]) -> Sample:
    _warn_of_little_shared_memory()
    tensors = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in values]
    return Sample(*tensors)  # type: ignore[arg-type]


@functools.cache  # warns once
def _warn_of_little_shared_memory() -> None:
    logger.warning(
        "/dev/shm, the shared memory, is too small for the samples of --num_workers, "
        "which take the slower way through pipes: give the container more "
        "(as Docker with shm-size=2g), or lower --num_workers"
    )


def _collate(
    batch: list[Sample | MetroEMError],
) -> Sample | _PipedSample | MetroEMError:
    """Stack samples to a batch that can be sent; or return the first error."""
    errors = (item for item in batch if isinstance(item, MetroEMError))
    if (error := next(errors, None)) is not None:
        return error
    sample = stack_samples(batch)  # type: ignore[arg-type]
    if torch.utils.data.get_worker_info() is None:
        return sample
    try:
        # Move to shared memory here, where a failure raises. torch would do it in a
        # thread that dies silently if there is too little, such as the 64 MB of a
        # Docker container. Training would then wait for ever.
        for value in sample:
            if isinstance(value, Tensor):
                value.share_memory_()
    except RuntimeError:
        return _PipedSample(sample)
    return sample


def make_loader(
    samples: PhaseSamples,
    batches: Iterable[list[Position]],
    *,
    num_workers: int,
    pin_memory: bool,
) -> Generator[Sample, None, None]:
    """Read batches in order.

    Args:
        samples: to read from.
        batches: positions of the samples of each batch.
        num_workers: worker processes, which read two batches each ahead. 0 reads a
            batch when it is asked for. Workers end when this generator is closed.
        pin_memory: read into memory that a GPU copies from while it works.

    Raises:
        MetroEMError: a sample cannot be read, in any process.
        ResourceError: the worker processes cannot be started.
        RuntimeError: a worker was killed; torch's own error, see `enough_memory`.
    """
    loader = torch.utils.data.DataLoader(
        _SamplesOrErrors(samples),
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # so that the global one is not drawn from
    )
    try:
        iterator = iter(loader)
    except OSError as error:
        raise ResourceError(
            f"--num_workers {num_workers}: the processes that read cannot be started "
            f"({error}); they need room in /dev/shm (as Docker with shm-size=2g) and "
            "open files (ulimit -n): give more, or --num_workers 0"
        ) from error
    while True:
        try:
            sample = next(iterator)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:
            # Torch raises its own error from a signal handler, once the worker is gone:
            # wait for it, or it would come at some later line.
            time.sleep(_DYING_S)
            raise RuntimeError(
                f"DataLoader worker ended at a sample: {error}"
            ) from error
        if isinstance(sample, MetroEMError):
            raise sample
        yield sample
