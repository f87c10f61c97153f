"""Find the pairs to evaluate, and which of them the pyramid was trained on."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metroem.data.dataset import PairRef, find_pairs
from metroem.errors import CheckpointError, DatasetError
from metroem.evaluation.requests import EvaluateRequest
from metroem.evaluation.scores import BORDER_PX, CHUNK_PX
from metroem.io.h5 import ImageSet, find_image_sets
from metroem.specs.modules import ModuleSpec
from metroem.training.checkpoint import RunFolder, load_state
from metroem.training.config import IMAGES, PAIRS
from metroem.training.write_fields import target_sets

logger = logging.getLogger(__name__)

# Roles of a pair in the training of the weights.
TRAINED_ON, HELD_OUT, NOT_USED = "trained on", "held out", "not trained on"


class Location(NamedTuple):
    """The image sets of one location, and the pairs of them that are evaluated."""

    sets: tuple[ImageSet, ...]  # one per stage
    indices: tuple[int, ...]  # of pairs that have tissue

    @property
    def finest(self) -> ImageSet:
        """The set of the last stage; all figures are in its pixels."""
        return self.sets[-1]


class Task(NamedTuple):
    """A pair to align, or its tgt section to align with itself, warped."""

    location: int  # position in the list of locations
    index: int  # of the pair in its image sets
    is_known: bool  # whether it is the section, warped by a known field
    role: str  # of the pair


def find_locations(
    request: EvaluateRequest, modules: Sequence[ModuleSpec]
) -> list[Location]:
    """Find locations with images at every stage's mip, and their pairs with tissue.

    Args:
        request: names the data set.
        modules: the stages that are run.

    Raises:
        DatasetError: a stage's mip has no images, or images are too small to measure.
    """
    folder, mips = request.dataset_path, [module.in_mip for module in modules]
    there = sorted({images.mip for images in find_image_sets(folder)})
    for module in modules:
        if module.in_mip not in there:
            raise DatasetError(
                f"{folder}: stage {module.stage} ({module.name}) reads mip "
                f"{module.in_mip}, but image sets exist only at mips {there}; "
                "evaluation runs every stage, also one whose fields were downloaded: "
                f"get the images with download_image.py --mip {module.in_mip}"
            )
    pairs: dict[Path, list[PairRef]] = {}
    refs = find_pairs(
        folder, mips[-1], stage=0, checkpoint_name="", verifies=request.verify
    )
    for ref in refs:
        pairs.setdefault(ref.images.path, []).append(ref)
    finest = [refs[0].images for refs in pairs.values()]
    for images in finest:
        if min(images.shape) < CHUNK_PX + BORDER_PX:
            raise DatasetError(
                f"{images.path}: images of {images.shape[0]} x {images.shape[1]} px; "
                f"at least {CHUNK_PX + BORDER_PX} px are needed to measure chunks of "
                f"{CHUNK_PX} px off a border of {BORDER_PX} px"
            )
    by_stage = [target_sets(folder, finest, mip) for mip in mips]
    return [
        Location(sets, tuple(ref.index for ref in pairs[sets[-1].path]))
        for sets in zip(*by_stage, strict=True)
    ]


def select_pairs(locations: Sequence[Location], max_pairs: int) -> list[Location]:
    """Take at most a number of pairs, spread evenly.

    Locations get the same number of pairs as far as they have them. Within a location,
    the pairs are at even distances.

    Args:
        locations: all locations.
        max_pairs: 1 or more.

    Returns:
        The locations that have pairs left, in order.
    """
    counts = [len(location.indices) for location in locations]
    taken = [0] * len(counts)
    left = min(max_pairs, sum(counts))
    while left:
        unfilled = [i for i, count in enumerate(counts) if taken[i] < count]
        for position in _spread(len(unfilled), min(left, len(unfilled))):
            taken[unfilled[position]] += 1
            left -= 1
    return [
        location._replace(
            indices=tuple(
                location.indices[position] for position in _spread(count, num)
            )
        )
        for location, count, num in zip(locations, counts, taken, strict=True)
        if num
    ]


def _spread(count: int, num: int) -> list[int]:
    """Choose positions: the middles of `num` equal parts of 0, ..., count - 1."""
    return [(2 * part + 1) * count // (2 * num) for part in range(num)]


def list_tasks(
    locations: Sequence[Location],
    roles: Sequence[Mapping[int, str]],
    *,
    known_warps: bool,
) -> list[Task]:
    """List what is to be done, location by location, pairs before warped sections.

    Args:
        locations: with the pairs to evaluate.
        roles: of the pairs of each location, see `find_roles`.
        known_warps: whether sections are warped, too.
    """
    return [
        Task(number, index, is_known, roles[number][index])
        for number, location in enumerate(locations)
        for is_known in ((False, True) if known_warps else (False,))
        for index in location.indices
    ]


def find_roles(
    request: EvaluateRequest,
    modules: Sequence[ModuleSpec],
    locations: Sequence[Location],
) -> list[dict[int, str]]:
    """Find whether each pair was trained on, by the state that the training left.

    A pair is recognised by its content and location, not by the name of its file. It
    was trained on if any stage was trained on it. Else it was held out if a stage was
    validated on it.

    Args:
        request: names the pyramid and the checkpoint.
        modules: the stages that are run.
        locations: with the pairs to evaluate.

    Returns:
        For each location, `TRAINED_ON`, `HELD_OUT` or `NOT_USED` by index of the pair;
        "" where no stage has a state that can be read.
    """
    run = RunFolder.of(request.pyramid_path, request.checkpoint_name)
    splits = [_read_split(run.state(module.stage)) for module in modules]
    known = [split is not None for split in splits]
    if any(known) and not all(known):
        without = [m.stage for m, k in zip(modules, known, strict=True) if not k]
        logger.warning(
            "%s: has no state of stages %s, so pairs that only these were trained on "
            "are not recognised",
            *(run.path, without),
        )
    return [
        {
            index: _role_of(location, index, splits) if any(known) else ""
            for index in location.indices
        }
        for location in locations
    ]


class _Split(NamedTuple):
    """Identities of the pairs of one stage, see `ImageSet.identity`."""

    training: frozenset[str]
    held_out: frozenset[str]


def _read_split(path: Path) -> _Split | None:
    """Read which pairs a stage was trained on; None if its state does not say."""
    try:
        state = load_state(path)
    except CheckpointError as error:
        logger.warning("pairs that were trained on are not recognised: %s", error)
        return None
    if state is None:
        return None
    fingerprint: Mapping[str, Any] = state.fingerprint
    images, pairs = fingerprint.get(IMAGES), fingerprint.get(PAIRS)
    if not isinstance(images, list) or not isinstance(pairs, list):
        return None
    # Identities of the pairs to train on, then of those held out.
    return _Split(frozenset(images[: len(pairs)]), frozenset(images[len(pairs) :]))


def _role_of(location: Location, index: int, splits: Sequence[_Split | None]) -> str:
    role = NOT_USED
    for images, split in zip(location.sets, splits, strict=True):
        identity = images.identity(index)
        if split is not None and identity in split.training:
            return TRAINED_ON
        if split is not None and identity in split.held_out:
            role = HELD_OUT
    return role
