"""Train a pyramid stage by stage: train a module, then write its fields."""

import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from msgspec.structs import replace

from metroem.aligner import Aligner
from metroem.data.dataset import (
    Split,
    find_pairs,
    image_sets_at,
    prior_path,
    split_pairs,
)
from metroem.errors import CheckpointError, DatasetError
from metroem.io.files import lock, lock_path
from metroem.io.h5 import FieldSet, find_image_sets
from metroem.models.load import load_module
from metroem.models.weights import check_weights, checkpoint_path
from metroem.specs.modules import ModuleSpec, find_modules, select_stages
from metroem.specs.schedule import FINETUNING_MODES, Phase, Schedule, load_schedule
from metroem.training.checkpoint import RunFolder
from metroem.training.compile import check_compiler, check_compiles
from metroem.training.config import StageConfig, batch_size_of
from metroem.training.requests import TrainRequest
from metroem.training.stage import discard_training, train_stage, try_folders
from metroem.training.tensorboard import TensorBoardWriter
from metroem.training.write_fields import (
    WriteFieldsConfig,
    target_sets,
    weights_of,
    write_fields,
)
from metroem.utils import cli, distributed
from metroem.utils.memory import keep_freed_memory
from metroem.utils.stop_request import TIME_UP, Stopped, StopRequest

logger = logging.getLogger(__name__)

# By the default schedule an H100 trains on 230 samples of 256 px a second, and a core
# beside it makes 50 (2026-11).
_MOST_WORKERS = 8


def train_pyramid(request: TrainRequest) -> None:
    """Train a pyramid stage by stage, each on the fields of the one before.

    With no stage to train, only fields are written: weights and states stay as they
    are. A run that was stopped, whatever stopped it, is resumed when it is called
    again with the same flags.

    Raises:
        MetroEMError: what cannot work, before any training where possible.
        StorageError: another run trains this pyramid under this name.
        KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM, once the state is
            saved.
    """
    plan = _plan(request)
    if request.redirect_stdout and distributed.rank() == 0:
        cli.mirror_log(request.pyramid_path / f"{request.checkpoint_name}.log")
    device = distributed.choose_device(request.device, request.gpus)
    logger.info("%s", distributed.describe(device))
    schedule = load_schedule(request.train_mode, request.train_params_path)
    if device.type == "cpu":
        keep_freed_memory()
    with (
        distributed.process_group(device),
        _claimed(request),
        StopRequest(request.max_minutes) as stop,
        _tensorboard(request) as writer,
    ):
        phases = _prepare(request, plan, schedule, device)
        try:
            for module in plan.modules:
                if module in plan.to_train or module in plan.to_write:
                    _check_prior_weights(request, plan, module)
                if module in plan.to_train:
                    config = _stage_config(
                        request, plan, module, phases[module], device
                    )
                    train_stage(config, stop, writer)
                    distributed.barrier()
                if module in plan.to_write:
                    write_fields(_fields_config(request, plan, module, device), stop)
        except Stopped as stopped:
            logger.info("stopped; the same command goes on from here")
            if stopped.code == cli.INTERRUPTED:
                raise KeyboardInterrupt from None
            if stopped.code != TIME_UP:
                sys.exit(stopped.code)
        else:
            done = request.pyramid_path if plan.to_train else request.fields_folder
            logger.info("done: %s", done)


@contextmanager
def _claimed(request: TrainRequest) -> Iterator[None]:
    """Keep other runs from the state, the weights and the fields of this one."""
    paths = [request.fields_folder / f"field_{request.checkpoint_name}"]
    if request.trains:
        run = RunFolder.of(request.pyramid_path, request.checkpoint_name)
        paths.insert(0, run.path)
    with ExitStack() as locks:
        if distributed.rank() == 0:
            for path in paths:
                locks.enter_context(lock(lock_path(path)))
        distributed.barrier()  # the other ranks write only what the first may
        yield


def _tensorboard(
    request: TrainRequest,
) -> AbstractContextManager[TensorBoardWriter | None]:
    """Where --tensorboard writes, on the first rank."""
    if not (request.tensorboard and request.trains) or distributed.rank() > 0:
        return nullcontext()
    run = RunFolder.of(request.pyramid_path, request.checkpoint_name)
    return TensorBoardWriter(run.tensorboard)


