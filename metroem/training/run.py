"""Train a pyramid stage by stage: train a module, then write its fields."""

import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from msgspec.structs import replace

from metroem.aligner import Aligner
from metroem.data.dataset import (
    PairRef,
    Split,
    find_pairs,
    image_sets_at,
    open_prior,
    prior_path,
    split_pairs,
)
from metroem.data.sampling import ValidationPairs, num_steps
from metroem.errors import CheckpointError, DatasetError
from metroem.io.files import lock, lock_path
from metroem.io.h5 import FieldSet, find_image_sets
from metroem.models.load import load_module
from metroem.models.weights import check_weights, checkpoint_path
from metroem.specs.modules import ModuleSpec, find_modules, select_stages
from metroem.specs.schedule import FINETUNING_MODES, Phase, Schedule, load_schedule
from metroem.training.checkpoint import RunFolder, load_state
from metroem.training.compile import check_compiler, check_compiles
from metroem.training.config import StageConfig, batch_size_of
from metroem.training.requests import TrainRequest
from metroem.training.run_clock import RunClock
from metroem.training.stage import discard_training, train_stage, try_folders
from metroem.training.tensorboard import TensorBoardWriter
from metroem.training.time_left import FIELDS_COST, PhaseWork, StageWork, phase_work
from metroem.training.write_fields import (
    WriteFieldsConfig,
    seconds_of_pair,
    target_sets,
    weights_of,
    write_fields,
)
from metroem.utils import cli, distributed
from metroem.utils.memory import keep_freed_memory
from metroem.utils.stop_request import TIME_UP, Stopped, StopRequest

logger = logging.getLogger(__name__)

# With the default schedule an H100 trains on 230 samples of 256 px a second, and a CPU
# core makes 50 (2026-11).
_MAX_WORKERS = 8


def train_pyramid(request: TrainRequest, started: float | None = None) -> None:
    """Train a pyramid stage by stage, each on the fields of the previous stage.

    Without a stage to train, only fields are written; weights and states do not change.
    A stopped run, for whatever reason it stopped, is resumed by a call with the same
    flags.

    Args:
        request: the flags.
        started: `time.monotonic()` when the command began, from which --budget_minutes
            counts; None means now.

    Raises:
        MetroEMError: a stage cannot work; before any training if possible.
        StorageError: another run trains this pyramid under this name.
        KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM, after the state is saved.
    """
    started = time.monotonic() if started is None else started
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
        _locked(request),
        StopRequest(request.max_minutes) as stop,
        _tensorboard(request) as writer,
    ):
        phases = _prepare(request, plan, schedule, device)
        works = _works(request, plan, phases)
        run = RunFolder.of(request.pyramid_path, request.checkpoint_name)
        clock = RunClock(
            works,
            started=started,
            device=device,
            budget_minutes=request.budget_minutes,
            record=run.budget if request.trains else None,
        )
        try:
            if clock.has_budget:
                for module in plan.to_write:
                    fields = _fields_config(request, plan, module, device)
                    clock.after_field(module.stage, seconds_of_pair(fields))
            for module in plan.modules:
                if module in plan.to_train or module in plan.to_write:
                    _check_prior_weights(request, plan, module)
                if module in plan.to_train:
                    config = _stage_config(
                        request, plan, module, phases[module], device
                    )
                    train_stage(config, stop, clock, writer)
                    distributed.barrier()
                if module in plan.to_write:
                    fields = _fields_config(request, plan, module, device)
                    write_fields(fields, stop, clock)
        except Stopped as stopped:
            clock.save(at_once=True)
            logger.info("stopped; the same command resumes from here")
            if stopped.code == cli.INTERRUPTED:
                raise KeyboardInterrupt from None
            if stopped.code != TIME_UP:
                sys.exit(stopped.code)
        else:
            done = request.pyramid_path if plan.to_train else request.fields_folder
            logger.info("done: %s", done)
            clock.end()


