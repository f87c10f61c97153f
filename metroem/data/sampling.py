"""The samples of one epoch: which pairs, in which order, cropped and augmented."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from msgspec.structs import replace
from torch import Tensor

from metroem.data.augment import augment, flip
from metroem.data.dataset import PairRef, reached, read_prior, read_sample, window_of
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
# The error of a step shrinks by the slope of a field, far below 1, each time.
_ITERATIONS = 5


def centred_crop(grid: Grid, size: tuple[int, int]) -> Grid:
    """The window of at most `size` (rows, cols) in the middle of a grid."""
    rows, cols = min(size[0], grid.rows), min(size[1], grid.cols)
    return grid.crop((grid.rows - rows) // 2, (grid.cols - cols) // 2, rows, cols)


def random_crop(grid: Grid, size: tuple[int, int], generator: torch.Generator) -> Grid:
    """A window of at most `size` (rows, cols) anywhere in a grid."""
    rows, cols = min(size[0], grid.rows), min(size[1], grid.cols)
    row = int(torch.randint(grid.rows - rows + 1, (), generator=generator))
    col = int(torch.randint(grid.cols - cols + 1, (), generator=generator))
    return grid.crop(row, col, rows, cols)


def following_pairs(pairs: Sequence[PairRef]) -> dict[str, PairRef]:
    """For each pair, by its name, the one that goes on where it begins.

    The tgt of the pair that follows is the src of the pair: the same section,
    read from the same place. Pairs that none follows are left out.
    """
    by_tgt = {(ref.images.path, ref.images.box(ref.index, 1)): ref for ref in pairs}
    following = {}
    for ref in pairs:
        further = by_tgt.get((ref.images.path, ref.images.box(ref.index, 0)))
        if further is not None and further.grid == ref.grid:
            following[ref.name] = further
    return following


def read_skipping(ref: PairRef, further: PairRef, crop: Grid) -> Sample:
    """Read src of the pair that follows with tgt of a pair: a section is skipped.

    Args:
        ref: the pair that tgt is of.
        further: the one that follows it, see `following_pairs`.
        crop: its window.

    Returns:
        A sample of batch size 1. Its prior field goes from src to the section
        between and from there to tgt.
    """
    # The section between is read where the field of `ref` points to.
    area = crop
    if ref.prior is not None:
        area = reached(ref.grid, crop, _first_step(ref, further, crop))
    near, far = read_sample(ref, area), read_sample(further, area)
    prior = far.prior_field
    if prior is not None:
        prior = compose(_first_step(ref, further, area), prior)
    z = further.images.sections(further.index)[0]
    sample = Sample(
        far.src,
        near.tgt,
        prior,
        (f"{ref.name}, but src z {z}",),
        far.src_defects,
        near.tgt_defects,
    )
    return sample if area == crop else sample.window(*window_of(crop, area))


def _first_step(ref: PairRef, further: PairRef, crop: Grid) -> Tensor:
    """The field from the section between, as `further` sees it, to tgt of a pair.

    Where `further` sees it warped by a field of its own, that has to be undone:
    compose(step, its field) is the prior field of `ref`. Both are equal in a
    download, and the step is 0; what stages made of it differs little.
    """
    field = read_prior(ref, 0, crop)
    if not further.moves_tgt:
        return field
    own = read_prior(further, 1, crop)
    step = field - own
    for _ in range(_ITERATIONS):
        step = field - warp(own, step, padding="border")
    return step


@dataclass(frozen=True)
class EpochSeed:
    """Which epoch of a run; chance is drawn from it, see `seeded_generator`."""

    seed: int
    stage: int
    phase: int
    epoch: int

    def generator(self, *more: int) -> torch.Generator:
        """The generator of this epoch, or of one of its samples."""
        return seeded_generator(self.seed, self.stage, self.phase, self.epoch, *more)


def uses_defects(phase: Phase) -> bool:
    """Whether a loss of a phase looks at defects."""
    if all(loss.type == "known_warp" for loss in phase.losses):
        return False
    rules = (phase.similarity_rules, phase.smoothness_rules)
    return any(
        rule.name.endswith("_defects")
        for side in rules
        for rule in (*side.src, *side.tgt)
    )


def num_steps(phase: Phase, num_pairs: int, batch_size: int) -> int:
    """How many steps an epoch has; its last batch is filled with further pairs."""
    return -(-(phase.num_samples or num_pairs) // batch_size)


class TrainingEpoch(torch.utils.data.Dataset[Sample]):
    """The samples of one epoch in their order: cropped and augmented.

    Sample i is a function of the pairs, the phase and (key, i) alone, whoever
    reads it. Pairs come in a random order, each as often as any other; the last
    batch is full, so that every rank has the same number of steps. The samples of a
    batch have one size: pairs whose patches allow the same one come together, and
    the few batches that have others too take the size of their smallest.

    Attributes:
        order: index of the pair of each sample.
        crop_sizes: (rows, cols) of the samples of each batch.

    Raises:
        DatasetError: the phase skips sections, and no pairs follow one another.
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
        self.turns = [a for a in phase.augmentations if isinstance(a, RandomTurn)]
        self.following = following_pairs(pairs) if self.skips else {}
        if self.skips and not self.following:
            raise DatasetError(
                f"{pairs[0].images.path}: skip_section needs pairs of consecutive "
                "sections, and no section that is trained on is src of one pair and "
                "tgt of another; download more sections, or leave skip_section out"
            )
        chance, length = (
            key.generator(),
            batch_size * num_steps(phase, len(pairs), batch_size),
        )
        self.order: list[int] = []
        while len(self.order) < length:
            self.order += torch.randperm(len(pairs), generator=chance).tolist()
        del self.order[length:]
        self._join_by_size(chance)
        self.crop_sizes = [
            self._crop_size([pairs[index] for index in batch])
            for batch in self._batches()
        ]

    def _batches(self) -> list[list[int]]:
        """The order, cut into batches."""
        starts = range(0, len(self.order), self.batch_size)
        return [self.order[start : start + self.batch_size] for start in starts]

    def _join_by_size(self, chance: torch.Generator) -> None:
        """Bring pairs of one size into the same batches, which keep a random order."""
        sizes = [self._crop_size([ref]) for ref in self.pairs]
        if self.batch_size == 1 or len(set(sizes)) == 1:
            return
        self.order.sort(key=lambda index: sizes[index])
        batches = self._batches()
        shuffled = torch.randperm(len(batches), generator=chance).tolist()
        self.order = [index for place in shuffled for index in batches[place]]

    def _crop_size(self, refs: Sequence[PairRef]) -> tuple[int, int]:
        """The largest crop, up to that of the phase, that each of some pairs has."""
        rows = min(self.phase.crop_size, *(ref.grid.rows for ref in refs))
        cols = min(self.phase.crop_size, *(ref.grid.cols for ref in refs))
        turns = any(isinstance(a, RandomTranspose) for a in self.phase.augmentations)
        if turns and self.batch_size > 1:  # some are transposed, others are not
            rows = cols = min(rows, cols)
        return rows, cols

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Sample:
        ref = self.pairs[self.order[position]]
        size = self.crop_sizes[position // self.batch_size]
        generator = self.key.generator(position)
        further = self._pair_to_skip_to(ref, generator)
        turn = self._turn_of(ref, size, generator)
        if turn is not None:
            sample = rotate_crop(_read(ref, further, turn.window), turn)
        else:
            crop = random_crop(ref.grid, size, generator)
            sample = _read(ref, further, crop)
        if uses_defects(self.phase):
            sample = with_defects(sample)
        return augment(sample, self.phase.augmentations, generator)

    def _pair_to_skip_to(
        self, ref: PairRef, generator: torch.Generator
    ) -> PairRef | None:
        """The pair whose src is to be taken, if this sample skips a section."""
        chances = [bernoulli(skip.prob, generator) for skip in self.skips]
        return self.following.get(ref.name) if any(chances) else None

    def _turn_of(
        self, ref: PairRef, size: tuple[int, int], generator: torch.Generator
    ) -> Rotation | None:
        """How this sample's crop lies, if it is not along rows and cols."""
        for turn in self.turns:
            if bernoulli(turn.prob, generator):
                return random_rotation(ref.grid, size, turn, generator)
        return None


def _read(ref: PairRef, further: PairRef | None, crop: Grid) -> Sample:
    """Read a pair, or src of the one that follows with its tgt."""
    if further is None:
        return read_sample(ref, crop)
    return read_skipping(ref, further, crop)


class ValidationPairs(torch.utils.data.Dataset[Sample]):
    """The held-out pairs, centred crops, not augmented.

    A phase that knows the truth of its warps knows it here too: each pair comes
    `NUM_KNOWN_WARPS` times, warped by fields that are the same in every epoch, and
    mirrored along neither axis, each and both: else a network that errs the same way
    everywhere looks good on pairs whose tissue happens to move that way.
    """

    def __init__(self, pairs: Sequence[PairRef], phase: Phase, seed: int) -> None:
        self.pairs = pairs
        self.phase = phase
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pairs) * (NUM_KNOWN_WARPS if self.phase.known_warp else 1)

    def __getitem__(self, position: int) -> Sample:
        which, index = divmod(position, len(self.pairs))
        ref = self.pairs[index]
        size = (VALIDATION_CROP_PX, VALIDATION_CROP_PX)
        sample = read_sample(ref, centred_crop(ref.grid, size))
        if uses_defects(self.phase):
            sample = with_defects(sample)
        if (warp := self.phase.known_warp) is not None:
            for bit, dim in enumerate((-1, -2)):
                sample = flip(sample, dim) if which >> bit & 1 else sample
            generator = seeded_generator(self.seed, position)
            # As the pair is, not one section twice: that is the easier half.
            sample = known_warp(sample, replace(warp, same=0.0), generator)
        return sample
