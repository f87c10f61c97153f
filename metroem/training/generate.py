"""Fields of one stage for every pair, written for the next stage to start from."""

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from metroem.aligner import Aligner
from metroem.data.dataset import PairRef, image_sets_at, open_prior, read_sample
from metroem.errors import CheckpointError, DatasetError
from metroem.field import move_field
from metroem.field_search import Finetuned, summary
from metroem.io.h5 import (
    FieldSet,
    FieldSetMeta,
    ImageSet,
    PairFrame,
    write_field_set,
)
from metroem.io.parts import PartStore, as_json, differences, parts_folder
from metroem.nets.checkpoint import checkpoint_path
from metroem.nets.loading import load_module
from metroem.progress import progress
from metroem.specs.filenames import FieldSetName
from metroem.specs.pyramid import ModuleSpec
from metroem.training import distributed
from metroem.training.stopping import Stopped, StopRequest

logger = logging.getLogger(__name__)


def finetune_iterations(stage: int) -> int:
    """Steps of the finetuner between stages: 300, halved from stage to stage.

    Source: the original's `train.py`.
    """
    return 300 // 2**stage


@dataclass(frozen=True)
class FieldJob:
    """Which fields are to be made.

    Attributes:
        module: makes them.
        next_module: whose mip they are brought to; None keeps the module's.
        dataset: folder of the image sets; the field sets go there too.
        checkpoint_name: weights of the module, and tag of the field sets.
        device: of this rank.
    """

    module: ModuleSpec
    next_module: ModuleSpec | None
    dataset: Path
    checkpoint_name: str
    device: torch.device

    @property
    def mip(self) -> int:
        """Mip of the fields written."""
        return (self.next_module or self.module).in_mip

    @property
    def weights(self) -> Path:
        """The checkpoint that the module runs with."""
        return checkpoint_path(self.module.weights_folder, self.checkpoint_name)


class _Sources(NamedTuple):
    """What the fields of one place are made from, opened and checked once."""

    images: ImageSet
    prior: FieldSet | None  # of the stage before
    target: ImageSet  # of the next stage's mip: where the fields are to lie


def generate_fields(job: FieldJob, stop: StopRequest) -> None:
    """Write the fields of one stage for all its image sets.

    Each pair's field is finetuned and brought to the next stage's mip through
    the recorded places of both. A set that is there already, made by the same
    weights, is left alone; one that was begun goes on where it was. The ranks
    share the pairs, rank 0 writes the files.

    Args:
        job: module and data.
        stop: looked at after each pair.

    Raises:
        Stopped: `stop` asked for it; the pairs done are kept.
        CheckpointError: the module has no such checkpoint.
        DatasetError: images or prior fields are missing, or a file of the
            same name was not made by a training.
    """
    if not job.weights.is_file():
        raise CheckpointError(
            f"{job.weights}: no such checkpoint, so stage {job.module.stage} cannot "
            f"write fields; train it first (--train_stages {job.module.stage})"
        )
    sets = image_sets_at(job.dataset, job.module.in_mip)
    targets = target_sets(job.dataset, sets, job.mip)
    aligner = None
    for images, target in zip(sets, targets, strict=True):
        prior = None
        if job.module.stage > 0:
            prior = open_prior(images, job.module.stage, job.checkpoint_name)
        sources = _Sources(images, prior, target)
        request = _request(job, sources)
        path = _field_path(job, target)
        if _is_done(path, request):
            logger.info("%s: there already", path)
            continue
        aligner = aligner or _load(job)
        _generate_set(job, aligner, sources, request, stop)


def target_sets(dataset: Path, sets: Sequence[ImageSet], mip: int) -> list[ImageSet]:
    """The image set at another mip of each set's place.

    Raises:
        DatasetError: a place has none, or another number of pairs.
    """
    by_place = {images.name.place: images for images in image_sets_at(dataset, mip)}
    found = []
    for images in sets:
        target = by_place.get(images.name.place)
        if target is None or target.num_pairs != images.num_pairs:
            raise DatasetError(
                f"{images.path}: its place has no image set at mip {mip} with the "
                f"same {images.num_pairs} pairs, which the next stage needs; download "
                f"both mips in one call of download_image.py"
            )
        found.append(target)
    return found


def _field_path(job: FieldJob, target: ImageSet) -> Path:
    place = target.name.place
    name = FieldSetName(job.module.stage, place, job.mip, job.checkpoint_name)
    return job.dataset / name.filename


