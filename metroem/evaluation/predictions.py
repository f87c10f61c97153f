"""Keep the fields of each pair in files, so that figures can be computed again.

The fields of one pair are one file of float32 numbers, in the order of `Fields`. A file
belongs to the content of its images: its name has a hash of them. A folder belongs to
weights, networks and a version of MetroEM: `request.json` names them. So a folder of
other weights is started again, and a pair with other images is aligned again.
"""

import hashlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metroem import __version__
from metroem.errors import StorageError
from metroem.evaluation.plan import Location, Task
from metroem.evaluation.requests import EvaluateRequest
from metroem.io.files import lock, lock_path, try_writing
from metroem.io.resume import ResumeStore, describe_differences
from metroem.models.weights import checkpoint_path
from metroem.specs.modules import ModuleSpec
from metroem.utils import format_versions

logger = logging.getLogger(__name__)

_FLOAT_BYTES = 4
_NAME_CHARACTERS = 150  # of the image set, in the name of a file


class Fields(NamedTuple):
    """The fields of a pair, or of a section that is warped by a known field.

    Each is (1, 2, H, W) float32, px, on the CPU.
    """

    forward: list[Tensor]  # of each stage, on its grid; of the last one for a section
    backward: Tensor  # of the last stage, tgt to src; of the section on itself


@contextmanager
def open_predictions(
    request: EvaluateRequest,
    modules: Sequence[ModuleSpec],
    checkpoint_name: str | None,
    keys: Sequence[str],
) -> Iterator[ResumeStore]:
    """Open the folder that keeps the fields; other runs are locked out meanwhile.

    Fields that were made in another way are discarded, and the log says why. Where the
    default folder cannot be written, fields are kept in a temporary one for this run.

    Args:
        request: the flags.
        modules: the stages that are run.
        checkpoint_name: of the weights; None for untrained networks.
        keys: see `prediction_key`. Fields of the same pair with another key are
            deleted.

    Raises:
        StorageError: the folder of --predictions cannot be written, or another run is
            using it.
    """
    folder = predictions_folder(request)
    made_with = _made_with(request, modules, checkpoint_name)
    with ExitStack() as stack:
        stored = ResumeStore.stored_request(folder)
        is_same = stored is not None and not describe_differences(stored, made_with)
        is_complete = is_same and all((folder / f"{key}.npy").is_file() for key in keys)
        if not is_complete:
            try:
                try_writing(folder.parent, "--predictions")
            except StorageError as error:
                if request.predictions is not None:
                    raise
                logger.warning("%s; fields are kept only until the end", error)
                name = tempfile.TemporaryDirectory(prefix="metroem-evaluate-")
                folder = Path(stack.enter_context(name)) / folder.name
        stack.enter_context(lock(lock_path(folder)))
        if folder.exists():
            _discard_stale(folder, made_with, keys)
        try:
            yield ResumeStore(folder, made_with)
        finally:
            _remove_partial(folder)


def predictions_folder(request: EvaluateRequest) -> Path:
    """Name the folder of the fields: one for each data set, and way to run stages."""
    way = "networks" if request.no_finetune else "finetuned"
    if request.stages is not None:
        way += "_stages_" + "_".join(map(str, sorted(set(request.stages))))
    if request.predictions is not None:
        return request.predictions / way
    data = request.dataset_path.resolve()
    digest = hashlib.sha256(str(data).encode()).hexdigest()[:8]
    pyramid = request.pyramid_path / ".evaluate" / request.checkpoint_name
    return pyramid / f"{data.name}_{digest}" / way


def prediction_key(location: Location, task: Task) -> str:
    """Name the fields of a pair; it changes with the content of its images."""
    sets = (location.finest,) if task.is_known else location.sets
    about = [(images.path.name, images.identity(task.index)) for images in sets]
    digest = hashlib.sha256(repr(about).encode()).hexdigest()[:12]
    return f"{_prefix(location, task)}{digest}"


def fields_bytes(location: Location, task: Task) -> int:
    """Compute the size of the fields of a pair."""
    return _FLOAT_BYTES * sum(map(np.prod, _shapes(location, task)))


def put_fields(store: ResumeStore, key: str, fields: Fields) -> None:
    """Store the fields of a pair.

    Raises:
        StorageError: the disk is full, or may not be written to.
    """
    parts = [field.flatten() for field in (*fields.forward, fields.backward)]
    store.put(key, torch.cat(parts).numpy())


def load_fields(
    store: ResumeStore, key: str, location: Location, task: Task
) -> Fields | None:
    """Load the fields of a pair; None if they are not stored, or not whole."""
    shapes = _shapes(location, task)
    sizes = [int(np.prod(shape)) for shape in shapes]
    if not store.has(key):
        return None
    flat = torch.from_numpy(np.array(store.load(key)))
    if flat.shape != (sum(sizes),) or flat.dtype != torch.float32:
        return None
    *forward, backward = (
        part.reshape(shape)
        for part, shape in zip(flat.split(sizes), shapes, strict=True)
    )
    return Fields(forward, backward)


def _prefix(location: Location, task: Task) -> str:
    kind = "section" if task.is_known else "pair"
    return f"{location.finest.path.stem[:_NAME_CHARACTERS]}_{kind}{task.index}_"


def _shapes(location: Location, task: Task) -> list[tuple[int, ...]]:
    """Shapes of the stored fields, in order."""
    sets = (location.finest,) if task.is_known else location.sets
    return [(1, 2, *images.shape) for images in (*sets, sets[-1])]


def _made_with(
    request: EvaluateRequest,
    modules: Sequence[ModuleSpec],
    checkpoint_name: str | None,
) -> dict[str, Any]:
    """All that fields depend on, but the images."""
    digests = {
        f"weights of stage {module.stage}": _digest(module, checkpoint_name)
        for module in modules
    }
    return {
        "format_version": format_versions.PREDICTIONS,
        "MetroEM": __version__,
        "no_finetune": request.no_finetune,
        **digests,
    }


def _digest(module: ModuleSpec, checkpoint_name: str | None) -> str:
    """Hash the weights, the spec of the network and the code of a module."""
    paths = [module.weights_folder / "model_spec.json", *module.path.glob("*.py")]
    if checkpoint_name is not None:
        paths.append(checkpoint_path(module.weights_folder, checkpoint_name))
    sha = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file():
            sha.update(repr((path.name, path.stat().st_size)).encode())
            sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


def _remove_partial(folder: Path) -> None:
    """Delete what killed processes had begun to write."""
    for path in folder.glob(".*.tmp-*"):
        path.unlink(missing_ok=True)


def _discard_stale(
    folder: Path, made_with: dict[str, Any], keys: Sequence[str]
) -> None:
    """Delete fields that are made again, and partial files of killed runs."""
    stored = ResumeStore.stored_request(folder)
    differences = describe_differences(stored or {}, made_with)
    if stored is None or differences:
        logger.info(
            "%s: its fields were made in another way (%s); all pairs are aligned again",
            *(folder, differences if stored else "request.json cannot be read"),
        )
        ResumeStore.discard(folder)
        return
    _remove_partial(folder)
    wanted = {key.rpartition("_")[0]: key for key in keys}
    stale = [
        path
        for path in folder.glob("*.npy")
        if wanted.get(path.stem.rpartition("_")[0], path.stem) != path.stem
    ]
    for path in stale:
        path.unlink(missing_ok=True)
    if stale:
        logger.info(
            "%s: the images of %d pairs have changed; they are aligned again",
            *(folder, len(stale)),
        )