@contextmanager
def _locked(request: TrainRequest) -> Iterator[None]:
    """Lock the state, the weights and the fields of this run against other runs."""
    paths = [request.fields_folder / f"field_{request.checkpoint_name}"]
    if request.trains:
        run = RunFolder.of(request.pyramid_path, request.checkpoint_name)
        paths.insert(0, run.path)
    with ExitStack() as locks:
        if distributed.rank() == 0:
            for path in paths:
                locks.enter_context(lock(lock_path(path)))
        distributed.barrier()  # no rank writes before rank 0 has the locks
        yield


def _tensorboard(
    request: TrainRequest,
) -> AbstractContextManager[TensorBoardWriter | None]:
    """Make the writer of --tensorboard, on the first rank."""
    if not (request.tensorboard and request.trains) or distributed.rank() > 0:
        return nullcontext()
    run = RunFolder.of(request.pyramid_path, request.checkpoint_name)
    return TensorBoardWriter(run.tensorboard)


class _Plan(NamedTuple):
    """The stages to train, and the stages to write fields of."""

    modules: list[ModuleSpec]  # all of the pyramid
    to_train: list[ModuleSpec]
    to_write: list[ModuleSpec]  # modules whose fields are written

    def mip_of_fields(self, module: ModuleSpec) -> int:
        """The mip of the fields that a module writes: the mip of the next stage."""
        return (self.modules[module.stage + 1 :] or [module])[0].in_mip