def _request(job: FieldJob, sources: _Sources) -> dict[str, Any]:
    digest = hashlib.sha256(job.weights.read_bytes()).hexdigest()
    prior = sources.prior
    return {
        "weights_sha256": digest,
        "images": sources.images.path.name,
        "target": sources.target.path.name,
        "finetune_iter": finetune_iterations(job.module.stage),
        "prior": prior and prior.attributes.get("request", prior.path.name),
    }


def _is_done(path: Path, request: dict[str, Any]) -> bool:
    if not path.is_file():
        return False
    existing = FieldSet(path)
    made_by = existing.attributes.get("request", {})
    if existing.num_sides == 2 or "weights_sha256" not in made_by:
        raise DatasetError(
            f"{path}: was not made by this program's training, and would be replaced; "
            "train under another --checkpoint_name, or leave its stage out of "
            "--generate_field_stages"
        )
    return not differences(made_by, request)


def _load(job: FieldJob) -> Aligner:
    module = load_module(
        job.module.path,
        checkpoint_name=job.checkpoint_name,
        finetune=True,
        pass_field=True,
        finetune_iter=finetune_iterations(job.module.stage),
    )
    return module.aligner.to(job.device).eval()  # type: ignore[union-attr]


def _generate_set(
    job: FieldJob,
    aligner: Aligner,
    sources: _Sources,
    request: dict[str, Any],
    stop: StopRequest,
) -> None:
    images, target = sources.images, sources.target
    path = _field_path(job, target)
    parts = _open_parts(path, request)
    mine = range(distributed.rank(), images.num_pairs, distributed.world_size())
    code, gains = 0, []
    what = f"fields of stage {job.module.stage} for {images.path.name}, pairs"
    for index in progress(mine, what, total=len(mine)):
        if not parts.has(str(index)):
            field, finetuned = _field_of(job, aligner, sources, index)
            parts.put(str(index), field)
            gains += [finetuned] if finetuned else []
        code = stop.code
        if code:
            break
    if gains:
        logger.info("%s: %s", path.name, summary(gains))
    (code,) = distributed.largest(torch.tensor([code], device=job.device)).tolist()
    if code:
        raise Stopped(code)
    if distributed.rank() == 0:
        write_field_set(
            path, _in_order(parts, images.num_pairs), _meta(job, target, request)
        )
        parts.remove()
    distributed.barrier()


def _open_parts(path: Path, request: dict[str, Any]) -> PartStore:
    """The parts of a field set; those of other weights are thrown away."""
    folder = parts_folder(path)
    if distributed.rank() == 0:
        try:
            PartStore(folder, request)
        except DatasetError:
            logger.info("%s: begun with other weights, made anew", folder)
            PartStore.discard(folder)
            PartStore(folder, request)
    distributed.barrier()
    return PartStore(folder, request)


def _field_of(
    job: FieldJob, aligner: Aligner, sources: _Sources, index: int
) -> tuple[np.ndarray, Finetuned | None]:
    """The field of one pair, (2, H, W) on the target's grid, and what it gained."""
    ref = PairRef(sources.images, sources.prior, index)
    sample = read_sample(ref, ref.grid).to(job.device)
    field, finetuned = aligner.align_pair(
        sample.src,
        sample.tgt,
        sample.prior_field,
        defects=(sample.src_defects, sample.tgt_defects),
    )
    if not torch.isfinite(field).all():
        logger.warning("%s: no finite field, its prior field is kept", ref.name)
        field = sample.prior_field
        if field is None:
            field = torch.zeros_like(sample.src).repeat(1, 2, 1, 1)
    field = move_field(field, ref.grid, sources.target.grid(index))
    return field[0].cpu().numpy(), finetuned


def _in_order(parts: PartStore, num_pairs: int) -> Iterator[np.ndarray]:
    for index in range(num_pairs):
        yield parts.load(str(index))


def _meta(job: FieldJob, target: ImageSet, request: dict[str, Any]) -> FieldSetMeta:
    return FieldSetMeta(
        frames=[
            PairFrame(target.grid(index), target.sections(index))
            for index in range(target.num_pairs)
        ],
        source=f"{job.weights} sha256 {request['weights_sha256']}",
        command=" ".join(sys.argv),
        request=as_json(request),
        stage=job.module.stage,
        tag=job.checkpoint_name,
    )
