"""Write the fields of one stage for every pair, from which the next stage starts."""

import hashlib
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from metroem.aligner import Aligner
from metroem.data.dataset import PairRef, image_sets_at, open_prior, read_sample
from metroem.data.sample import Sample
from metroem.errors import CheckpointError, DatasetError
from metroem.finetune.adam import FinetuneResult, summary
from metroem.geometry.field import resample_field
from metroem.io.field_set_writer import FieldSetWriter
from metroem.io.files import try_writing
from metroem.io.h5 import FieldSet, FieldSetMeta, ImageSet, PairLocation
from metroem.io.moved import moved_apart
from metroem.io.origins import origins, place_digest
from metroem.io.resume import ResumeStore, as_json, describe_differences, parts_folder
from metroem.models.finetuning import finetune_iterations
from metroem.models.load import load_module
from metroem.models.tiling import Tiling
from metroem.models.weights import checkpoint_path
from metroem.specs.filenames import FieldSetName
from metroem.specs.modules import ModuleSpec
from metroem.training.run_clock import RunClock
from metroem.utils import cli, distributed
from metroem.utils.memory import enough_memory
from metroem.utils.progress import progress
from metroem.utils.stop_request import Stopped, StopRequest

logger = logging.getLogger(__name__)


# A pair of fewer pixels takes seconds, so `seconds_of_pair` aligns it twice.
_SMALL_PX = 256 * 256
# Keys of requests that version 1.0.0 did not have.
_NEW_KEYS = ("data", "place")


@dataclass(frozen=True)
class WriteFieldsConfig:
    """Configuration of the fields to write.

    Attributes:
        module: makes the fields.
        mip: of the written fields: the next stage's, or the module's if it is the last.
        dataset: folder of the image sets.
        fields_path: folder of the field sets.
        checkpoint_name: weights of the module, and tag of the field sets.
        device: of this rank.
        verifies: whether the checksum of each pair is checked before its first read.
    """

    module: ModuleSpec
    mip: int
    dataset: Path
    fields_path: Path
    checkpoint_name: str
    device: torch.device
    verifies: bool = False

    @property
    def weights(self) -> Path:
        """Path of the module's checkpoint."""
        return checkpoint_path(self.module.weights_folder, self.checkpoint_name)


class _Sources(NamedTuple):
    """The sets that the fields of one location are made from, opened and checked."""

    images: ImageSet
    prior: FieldSet | None  # of the previous stage
    target: ImageSet  # at the mip of the written fields: has their grids

    @property
    def num_sides(self) -> int:
        """2 if tgt is warped when it is read, as the next stage must do too; else 1."""
        return 1 if self.prior is None else self.prior.num_sides

    def location(self, index: int) -> PairLocation:
        """Location of a pair's fields, and the translations of its images."""
        moved = self.target if self.num_sides == 1 else self.prior
        assert moved is not None
        return PairLocation(
            self.target.grid(index),
            self.target.sections(index),
            (moved.offset(index, 0), moved.offset(index, 1)),
        )


def write_fields(
    config: WriteFieldsConfig, stop: StopRequest, clock: RunClock | None = None
) -> None:
    """Write the fields of one stage for all its image sets.

    Each pair's field is finetuned and resampled to the grid of the next stage's images.
    A set that already exists is kept if the same weights made it from the same data;
    otherwise it is replaced. An unfinished set is resumed. The ranks share the pairs:
    each takes the next free pair. Rank 0 joins their results.

    Args:
        config: module and data.
        stop: checked after each pair.
        clock: notes the time that each pair takes.

    Raises:
        Stopped: `stop` asked for it; finished pairs are kept.
        CheckpointError: the module has no such checkpoint.
        DatasetError: images or prior fields are missing, or a file of the same name was
            not made by a training.
    """
    weights_of(config.module, config.checkpoint_name)
    sets = image_sets_at(config.dataset, config.module.in_mip, verifies=config.verifies)
    targets = target_sets(config.dataset, sets, config.mip)
    aligner = None
    digest = _sha256(config.weights)
    for images, target in zip(sets, targets, strict=True):
        prior = None
        if config.module.stage > 0:
            prior = open_prior(
                images, config.module.stage, config.checkpoint_name, config.fields_path
            )
        sources = _Sources(images, prior, target)
        request = _request(config, sources, digest)
        path = _field_path(config, target)
        # One answer for all ranks, since some may not see a new file yet.
        done = torch.tensor([float(_is_done(path, request))], device=config.device)
        if distributed.all_reduce_max(done).item():
            logger.info("%s: already exists", path)
            if distributed.rank() == 0:
                # Left by a run that was killed at its end.
                ResumeStore.discard(parts_folder(path))
            continue
        if distributed.rank() == 0:
            try_writing(config.fields_path, "--fields_path")
        aligner = aligner or _load(config, digest)
        _write_set(config, aligner, sources, request, stop, clock)
    if clock is not None:
        clock.left.end_fields(config.module.stage)


