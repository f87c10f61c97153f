"""Test samples that worker processes read ahead, with little shared memory."""

import logging
import signal

import pytest
import torch

from metroem.data import loader
from metroem.data.loader import PhaseSamples, make_loader
from metroem.data.sampling import EpochSeed
from metroem.errors import DatasetError, ResourceError
from metroem.specs.augmentations import KnownWarp
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase
from metroem.utils.memory import enough_memory
from tests.image_sets import pairs_of, write_images

PHASE = Phase(
    1e-3,
    1,
    0.0,
    num_samples=6,
    crop_size=24,
    losses=(LossSpec("known_warp"),),
    augmentations=(KnownWarp(peak_px=3),),
)


def read(folder, num_workers):
    samples = PhaseSamples(
        pairs_of(folder), PHASE, EpochSeed(0, 0, 0, 0), update_size=2
    )
    batches = samples.batches(0, 2, rank=0, ranks=1)
    return list(
        make_loader(samples, batches, num_workers=num_workers, pin_memory=False)
    )


def test_where_shared_memory_is_full_the_same_samples_come_through_pipes(
    tmp_path, monkeypatch, caplog
):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=3)
    expected = read(tmp_path, 0)

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")

    # Also where torch would share it in the thread that sends it.
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    loader._warn_of_little_shared_memory.cache_clear()
    found = read(tmp_path, 2)
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert one.pair == other.pair
        for name, value in other._asdict().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(one, name), value), name
    said = [r for r in caplog.records if "shm-size=2g" in r.getMessage()]
    assert len(said) == 1 and said[0].levelno == logging.WARNING


def test_processes_that_cannot_be_started_are_a_line(tmp_path, monkeypatch):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=3)

    def full(loader):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", full)
    with pytest.raises(ResourceError, match=r"--num_workers 2: .* room in /dev/shm"):
        read(tmp_path, 2)


# torch raises its own wherever this process is, and a file that is being read may take
# it for what is wrong with it.
@pytest.mark.parametrize(
    "raised",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        DatasetError("a.h5: no h5 file: DataLoader worker (pid 7) is killed by signal"),
    ],
)
def test_a_process_that_is_killed_at_a_sample_is_named(tmp_path, monkeypatch, raised):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=3)

    def killed(loader):
        raise raised
        yield

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", killed)
    named = "stage 0: a process that reads samples was killed.*lower --num_workers"
    with pytest.raises(ResourceError, match=named), enough_memory("stage 0", "wait"):
        read(tmp_path, 2)


class _OfADeadWorker(PhaseSamples):
    """Samples whose reading ends as it does when a worker is killed meanwhile."""

    def __init__(self):
        pass

    def __getitem__(self, position):
        raise EOFError


def test_torch_tells_of_a_killed_worker_before_the_loader_does():
    # Its signal handler raises at any line; 0.2 s later that was a line of ours.
    def tell(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    before = signal.signal(signal.SIGALRM, tell)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(RuntimeError, match=r"pid 7\) is killed"):
            next(
                make_loader(
                    _OfADeadWorker(), [[(0, 0)]], num_workers=0, pin_memory=False
                )
            )
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