class _Plan(NamedTuple):
    """What is to be done."""

    modules: list[ModuleSpec]
    to_train: list[ModuleSpec]
    to_write: list[ModuleSpec]  # whose fields are written

    def mip_of_fields(self, module: ModuleSpec) -> int:
        """The mip that a module's fields are brought to: that of the next stage."""
        return (self.modules[module.stage + 1 :] or [module])[0].in_mip


def _prepare(
    request: TrainRequest, plan: _Plan, schedule: Schedule, device: torch.device
) -> dict[ModuleSpec, tuple[Phase, ...]]:
    """Refuse, before hours of work, what a stage would fail for; clear for --restart.

    Returns:
        The phases of each module to train.
    """
    run = RunFolder.of(request.pyramid_path, request.checkpoint_name)
    if plan.to_train:
        run.make()
        distributed.check_shared(run.path)
    _check_weights(request, plan.to_train, run)
    phases = {module: _phases(request, schedule, module) for module in plan.to_train}
    for module in plan.to_train:
        _check_sizes(request.dataset_path, module, phases[module])
        for phase in phases[module]:
            batch_size_of(phase, request.batch_size, distributed.world_size())
    if request.restart:
        for module in plan.to_train:
            fields_path = request.fields_folder if module in plan.to_write else None
            try_folders(module, run, fields_path, distributed.rank())
        if distributed.rank() == 0:
            for module in plan.to_train:
                discard_training(module, run, request.checkpoint_name)
        distributed.barrier()
    if request.compile:
        _check_compile(plan.to_train, device)
    return phases


def _stage_config(
    request: TrainRequest,
    plan: _Plan,
    module: ModuleSpec,
    phases: tuple[Phase, ...],
    device: torch.device,
) -> StageConfig:
    """All that the training of a module is told."""
    split = _split(request, module)
    earlier = tuple(m for m in plan.modules if m.stage < module.stage)
    if any(ref.moves_tgt for ref in split.training):
        earlier = ()  # priors come from a download, not from stage 0
    workers = request.num_workers
    return StageConfig(
        module=module,
        phases=phases,
        split=split,
        run=RunFolder.of(request.pyramid_path, request.checkpoint_name),
        checkpoint_name=request.checkpoint_name,
        device=device,
        seed=request.seed,
        batch_size=request.batch_size,
        num_workers=_workers_for(device) if workers is None else workers,
        precision=request.precision,
        compiles=request.compile,
        checkpoints_activations=request.checkpoint_activations,
        earlier=earlier,
        fields_path=request.fields_folder if module in plan.to_write else None,
        rank=distributed.rank(),
        num_ranks=distributed.world_size(),
    )


def _fields_config(
    request: TrainRequest, plan: _Plan, module: ModuleSpec, device: torch.device
) -> WriteFieldsConfig:
    """Which fields of a module are to be written."""
    return WriteFieldsConfig(
        module=module,
        mip=plan.mip_of_fields(module),
        dataset=request.dataset_path,
        fields_path=request.fields_folder,
        checkpoint_name=request.checkpoint_name,
        device=device,
        verifies=request.verify,
    )


def _plan(request: TrainRequest) -> _Plan:
    """What is to be done; what a later stage would fail for is refused now.

    Where a training does not say which, fields are written by the modules that it
    trains, and by others that have weights and find images. Without training, by all.
    """
    modules, folder = find_modules(request.pyramid_path), request.dataset_path
    to_train = select_stages(modules, request.train_stages, "--train_stages")
    flag = "--generate_field_stages (--stages of write-fields)"
    to_write = select_stages(modules, request.generate_field_stages, flag)
    plan = _Plan(modules, to_train, to_write)
    if request.generate_field_stages is None and to_train:
        able = [m for m in modules if m in to_train or _can_write(request, plan, m)]
        plan = plan._replace(to_write=able)
    for module in modules:
        if module not in to_train and module not in plan.to_write:
            continue
        sets = image_sets_at(folder, module.in_mip)
        if module in plan.to_write:
            target_sets(folder, sets, plan.mip_of_fields(module))
            if module not in to_train:
                weights_of(module, request.checkpoint_name)
    return plan


def _can_write(request: TrainRequest, plan: _Plan, module: ModuleSpec) -> bool:
    """Whether a module that is not to be trained can write fields; if not, say why."""
    mips = {images.mip for images in find_image_sets(request.dataset_path)}
    weights = checkpoint_path(module.weights_folder, request.checkpoint_name)
    if not weights.is_file():
        why = "not trained"
    elif not {module.in_mip, plan.mip_of_fields(module)} <= mips:
        why = f"no images at mip {module.in_mip}, or at that of its fields"
    else:
        return True
    logger.info("stage %d: %s, writes no fields", module.stage, why)
    return False