def seconds_of_pair(config: WriteFieldsConfig) -> float:
    """Measure how long the field of one pair takes, with the weights of this moment.

    The first pair of the first set is aligned with the weights that exist, or else with
    fresh ones, and with a prior field of 0. Its field is thrown away. A pair that is
    small is aligned twice, since the first one also starts threads and the like.

    Raises:
        DatasetError: images are missing or cannot be used.
        ResourceError: there is too little memory.
    """
    images = image_sets_at(config.dataset, config.module.in_mip)[0]
    (target,) = target_sets(config.dataset, [images], config.mip)
    sources = _Sources(images, None, target)
    has_weights = config.weights.is_file()
    with torch.random.fork_rng(devices=[]):
        aligner = _load_aligner(config, config.checkpoint_name if has_weights else None)
    seconds = math.inf
    for _ in range(2):
        started = time.monotonic()
        sample = _read(config, sources, 0)
        if config.module.stage > 0:
            zero = torch.zeros_like(sample.src).repeat(1, 2, 1, 1)
            sample = sample._replace(prior_field=zero)
        with _memory_advice(config, images):
            _field_of(aligner, sources, sample, 0)
        seconds = min(seconds, time.monotonic() - started)
        if sample.src.numel() > _SMALL_PX:
            break
    return seconds


def weights_of(module: ModuleSpec, checkpoint_name: str) -> Path:
    """Path of the checkpoint that a module writes fields with.

    Raises:
        CheckpointError: the module has no checkpoint of that name.
    """
    path = checkpoint_path(module.weights_folder, checkpoint_name)
    if not path.is_file():
        end = checkpoint_path(Path(), "").name
        names = (found.name for found in module.weights_folder.glob(f"*{end}"))
        there = sorted(name.removesuffix(end) for name in names)
        raise CheckpointError(
            f"{path}: no such checkpoint (there are: {', '.join(there) or 'none'}), so "
            f"stage {module.stage} cannot write fields; train it first (train.py "
            f"--train_stages {module.stage}), or name stages that are trained"
        )
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def target_sets(dataset: Path, sets: Sequence[ImageSet], mip: int) -> list[ImageSet]:
    """Find the image set of the same location at another mip, for each of some sets.

    If all of the given sets check checksums, the found sets do so too.

    Raises:
        DatasetError: a location has no set at that mip, or the sets of both mips differ
            in number of pairs, resolution or translations.
    """
    verifies = all(images.verifies for images in sets)
    at_mip = image_sets_at(dataset, mip, verifies=verifies)
    by_place = {images.name.place: images for images in at_mip}
    found = []
    for images in sets:
        target = by_place.get(images.name.place)
        if target is None or target.num_pairs != images.num_pairs:
            raise DatasetError(
                f"{images.path}: its place has no image set at mip {mip} with the "
                f"same {images.num_pairs} pairs, which the next stage needs; download "
                f"both mips in one call of download_image.py"
            )
        target.check_resolution(images)
        if apart := moved_apart(images, target):
            raise DatasetError(f"{target.path}: {apart}")
        found.append(target)
    return found


def _field_path(config: WriteFieldsConfig, target: ImageSet) -> Path:
    place = target.name.place
    name = FieldSetName(config.module.stage, place, config.mip, config.checkpoint_name)
    return config.fields_path / name.filename


