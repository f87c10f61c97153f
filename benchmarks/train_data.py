"""Image sets and steps for the benchmarks of training."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from metroem.aligner import Aligner
from metroem.data.dataset import PairRef, find_pairs
from metroem.data.epoch import EpochKey, TrainingEpoch
from metroem.data.sample import Sample, stack_samples
from metroem.grid import Grid
from metroem.io.h5 import ImageSetMeta, Pair, PairFrame, write_image_set
from metroem.loss import LossTerms
from metroem.normalize import normalize
from metroem.specs.schedule import Phase
from metroem.tissue import TissueRecipe, make_tissue
from metroem.training.model import TrainingModel
from metroem.training.natural import with_natural_field
from metroem.training.objectives import levels_wanted, phase_loss
from metroem.training.step import scores_of, train_step

Step = Callable[[], float]


def write_sections(sections: list[Tensor], mip: int, folder: Path) -> None:
    """An image set of each section on the one before it.

    Args:
        sections: (H, W) each, raw grey levels, 0 = no data; normalised here.
        mip: of the set.
        folder: of the file.
    """
    images = [normalize(section).numpy() for section in sections]
    rows, cols = images[0].shape
    pairs = [Pair(src, tgt) for tgt, src in zip(images[:-1], images[1:], strict=True)]
    frames = [
        PairFrame(Grid(mip, 0, 0, rows, cols), (z + 1, z)) for z in range(len(pairs))
    ]
    meta = ImageSetMeta(frames, "made", "", {}, normalization={"kind": "tissue"})
    write_image_set(folder / f"x0_y0_z1_MIP{mip}.h5", pairs, meta)


def made_pairs(size: int, mip: int, folder: Path) -> list[PairRef]:
    """Pairs of made tissue, in an h5 file: three sections of `size` px a side."""
    tissue = make_tissue(TissueRecipe(3, size, size))
    write_sections([torch.from_numpy(section) for section in tissue], mip, folder)
    return find_pairs(folder, mip, stage=0, checkpoint_name="checkpoint")


def complete_step(
    aligner: Aligner, phase: Phase, pairs: list[PairRef], batch_size: int
) -> Step:
    """A training step as train.py makes it: load, augment, ... and update.

    Returns:
        Called without arguments it makes the next step, and returns its loss.
    """
    model = TrainingModel(aligner, "fp32").train()
    optimizer = torch.optim.Adam(aligner.net.parameters(), lr=phase.lr, fused=True)
    samples = _samples(phase, pairs, batch_size)

    def batch() -> tuple[LossTerms, Tensor]:
        sample, generator = next(samples)
        sample = with_natural_field(sample, model, phase.known_warp)
        made = model(sample, levels_wanted(phase, aligner.options))
        terms = phase_loss(phase, sample, made, generator, aligner.options)
        return terms, scores_of(made, terms, sample.prior_field)

    def step() -> float:
        clip = phase.max_grad_norm
        done = train_step([batch], optimizer, stop=0, max_grad_norm=clip)
        return float(done.scores[0])

    return step


def _samples(
    phase: Phase, pairs: list[PairRef], batch_size: int
) -> Iterator[tuple[Sample, torch.Generator]]:
    """Batches without end, each read when it is asked for."""
    epoch = 0
    while True:
        key = EpochKey(0, 0, 0, epoch)
        read = TrainingEpoch(pairs, phase, key, batch_size=batch_size)
        for first in range(0, len(read), batch_size):
            batch = [read[first + i] for i in range(batch_size)]
            yield stack_samples(batch), key.generator(-1 - first)
        epoch += 1
