"""Choose the samples of one epoch, and read, crop and augment them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from msgspec.structs import replace
from torch import Tensor

from metroem.data.augment import augment, flip
from metroem.data.dataset import (
    PairRef,
    read_prior,
    read_sample,
    source_window,
    window_of,
)
from metroem.data.known_warp import known_warp
from metroem.data.random_maps import bernoulli
from metroem.data.rotation import Rotation, random_rotation, rotate_crop
from metroem.data.sample import Sample, seeded_generator, with_defects
from metroem.errors import DatasetError
from metroem.geometry.field import compose, warp
from metroem.geometry.grid import Grid
from metroem.specs.augmentations import RandomTranspose, RandomTurn, SkipSection
from metroem.specs.schedule import Phase

VALIDATION_CROP_PX = 2048
NUM_KNOWN_WARPS = 4  # of each pair in validation
# Each iteration multiplies the error of `_step_to_skipped` by the slope of a field, far
# below 1.
_ITERATIONS = 5


def centred_crop(grid: Grid, size: tuple[int, int]) -> Grid:
    """Crop at most `size` (rows, cols) in the middle of a grid."""
    rows, cols = min(size[0], grid.rows), min(size[1], grid.cols)
    return grid.crop((grid.rows - rows) // 2, (grid.cols - cols) // 2, rows, cols)


def random_crop(grid: Grid, size: tuple[int, int], generator: torch.Generator) -> Grid:
    """Crop at most `size` (rows, cols) anywhere in a grid."""
    rows, cols = min(size[0], grid.rows), min(size[1], grid.cols)
    row = int(torch.randint(grid.rows - rows + 1, (), generator=generator))
    col = int(torch.randint(grid.cols - cols + 1, (), generator=generator))
    return grid.crop(row, col, rows, cols)


def following_pairs(pairs: Sequence[PairRef]) -> dict[str, PairRef]:
    """Map the name of each pair to the pair that follows it in the stack.

    The tgt of the following pair is the src of the pair: the same section, read from
    the same location. Pairs without a following pair are left out.
    """
    by_tgt = {(ref.images.path, ref.images.box(ref.index, 1)): ref for ref in pairs}
    found = {}
    for ref in pairs:
        following = by_tgt.get((ref.images.path, ref.images.box(ref.index, 0)))
        if following is not None and following.grid == ref.grid:
            found[ref.name] = following
    return found


def read_skipping(ref: PairRef, following: PairRef, crop: Grid) -> Sample:
    """Read tgt of a pair with src of the following pair: a section is skipped.

    Args:
        ref: the pair, whose tgt is read.
        following: the pair that follows it, see `following_pairs`; its src is read.
        crop: their window.

    Returns:
        A sample of batch size 1. Its prior field is composed of the prior fields of
        both pairs, through the skipped section.
    """
    # The skipped section is read where the field of `ref` points to.
    area = crop
    if ref.prior is not None:
        area = source_window(ref.grid, crop, _step_to_skipped(ref, following, crop))
    near, far = read_sample(ref, area), read_sample(following, area)
    prior = far.prior_field
    if prior is not None:
        prior = compose(_step_to_skipped(ref, following, area), prior)
    z = following.images.sections(following.index)[0]
    sample = Sample(
        far.src,
        near.tgt,
        prior,
        (f"{ref.name}, but src z {z}",),
        far.src_defects,
        near.tgt_defects,
    )
    return sample if area == crop else sample.window(*window_of(crop, area))


def _step_to_skipped(ref: PairRef, following: PairRef, crop: Grid) -> Tensor:
    """The field between tgt of `ref` and the skipped section as `following` has it.

    `following` may have a field of its own for the skipped section, its tgt. The step
    is then defined by compose(step, own field) = prior field of `ref`. In a download
    both fields are equal and the step is 0; the fields of later stages differ little.
    """
    field = read_prior(ref, 0, crop)
    if not following.moves_tgt:
        return field
    own = read_prior(following, 1, crop)
    step = field - own
    for _ in range(_ITERATIONS):
        step = field - warp(own, step, padding="border")
    return step


@dataclass(frozen=True)
class EpochSeed:
    """Identifies an epoch of a run, and seeds its random numbers."""

    seed: int
    stage: int
    phase: int
    epoch: int

    def generator(self, *more: int) -> torch.Generator:
        """Make the generator of this epoch, or of one of its samples."""
        return seeded_generator(self.seed, self.stage, self.phase, self.epoch, *more)


def uses_defects(phase: Phase) -> bool:
    """Whether a loss of a phase uses defect masks."""
    if all(loss.type == "known_warp" for loss in phase.losses):
        return False
    rules = (phase.similarity_rules, phase.smoothness_rules)
    return any(
        rule.name.endswith("_defects")
        for side in rules
        for rule in (*side.src, *side.tgt)
    )


def num_steps(phase: Phase, num_pairs: int, batch_size: int) -> int:
    """Number of steps of an epoch; its last batch is filled up with more pairs."""
    return -(-(phase.num_samples or num_pairs) // batch_size)


class TrainingEpoch(torch.utils.data.Dataset[Sample]):
    """The samples of one epoch in their order: cropped and augmented.

    Sample i depends only on the pairs, the phase and (key, i), not on the process that
    reads it. Pairs come in a random order, each equally often. The last batch is full,
    so every rank has the same number of steps. The samples of a batch have one size:
    pairs whose patches allow the same size share batches. The few batches of mixed
    sizes take the size of their smallest.

    Attributes:
        order: index of the pair of each sample.
        crop_sizes: (rows, cols) of the samples of each batch.

    Raises:
        DatasetError: the phase skips sections, and no pair follows another.
    """

    def __init__(
        self,
        pairs: Sequence[PairRef],
        phase: Phase,
        key: EpochSeed,
        *,
        batch_size: int,
    ) -> None:
        self.pairs = pairs
        self.phase = phase
        self.key = key
        self.batch_size = batch_size
        self.skips = [a for a in phase.augmentations if isinstance(a, SkipSection)]
        self.rotations = [a for a in phase.augmentations if isinstance(a, RandomTurn)]
        self.following = following_pairs(pairs) if self.skips else {}
        if self.skips and not self.following:
            raise DatasetError(
                f"{pairs[0].images.path}: skip_section needs pairs of consecutive "
                "sections, and no section that is trained on is src of one pair and "
                "tgt of another; download more sections, or leave skip_section out"
            )
        generator = key.generator()
        length = batch_size * num_steps(phase, len(pairs), batch_size)
        self.order: list[int] = []
        while len(self.order) < length:
            self.order += torch.randperm(len(pairs), generator=generator).tolist()
        del self.order[length:]
        self._join_by_size(generator)
        self.crop_sizes = [
            self._crop_size([pairs[index] for index in batch])
            for batch in self._batches()
        ]

    def _batches(self) -> list[list[int]]:
        """Split the order into batches."""
        starts = range(0, len(self.order), self.batch_size)
        return [self.order[start : start + self.batch_size] for start in starts]

    def _join_by_size(self, generator: torch.Generator) -> None:
        """Put pairs of one size into the same batches; the batches stay shuffled."""
        sizes = [self._crop_size([ref]) for ref in self.pairs]
        if self.batch_size == 1 or len(set(sizes)) == 1:
            return
        self.order.sort(key=lambda index: sizes[index])
        batches = self._batches()
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        self.order = [index for number in shuffled for index in batches[number]]

    def _crop_size(self, refs: Sequence[PairRef]) -> tuple[int, int]:
        """The largest crop that fits into all pairs, at most the phase's crop size."""
        rows = min(self.phase.crop_size, *(ref.grid.rows for ref in refs))
        cols = min(self.phase.crop_size, *(ref.grid.cols for ref in refs))
        kinds = [type(augmentation) for augmentation in self.phase.augmentations]
        if RandomTranspose in kinds and self.batch_size > 1:  # not all are transposed
            rows = cols = min(rows, cols)
        return rows, cols

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Sample:
        ref = self.pairs[self.order[position]]
        size = self.crop_sizes[position // self.batch_size]
        generator = self.key.generator(position)
        following = self._draw_skip(ref, generator)
        rotation = self._draw_rotation(ref, size, generator)
        if rotation is not None:
            sample = rotate_crop(_read(ref, following, rotation.window), rotation)
        else:
            crop = random_crop(ref.grid, size, generator)
            sample = _read(ref, following, crop)
        if uses_defects(self.phase):
            sample = with_defects(sample)
        return augment(sample, self.phase.augmentations, generator)

    def _draw_skip(self, ref: PairRef, generator: torch.Generator) -> PairRef | None:
        """The pair whose src is read instead, if this sample skips a section."""
        skips = [bernoulli(skip.prob, generator) for skip in self.skips]
        return self.following.get(ref.name) if any(skips) else None

    def _draw_rotation(
        self, ref: PairRef, size: tuple[int, int], generator: torch.Generator
    ) -> Rotation | None:
        """Draw where this sample's crop lies, if it is to be rotated."""
        for options in self.rotations:
            if bernoulli(options.prob, generator):
                return random_rotation(ref.grid, size, options, generator)
        return None


def _read(ref: PairRef, following: PairRef | None, crop: Grid) -> Sample:
    """Read a pair, or its tgt with src of the following pair."""
    if following is None:
        return read_sample(ref, crop)
    return read_skipping(ref, following, crop)


class ValidationPairs(torch.utils.data.Dataset[Sample]):
    """The held-out pairs: centred crops, not augmented.

    In a phase with known warps, each pair comes `NUM_KNOWN_WARPS` times, warped by
    fields that are the same in every epoch. The four are mirrored along no axis, along
    each, and along both. Otherwise a network with a constant error would look good on
    pairs whose tissue happens to move in that direction.
    """

    def __init__(self, pairs: Sequence[PairRef], phase: Phase, seed: int) -> None:
        self.pairs = pairs
        self.phase = phase
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pairs) * (NUM_KNOWN_WARPS if self.phase.known_warp else 1)

    def __getitem__(self, position: int) -> Sample:
        repetition, index = divmod(position, len(self.pairs))
        ref = self.pairs[index]
        size = (VALIDATION_CROP_PX, VALIDATION_CROP_PX)
        sample = read_sample(ref, centred_crop(ref.grid, size))
        if uses_defects(self.phase):
            sample = with_defects(sample)
        if (warp := self.phase.known_warp) is not None:
            for bit, dim in enumerate((-1, -2)):
                sample = flip(sample, dim) if repetition >> bit & 1 else sample
            generator = seeded_generator(self.seed, position)
            # Never one section twice, since that is easier.
            sample = known_warp(sample, replace(warp, same=0.0), generator)
        return sample