def _request(
    config: WriteFieldsConfig, sources: _Sources, digest: str
) -> dict[str, Any]:
    """All that fields depend on: weights, data and location, as the set records it."""
    prior, prior_request = sources.prior, None
    if prior is not None:
        # Without the keys for the prior's data, which "data" has too.
        known = {k: v for k, v in prior.request.items() if k not in _NEW_KEYS}
        prior_request = known or prior.path.name
    request = {
        "weights_sha256": digest,
        "images": sources.images.path.name,
        "target": sources.target.path.name,
        "finetune_iter": finetune_iterations(config.module.stage),
        "prior": prior_request,
        "data": origins(sources.images, prior),
        "place": place_digest(sources.target),
    }
    # Version 1.0.0 left out the fields of tgt, so its sets are made again.
    return request | ({"num_sides": 2} if sources.num_sides == 2 else {})


def _is_done(path: Path, request: dict[str, Any]) -> bool:
    """Whether the field set of a request already exists.

    Args:
        path: of the set.
        request: all that its fields depend on. Sets of version 1.0.0 do not record
            their data, which then counts as equal; their location is compared.

    Raises:
        DatasetError: a file of that name was not made by a training.
    """
    if not path.is_file():
        return False
    existing = FieldSet(path)
    if not existing.is_of_pyramid:
        raise DatasetError(
            f"{path}: was not made by this program's training, and would be replaced; "
            "train under another --checkpoint_name, or leave its stage out of "
            "--generate_field_stages"
        )
    made_by = {"data": request["data"], **existing.request}
    made_by["place"] = place_digest(existing)
    if not describe_differences(made_by, request):
        return True
    logger.info("%s: made by other weights or from other data; writing it again", path)
    return False


def _load(config: WriteFieldsConfig, digest: str) -> Aligner:
    """Load the module, and check that its weights still have a digest.

    Raises:
        CheckpointError: the weights were replaced meanwhile.
    """
    aligner = _load_aligner(config, config.checkpoint_name)
    if _sha256(config.weights) != digest:
        raise CheckpointError(
            f"{config.weights}: was replaced while it was read; give the same command "
            "again when it is trained"
        )
    return aligner


def _load_aligner(config: WriteFieldsConfig, checkpoint_name: str | None) -> Aligner:
    """Load the module with its finetuner; None gives it fresh weights."""
    module = load_module(
        config.module.path,
        checkpoint_name=checkpoint_name,
        finetune=True,
        pass_field=True,
        finetune_iter=finetune_iterations(config.module.stage),
    )
    aligner: Aligner = module.aligner.to(config.device).eval()  # type: ignore
    if not aligner.has_features():
        logger.warning(
            "%s: level %d of its network gives the image alone, no features: fields "
            "are not finetuned",
            *(config.module.path, aligner.options.finetune_level),
        )
        aligner.options = replace(aligner.options, finetune=False)
    return aligner


def _write_set(
    config: WriteFieldsConfig,
    aligner: Aligner,
    sources: _Sources,
    request: dict[str, Any],
    stop: StopRequest,
    clock: RunClock | None,
) -> None:
    started = time.monotonic()
    target = sources.target
    path = _field_path(config, target)
    writer = _open_writer(path, request)
    with _memory_advice(config, sources.images):
        code = _make_fields(config, aligner, sources, writer, stop, clock)
    (code,) = distributed.all_reduce_max(
        torch.tensor([code], device=config.device)
    ).tolist()
    if code:
        raise Stopped(code)
    joining = writer.join(path, _meta(config, sources, request))
    distributed.follow(joining, target.num_pairs)
    if distributed.rank() == 0:
        writer.remove()
    logger.info("%s: written, %.2f s", path, time.monotonic() - started)


def _memory_advice(
    config: WriteFieldsConfig, images: ImageSet
) -> AbstractContextManager[None]:
    """Say what to do if there is too little memory for a field (ResourceError)."""
    rows, cols = images.shape
    return enough_memory(
        f"fields of stage {config.module.stage}, of {rows} x {cols} px",
        "give --device cpu, with which this run resumes, or take smaller patches",
    )


def _open_writer(path: Path, request: dict[str, Any]) -> FieldSetWriter:
    """Open the writer of a field set; discard results of other weights or data."""
    folder = parts_folder(path)
    if distributed.rank() == 0:
        try:
            FieldSetWriter(folder, request)
        except DatasetError:
            logger.info("%s: started with other weights or data; starts again", folder)
            ResumeStore.discard(folder)
            FieldSetWriter(folder, request)
    distributed.barrier()
    writer = FieldSetWriter(folder, request)
    distributed.check_shared(folder)
    return writer