def _check_prior_weights(
    request: TrainRequest, plan: _Plan, module: ModuleSpec
) -> None:
    """Refuse prior fields that other weights wrote than the stage before has now.

    Raises:
        DatasetError: so.
    """
    before = plan.modules[max(module.stage - 1, 0)]
    weights = checkpoint_path(before.weights_folder, request.checkpoint_name)
    if module.stage == 0 or before in plan.to_write or not weights.is_file():
        return
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    for images in image_sets_at(request.dataset_path, module.in_mip):
        name, folder = request.checkpoint_name, request.fields_path
        path = prior_path(images, module.stage, name, folder)
        request_of = FieldSet(path).request if path.is_file() else {}
        if request_of.get("weights_sha256", digest) != digest:
            raise DatasetError(
                f"{path}: written by other weights than {weights} has now; write those "
                f"fields too: --generate_field_stages (--stages of write-fields) "
                f"{before.stage} {module.stage}"
            )


def _check_weights(
    request: TrainRequest, to_train: list[ModuleSpec], run: RunFolder
) -> None:
    """Refuse to finetune what has no weights; a run that goes on has its own."""
    if request.train_mode not in FINETUNING_MODES:
        return
    mode, path = request.train_mode, request.pyramid_path
    a_copy = f"python -m metroem fetch {path} COPY, then --pyramid_path COPY"
    to_begin = []
    for module in to_train:
        has_begun = run.state(module.stage).is_file()
        if not has_begun:
            to_begin.append(module)
        elif request.restart and not run.weights(module.stage, "initial").is_file():
            raise CheckpointError(
                f"--train_mode {mode} --restart: stage {module.stage} began from fresh "
                f"weights, and would begin there again; finetune a copy: {a_copy}"
            )
    where = f"--train_mode {mode} (a run beside another: {a_copy})"
    check_weights(to_begin, request.checkpoint_name, where)


def _phases(
    request: TrainRequest, schedule: Schedule, module: ModuleSpec
) -> tuple[Phase, ...]:
    """The phases of a module, as the flags change them."""
    phases = schedule.for_mip(module.in_mip, max_epochs=request.max_epochs)
    if request.ema is None:
        return phases
    return tuple(replace(phase, ema=request.ema) for phase in phases)


def _check_sizes(dataset: Path, module: ModuleSpec, phases: tuple[Phase, ...]) -> None:
    """Refuse patches that a phase of a module cannot take."""
    least = max(phase.least_px for phase in phases)
    for images in image_sets_at(dataset, module.in_mip):
        if min(images.shape) < least:
            raise DatasetError(
                f"{images.path}: patches of {images.shape[0]} x {images.shape[1]} px; "
                f"stage {module.stage}, which reads mip {module.in_mip}, needs at "
                f"least {least} px a side for its schedule: download larger ones "
                "(download_image.py --patch_size)"
            )


def _check_compile(modules: list[ModuleSpec], device: torch.device) -> None:
    """Refuse --compile, before hours of work, where it cannot work."""
    check_compiler(device)
    for module in modules:
        loaded = load_module(module.path, checkpoint_name=None, finetune=False)
        aligner: Aligner = loaded.aligner  # type: ignore[assignment]
        check_compiles(aligner, module.path)


def _split(request: TrainRequest, module: ModuleSpec) -> Split:
    """The pairs of a stage, those held out written to the log."""
    pairs = find_pairs(
        request.dataset_path,
        module.in_mip,
        stage=module.stage,
        checkpoint_name=request.checkpoint_name,
        fields_path=request.fields_path,
        verifies=request.verify,
    )
    split = split_pairs(pairs, request.val_pairs)
    logger.info(
        "stage %d mip %d: %d pairs to train on, %d unused beside those held out; "
        "held out: %s",
        *(module.stage, module.in_mip, len(split.training)),
        len(pairs) - len(split.training) - len(split.validation),
        "; ".join(ref.name for ref in split.validation) or "none",
    )
    return split


def _workers_for(device: torch.device) -> int:
    """How many processes read for a rank: those that its share of the cores can run."""
    if device.type == "cpu":
        return 0  # its cores have the network to compute
    cores = len(os.sched_getaffinity(0))  # a cluster may lend a part of them
    return min(_MOST_WORKERS, max(1, cores // distributed.ranks_of_machine()))