def _prepare(
    request: TrainRequest, plan: _Plan, schedule: Schedule, device: torch.device
) -> dict[ModuleSpec, tuple[Phase, ...]]:
    """Check, before hours of work, that each stage can be trained; apply --restart.

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
        if module.stage > 0 and plan.modules[module.stage - 1] not in plan.to_write:
            for images in image_sets_at(request.dataset_path, module.in_mip):
                name, folder = request.checkpoint_name, request.fields_path
                open_prior(images, module.stage, name, folder)
        for phase in phases[module]:
            batch_size_of(phase, request.batch_size, distributed.world_size())
    if request.restart:
        for module in plan.to_train:
            fields_path = request.fields_folder if module in plan.to_write else None
            try_folders(module, run, fields_path, distributed.rank())
        if distributed.rank() == 0:
            run.budget.unlink(missing_ok=True)
            for module in plan.to_train:
                discard_training(module, run, request.checkpoint_name)
        distributed.barrier()
    if request.compile:
        _check_compile(plan.to_train, device)
    return phases


def _works(
    request: TrainRequest, plan: _Plan, phases: dict[ModuleSpec, tuple[Phase, ...]]
) -> list[StageWork]:
    """Count the work of each stage, and log it before it begins."""
    ranks, works = distributed.world_size(), []
    sizes = _network_sizes(plan)
    for module in plan.modules:
        if module not in plan.to_train and module not in plan.to_write:
            continue
        sets = image_sets_at(request.dataset_path, module.in_mip)
        pairs = [
            PairRef(images, None, i) for images in sets for i in range(images.num_pairs)
        ]
        of_phases: tuple[PhaseWork, ...] = ()
        if module in plan.to_train:
            split = split_pairs(pairs, request.val_pairs)
            earlier_px = sum(
                sizes.get(earlier, sizes[module])
                / 4 ** (earlier.in_mip - module.in_mip)
                for earlier in plan.modules[: plan.modules.index(module)]
            )
            of_phases = tuple(
                _phase_work(request, phase, split, sizes[module], earlier_px)
                for phase in phases[module]
            )
        num_fields = len(pairs) if module in plan.to_write else 0
        work = StageWork(
            module.stage,
            of_phases,
            num_fields / ranks,
            FIELDS_COST * sizes[module] * pairs[0].grid.rows * pairs[0].grid.cols,
        )
        works.append(work)
        _log_work(request, module, phases.get(module, ()), work, len(pairs))
    return works


def _phase_work(
    request: TrainRequest,
    phase: Phase,
    split: Split,
    network_size: float,
    earlier_px: float,
) -> PhaseWork:
    """Count the work of a phase on each rank."""
    ranks, grid = distributed.world_size(), split.training[0].grid
    batch = batch_size_of(phase, request.batch_size, ranks)
    per_update = batch * phase.accumulate
    held_out = len(ValidationPairs(split.validation, phase, request.seed))
    return phase_work(
        phase,
        num_steps=num_steps(phase, len(split.training), per_update),
        pairs_of_update=per_update / ranks,
        patch=(grid.rows, grid.cols),
        held_out=held_out / ranks,
        network_size=network_size,
        earlier_px=earlier_px,
    )


def _network_sizes(plan: _Plan) -> dict[ModuleSpec, float]:
    """Count the weights of the networks to use; 1 for all if they have one spec."""
    used = [m for m in plan.modules if m in plan.to_train or m in plan.to_write]
    specs = {module.spec() for module in used}
    if not plan.to_train or (len(specs) == 1 and None not in specs):
        return dict.fromkeys(used, 1.0)
    sizes = {}
    with torch.random.fork_rng(devices=[]):
        for module in used:
            loaded = load_module(module.path, checkpoint_name=None, finetune=False)
            aligner: Aligner = loaded.aligner  # type: ignore[assignment]
            sizes[module] = float(sum(w.numel() for w in aligner.net.parameters()))
    return sizes


def _log_work(
    request: TrainRequest,
    module: ModuleSpec,
    phases: tuple[Phase, ...],
    work: StageWork,
    num_pairs: int,
) -> None:
    """Log what is to be done in a stage, or what is left of it."""
    run = RunFolder.of(request.pyramid_path, request.checkpoint_name)
    said = []
    if phases:
        state = load_state(run.state(module.stage))
        epochs = " + ".join(str(phase.num_epochs) for phase in phases)
        updates = " + ".join(str(phase.num_steps) for phase in work.phases)
        said = [f"train {len(phases)} phases, {epochs} epochs, {updates} updates"]
        if state is not None and state.phase >= len(phases):
            said = ["trained"]
        elif state is not None:
            said += [f"resumes at phase {state.phase + 1}, epoch {state.epoch + 1}"]
    if work.num_fields:
        said += [f"write {num_pairs} fields"]
    logger.info(
        "plan: stage %d mip %d: %s", module.stage, module.in_mip, "; ".join(said)
    )


def _stage_config(
    request: TrainRequest,
    plan: _Plan,
    module: ModuleSpec,
    phases: tuple[Phase, ...],
    device: torch.device,
) -> StageConfig:
    """Make the config of the training of a module."""
    split = _split(request, module)
    earlier = tuple(m for m in plan.modules if m.stage < module.stage)
    run = RunFolder.of(request.pyramid_path, request.checkpoint_name)
    first_weights = run.weights(module.stage, "initial")
    if not run.state(module.stage).is_file():
        first_weights = checkpoint_path(module.weights_folder, request.checkpoint_name)
    if any(ref.moves_tgt for ref in split.training):
        earlier = ()  # prior fields come from a download, not from stage 0
    workers = request.num_workers
    return StageConfig(
        module=module,
        phases=phases,
        split=split,
        run=run,
        checkpoint_name=request.checkpoint_name,
        device=device,
        seed=request.seed,
        batch_size=request.batch_size,
        num_workers=_workers_for(device) if workers is None else workers,
        precision=request.precision,
        compiles=request.compile,
        checkpoints_activations=request.checkpoint_activations,
        earlier=earlier,
        fields=(
            _fields_config(request, plan, module, device)
            if module in plan.to_write
            else None
        ),
        keeps_labels=request.train_mode in FINETUNING_MODES or first_weights.is_file(),
        rank=distributed.rank(),
        num_ranks=distributed.world_size(),
    )


def _fields_config(
    request: TrainRequest, plan: _Plan, module: ModuleSpec, device: torch.device
) -> WriteFieldsConfig:
    """Make the config for writing the fields of a module."""
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
    """Plan which stages are trained and write fields; check that their images exist.

    Without --generate_field_stages, a training writes fields of the modules that it
    trains, and of others that have weights and images. Without training, fields of all
    modules are written.
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
    """Whether a module that is not trained now can write fields; if not, log why."""
    mips = {images.mip for images in find_image_sets(request.dataset_path)}
    weights = checkpoint_path(module.weights_folder, request.checkpoint_name)
    if not weights.is_file():
        why = "not trained"
    elif not {module.in_mip, plan.mip_of_fields(module)} <= mips:
        why = f"no images at mip {module.in_mip}, or at the mip of its fields"
    else:
        return True
    logger.info("stage %d: %s, writes no fields", module.stage, why)
    return False