def _make_fields(
    config: WriteFieldsConfig,
    aligner: Aligner,
    sources: _Sources,
    writer: FieldSetWriter,
    stop: StopRequest,
    clock: RunClock | None,
) -> int:
    """Make the missing fields, together with the other ranks; return a stop code.

    Compressing a field takes half as long as computing the next one on a GPU. So a
    thread compresses and writes it meanwhile.
    """
    total, gains = sources.images.num_pairs, []
    what = (
        f"fields of stage {config.module.stage} for {sources.images.path.name}, pairs"
    )
    if distributed.world_size() > 1:
        what += " of rank 0"
    with ThreadPoolExecutor(1) as pool:
        result, writing = None, None
        for index in progress(distributed.work_queue(total), what, total=total):
            if not writer.has(index):
                started = time.monotonic()
                sample = _read(config, sources, index)
                # Write only after reading: h5py does one at a time.
                writing = _start_writing(pool, writer, result, writing)
                field, finetuned = _field_of(aligner, sources, sample, index)
                result = index, _with_tgt_field(sources, index, field)
                gains += [finetuned] if finetuned else []
                if clock is not None:
                    seconds = time.monotonic() - started
                    clock.after_field(config.module.stage, seconds)
            if stop.code:
                break
        writing = _start_writing(pool, writer, result, writing)
        _start_writing(pool, writer, None, writing)
    if gains:
        logger.info("%s: %s", writer.folder.name, summary(gains))
    return stop.code


def _start_writing(
    pool: Executor,
    writer: FieldSetWriter,
    result: tuple[int, np.ndarray] | None,
    writing: Future | None,
) -> Future | None:
    """Wait until the last field is written, then start to write the next, if any."""
    if writing is not None:
        writing.result()
    return None if result is None else pool.submit(writer.put, *result)


def _read(config: WriteFieldsConfig, sources: _Sources, index: int) -> Sample:
    """Read a whole pair, on this rank's device."""
    ref = PairRef(sources.images, sources.prior, index)
    return read_sample(ref, ref.grid).to(config.device)


def _field_of(
    aligner: Aligner, sources: _Sources, sample: Sample, index: int
) -> tuple[np.ndarray, FinetuneResult | None]:
    """Compute the field of one pair, (2, H, W) on the target's grid.

    Returns:
        The field, and the finetuner's result if it ran.
    """
    field, finetuned = aligner.align_pair(
        sample.src,
        sample.tgt,
        sample.prior_field,
        options=replace(aligner.options, tiling=Tiling()),
        defects=(sample.src_defects, sample.tgt_defects),
    )
    if not torch.isfinite(field).all():
        logger.warning("%s: no finite field, its prior field is kept", sample.pair[0])
        field = sample.prior_field
        if field is None:
            field = torch.zeros_like(sample.src).repeat(1, 2, 1, 1)
    field = resample_field(
        field, sources.images.grid(index), sources.target.grid(index)
    )
    return field[0].cpu().numpy(), finetuned


def _with_tgt_field(sources: _Sources, index: int, field: np.ndarray) -> np.ndarray:
    """Stack the field of src and the prior field of tgt, if there is one.

    Returns:
        (2, H, W) or (2 sides, 2, H, W) on the target's grid.
    """
    if sources.prior is None or sources.num_sides == 1:
        return field
    tgt_field = torch.from_numpy(sources.prior.read(index, 1))[None]
    tgt_field = resample_field(
        tgt_field, sources.images.grid(index), sources.target.grid(index)
    )
    return np.stack([field, tgt_field[0].numpy()])


def _meta(
    config: WriteFieldsConfig, sources: _Sources, request: dict[str, Any]
) -> FieldSetMeta:
    return FieldSetMeta(
        frames=[sources.location(index) for index in range(sources.target.num_pairs)],
        source=f"{config.weights} sha256 {request['weights_sha256']}",
        command=cli.command_line(),
        request=as_json(request),
        resolution=sources.target.resolution,
        stage=config.module.stage,
        tag=config.checkpoint_name,
        num_sides=sources.num_sides,
    )