def _check_prior_weights(
    request: TrainRequest, plan: _Plan, module: ModuleSpec
) -> None:
    """Refuse prior fields that were not written by the previous stage's weights.

    Raises:
        DatasetError: other weights wrote them.
    """
    previous = plan.modules[max(module.stage - 1, 0)]
    weights = checkpoint_path(previous.weights_folder, request.checkpoint_name)
    if module.stage == 0 or previous in plan.to_write or not weights.is_file():
        return
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    for images in image_sets_at(request.dataset_path, module.in_mip):
        name, folder = request.checkpoint_name, request.fields_path
        path = prior_path(images, module.stage, name, folder)
        made_from = FieldSet(path).request if path.is_file() else {}
        if made_from.get("weights_sha256", digest) != digest:
            raise DatasetError(
                f"{path}: written by other weights than {weights} has now; write those "
                f"fields too: --generate_field_stages (--stages of write-fields) "
                f"{previous.stage} {module.stage}"
            )


def _check_weights(
    request: TrainRequest, to_train: list[ModuleSpec], run: RunFolder
) -> None:
    """Refuse to finetune modules without weights; a resumed run has its own."""
    if request.train_mode not in FINETUNING_MODES:
        return
    mode, path = request.train_mode, request.pyramid_path
    how_to_copy = f"metroem fetch {path} --pyramid_path COPY, then train COPY"
    not_started = []
    for module in to_train:
        if not run.state(module.stage).is_file():
            not_started.append(module)
        elif request.restart and not run.weights(module.stage, "initial").is_file():
            raise CheckpointError(
                f"--train_mode {mode} --restart: stage {module.stage} began from fresh "
                f"weights, and would begin from them again; finetune a copy: "
                f"{how_to_copy}"
            )
    where = f"--train_mode {mode} (for a second run: {how_to_copy})"
    check_weights(not_started, request.checkpoint_name, where)


def _phases(
    request: TrainRequest, schedule: Schedule, module: ModuleSpec
) -> tuple[Phase, ...]:
    """The phases of a module, with --max_epochs and --ema applied."""
    phases = schedule.for_mip(module.in_mip, max_epochs=request.max_epochs)
    if request.ema is None:
        return phases
    return tuple(replace(phase, ema=request.ema) for phase in phases)


def _check_sizes(dataset: Path, module: ModuleSpec, phases: tuple[Phase, ...]) -> None:
    """Refuse patches that are too small for a phase of a module (DatasetError)."""
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
    """Refuse --compile, before hours of work, if it cannot work."""
    check_compiler(device)
    for module in modules:
        loaded = load_module(module.path, checkpoint_name=None, finetune=False)
        aligner: Aligner = loaded.aligner  # type: ignore[assignment]
        check_compiles(aligner, module.path)


def _split(request: TrainRequest, module: ModuleSpec) -> Split:
    """Find and split the pairs of a stage; log which are held out."""
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
        "stage %d mip %d: %d pairs to train on, %d unused next to held-out ones; "
        "held out: %s",
        *(module.stage, module.in_mip, len(split.training)),
        len(pairs) - len(split.training) - len(split.validation),
        "; ".join(ref.name for ref in split.validation) or "none",
    )
    return split


def _workers_for(device: torch.device) -> int:
    """Number of data-loading processes of a rank: one per core, at most 8."""
    if device.type == "cpu":
        return 0  # the cores compute the network
    cores = len(os.sched_getaffinity(0))  # a cluster may give us only a part of them
    return min(_MAX_WORKERS, max(1, cores // distributed.ranks_of_machine()))
