"""Train one stage: phase by phase, epoch by epoch, step by step."""

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from metroem.data.loader import PhaseSamples, make_loader
from metroem.data.sample import Sample
from metroem.data.sampling import ValidationPairs
from metroem.errors import CheckpointError, DatasetError
from metroem.io.files import (
    make_folder,
    remove_partial_files,
    replace_file,
    try_writing,
)
from metroem.models.weights import checkpoint_path, save_weights
from metroem.specs.modules import ModuleSpec
from metroem.specs.schedule import Phase
from metroem.training.checkpoint import (
    RunFolder,
    TrainingState,
    append_json_line,
    keep_json_lines,
    load_state,
    save_state,
)
from metroem.training.compile import compiler_failures_named
from metroem.training.config import (
    IMAGES,
    PAIRS,
    PRIORS,
    StageConfig,
    describe_differences,
)
from metroem.training.model import (
    load_aligner,
    load_labeller,
    unwrap_model,
    wrap_model,
)
from metroem.training.optimizer import (
    averaged_weights,
    copy_weights,
    make_optimizer,
    set_learning_rate,
)
from metroem.training.run_clock import RunClock
from metroem.training.step import StepMetrics, train_step
from metroem.training.targets import EarlierStages
from metroem.training.tensorboard import TensorBoardWriter
from metroem.training.validate import EpochReport, first_held_out, validate
from metroem.training.write_fields import seconds_of_pair
from metroem.utils import distributed
from metroem.utils.memory import enough_memory
from metroem.utils.progress import progress
from metroem.utils.stop_request import Stopped, StopRequest

logger = logging.getLogger(__name__)

# Steps between saves within an epoch; not minutes, since all ranks must save together.
SAVE_EVERY_STEPS = 200
# The run ends if more than this fraction of the last steps was bad.
BAD_STEPS_LOOKED_AT, BAD_STEPS_ALLOWED = 50, 0.2
# Below this mean change of the prior field a network does nothing, px.
COLLAPSED_PX = 0.01


def train_stage(
    config: StageConfig,
    stop: StopRequest,
    clock: RunClock,
    writer: TensorBoardWriter | None = None,
) -> None:
    """Train one module, or resume where an earlier call stopped.

    The best weights of the last phase, by validation loss, become the module's
    checkpoint. State and last weights are kept in the folder of the run.

    Args:
        config: module, phases, pairs and options.
        stop: checked at each step.
        clock: measures each step; with a budget it makes the phases shorter.
        writer: gets the epoch reports, on the first rank.

    Raises:
        Stopped: `stop` asked for it; the state is saved.
        UsageError: the budget is too small for this machine.
        StorageError: a folder cannot be written to.
        DatasetError: too many steps were bad.
        CheckpointError: this training cannot resume the state that exists.
        ResourceError: there is too little memory.
    """
    state = _load_state(config)
    if state is not None and state.phase >= len(config.phases):
        _log_already_trained(config, state, clock)
        clock.begin_stage(config.stage, state.phase, 0.0)
        return
    model, earlier, state = _start_or_resume(config, state)
    net = unwrap_model(model).net
    if state.position is None:
        state.position = _position(config, state)
    clock.begin_stage(config.stage, state.phase, state.position)

    for phase in config.phases[state.phase :]:
        optimizer, average = make_optimizer(net, phase, state)
        num_updates = config.num_updates(phase)
        in_all = num_updates * phase.num_epochs
        with (
            compiler_failures_named(),
            _memory_advice(config, phase, state),
            closing(_read_samples(config, phase, state)) as samples,
        ):
            for epoch in range(state.epoch, phase.num_epochs):
                if state.position >= in_all and state.step == 0:
                    break  # killed after the phase's last report
                started = time.monotonic()
                model.train()
                steps = range(state.step, num_updates)
                what = f"stage {config.stage}, epoch {epoch + 1}, steps"
                what = ", ".join(filter(None, (clock.left_in_words(), what)))
                num_pairs = 0
                for _ in progress(steps, what, total=len(steps), log=False):
                    if state.position >= in_all:
                        break  # the time of the phase is used up
                    set_learning_rate(optimizer, phase.rate(state.position, in_all))
                    batches = islice(samples, phase.accumulate)
                    result = train_step(
                        model,
                        optimizer,
                        (sample.to(config.device) for sample in batches),
                        phase,
                        earlier,
                        loss_seed=config.loss_seed(state),
                        stop=stop.code,
                    )
                    state.step += 1
                    if state.updates is not None:
                        state.updates += 1
                    state.position += clock.after_step(state.phase, state.position)
                    num_pairs += config.pairs_of_update(phase)
                    if result.applied:
                        state.add_metrics(result.metrics)
                        if average is not None:
                            average.update_parameters(net)
                    else:
                        _quarantine(config, state, result.bad_pairs)
                    window = [*state.recent_bad, int(not result.applied)]
                    state.recent_bad = window[-BAD_STEPS_LOOKED_AT:]
                    if sum(state.recent_bad) > BAD_STEPS_ALLOWED * BAD_STEPS_LOOKED_AT:
                        _refuse_bad_steps(config, state)
                    if result.stop:
                        _save(config, state, net, optimizer, average)
                        raise Stopped(result.stop)
                    if state.step % SAVE_EVERY_STEPS == 0:
                        _save(config, state, net, optimizer, average)

                if (state.phase, epoch) == (0, 0):
                    # A run that is killed before its first save begins again. It must
                    # begin from its first weights, which are replaced below.
                    _save(config, state, net, optimizer, average)
                is_last = state.position >= in_all
                reports = is_last or (epoch + 1) % phase.print_every == 0
                if reports:
                    took = EpochTime(time.monotonic() - started, num_pairs, is_last)
                    with averaged_weights(net, average):
                        _finish_epochs(
                            *(config, phase, state, model, earlier, took, clock, writer)
                        )
                state.epoch, state.step = epoch + 1, 0
                _save(config, state, net, optimizer, average)
                if reports:
                    clock.after_report()
                if is_last:
                    break

        _warn_without_score(config, state)
        if average is not None:
            copy_weights(net, list(average.module.parameters()))
        clock.end_phase(state.phase)
        state.phase, state.epoch, state.best = state.phase + 1, 0, None
        state.position = 0.0
        _save(config, state, net)  # without the optimizer: each phase has its own
        if clock.has_budget and config.fields and state.phase < len(config.phases):
            # The finetuner takes up to three times as long after untrained networks.
            clock.after_field(config.stage, seconds_of_pair(config.fields))


class EpochTime(NamedTuple):
    """What is known of an epoch when it ends."""

    seconds: float  # of its updates, since this command began or resumed it
    num_pairs: int  # trained on in these seconds
    is_last: bool  # of its phase


def _log_already_trained(
    config: StageConfig, state: TrainingState, clock: RunClock
) -> None:
    """Log that nothing is left to train; warn if a budget had shortened the schedule.

    With a budget the weights are what was asked for, without one they are not.
    """
    scheduled = sum(config.num_updates(p) * p.num_epochs for p in config.phases)
    if state.updates is None or state.updates >= scheduled:
        logger.info("stage %d: already trained", config.stage)
        return
    logger.log(
        logging.INFO if clock.has_budget else logging.WARNING,
        "stage %d: already trained, by %d of the schedule's %d updates, since "
        "--budget_minutes shortened it; for all of them begin again (--restart), or "
        "give another --checkpoint_name",
        *(config.stage, state.updates, scheduled),
    )


def _position(config: StageConfig, state: TrainingState) -> float:
    """Updates of the phase that an earlier version's state had made."""
    if state.phase >= len(config.phases):
        return 0.0
    num_updates = config.num_updates(config.phases[state.phase])
    return float(state.epoch * num_updates + state.step)


def _load_state(config: StageConfig) -> TrainingState | None:
    """Load the state that a training may resume, on all ranks; None if there is none.

    Raises:
        CheckpointError: it belongs to other settings, or its weights are gone.
    """
    if config.rank == 0:
        _remove_partial_files(config)
    path = config.run.state(config.stage)
    state = load_state(path)
    if state is not None:
        _check_fingerprint(config, state, path)
    position = (state.phase, state.epoch, state.step) if state else (-1, -1, -1)
    distributed.check_same(position, str(path))
    is_done = state is not None and state.phase >= len(config.phases)
    has_weights = is_done or (state is not None and state.best is not None)
    if has_weights and not config.best_weights.is_file():
        raise CheckpointError(
            f"{config.best_weights}: is gone, though stage {config.stage} was trained; "
            f"put it back (the last weights are "
            f"{config.run.weights(config.stage, 'last')}), or begin again with "
            "--restart"
        )
    return state


def _check_fingerprint(config: StageConfig, state: TrainingState, path: Path) -> None:
    """Refuse to resume a run that was started with other settings (CheckpointError)."""
    before, now = state.fingerprint, config.fingerprint()
    if differences := describe_differences(before, now):
        is_other_data = any(before.get(k) != now[k] for k in (PAIRS, IMAGES, PRIORS))
        hint = ". Fields of other data need no training: metroem write-fields"
        raise CheckpointError(
            f"{path}: this run was started with other settings: {differences}. "
            "Use the same settings to resume it, another --checkpoint_name for a "
            "second run, or --restart to begin it again (with --train_stages: only "
            f"that stage){hint if is_other_data else ''}"
        )


def _start_or_resume(
    config: StageConfig, state: TrainingState | None
) -> tuple[nn.Module, EarlierStages, TrainingState]:
    """Load the model and the earlier stages; make a state if there is none yet."""
    fields_path = None if config.fields is None else config.fields.fields_path
    try_folders(config.module, config.run, fields_path, config.rank)
    aligner = load_aligner(config, is_fresh=state is None)
    earlier = EarlierStages(
        *(config.module.in_mip, config.earlier, config.checkpoint_name, config.device),
        labeller=load_labeller(config, is_fresh=state is None),
    )
    if state is None:
        state = TrainingState(config.fingerprint(), net=aligner.net.state_dict())
    else:
        aligner.net.load_state_dict(state.net)
        if state.rng is not None:
            torch.set_rng_state(state.rng)
        if config.rank == 0:
            position = (config.stage, state.phase, state.epoch)
            keep_json_lines(config.run.metrics, position)
        logger.info(
            "stage %d: resumes at phase %d, epoch %d, step %d",
            *(config.stage, state.phase + 1, state.epoch + 1, state.step),
        )
    return wrap_model(aligner, config), earlier, state


def _read_samples(
    config: StageConfig, phase: Phase, state: TrainingState
) -> Generator[Sample, None, None]:
    """Read this rank's part of the batches of a phase, from the current step on."""
    samples = PhaseSamples(
        config.split.training,
        phase,
        config.epoch_seed(state),
        update_size=config.pairs_of_update(phase),
    )
    size, ranks = config.batch_of(phase), config.num_ranks
    return make_loader(
        samples,
        samples.batches(state.step, size, rank=config.rank, ranks=ranks),
        num_workers=config.num_workers,
        pin_memory=config.device.type == "cuda",
    )


@contextmanager
def _memory_advice(
    config: StageConfig, phase: Phase, state: TrainingState
) -> Iterator[None]:
    """Say what to lower if there is too little memory for a phase (ResourceError)."""
    with enough_memory(
        f"stage {config.stage}, phase {state.phase + 1}",
        "give --checkpoint_activations, with which this run resumes from its "
        "last save, or begin again (--restart) with a lower --batch_size (now "
        f"{config.batch_of(phase)}) or crop_size of the schedule (now "
        f"{phase.crop_size})",
    ):
        yield


def _quarantine(
    config: StageConfig, state: TrainingState, bad_pairs: Sequence[str]
) -> None:
    """Log and list the bad pairs of a step, of all ranks."""
    for name in distributed.all_gather_names(bad_pairs):
        logger.warning("bad loss, step skipped: %s", name)
        if name not in state.quarantine:
            state.quarantine.append(name)
            if config.rank == 0:
                position = {"stage": config.stage, "phase": state.phase}
                append_json_line(
                    config.run.quarantine,
                    {**position, "epoch": state.epoch, "pair": name},
                )


def _refuse_bad_steps(config: StageConfig, state: TrainingState) -> None:
    """End the run, since too many steps were bad (DatasetError)."""
    raise DatasetError(
        f"stage {config.stage}: {sum(state.recent_bad)} of the last "
        f"{len(state.recent_bad)} steps gave a loss that is not finite or too "
        f"large; the pairs are listed in {config.run.quarantine}. Try a lower lr, a "
        "lower smoothness, or check that the images are normalised (metroem inspect)"
    )


def _finish_epochs(
    config: StageConfig,
    phase: Phase,
    state: TrainingState,
    model: nn.Module,
    earlier: EarlierStages,
    took: EpochTime,
    clock: RunClock,
    writer: TensorBoardWriter | None,
) -> None:
    """Validate, report, and keep the weights if they are the best."""
    if all(state.recent_bad):
        _refuse_bad_steps(config, state)
    _average_sums(config, state)
    unknown = [float("nan")] * len(StepMetrics._fields)
    training = StepMetrics(*(state.mean_metrics() or unknown))
    state.sums = []
    held_out = ValidationPairs(config.split.validation, phase, config.seed)
    validation = validate(
        model,
        held_out,
        earlier,
        seed=config.seed,
        device=config.device,
        rank=config.rank,
        num_ranks=config.num_ranks,
    )
    # Without held-out pairs the last weights are kept.
    is_best = validation is None
    if validation is not None and validation.is_known:
        is_best = state.best is None or validation.loss < state.best
        state.best = validation.loss if is_best else state.best
    if config.rank > 0:
        return
    _log_epoch(config, phase, state, training, validation, took, clock)
    if writer is not None:
        earlier_epochs = sum(p.num_epochs for p in config.phases[: state.phase])
        pair = first_held_out(model, held_out, earlier, device=config.device)
        epochs = earlier_epochs + state.epoch + 1
        report = EpochReport(config.stage, epochs, training, validation, pair)
        writer.write(report)
    net = unwrap_model(model).net
    save_weights(net, config.run.weights(config.stage, "last"))
    if is_best:
        make_folder(config.best_weights.parent)
        save_weights(net, config.best_weights)


def _log_epoch(
    config: StageConfig,
    phase: Phase,
    state: TrainingState,
    training: StepMetrics,
    validation: StepMetrics | None,
    took: EpochTime,
    clock: RunClock,
) -> None:
    """Write a line of the log and one of the metrics file; warn of a collapse."""
    stage = config.stage
    left = clock.left_in_words()
    logger.info(
        "stage %d mip %d phase %d/%d epoch %d/%d: train %s%s, %.1f s, %.1f pairs/s%s",
        *(stage, config.module.in_mip, state.phase + 1, len(config.phases)),
        *(state.epoch + 1, phase.num_epochs, training.as_text()),
        f"; validation {validation.as_text()}" if validation else "",
        *(took.seconds, took.num_pairs / max(took.seconds, 1e-9)),
        f"; {left}" if left else "",
    )
    record: dict[str, Any] = {
        "stage": stage,
        "phase": state.phase,
        "epoch": state.epoch,
    }
    record["training"] = training.as_json()
    if validation is not None:
        record["validation"] = validation.as_json()
    append_json_line(config.run.metrics, {**record, "seconds": took.seconds})
    metrics = validation or training
    if took.is_last and metrics.change_px < COLLAPSED_PX:
        logger.warning(
            "stage %d: the network changes the field it is given by %.4f px only: "
            "it has collapsed to doing nothing; try a lower smoothness (now %g), "
            "a higher lr (now %g), or more epochs",
            *(stage, metrics.change_px, phase.smoothness, phase.lr),
        )
    if metrics.has_collapsed:
        logger.warning(
            "stage %d: the field leaves %.1f%% of what the pairs show to compare: "
            "the network has collapsed: its field is rough or points out of the "
            "images; try a lower lr (now %g) or more epochs",
            *(stage, 100 * metrics.covered, phase.lr),
        )
    if validation is not None and not validation.is_known:
        logger.warning("stage %d: no score, so not the best", stage)


def _warn_without_score(config: StageConfig, state: TrainingState) -> None:
    """Warn if no epoch of a phase has a score; keep the last weights if none exist."""
    if not config.split.validation or state.best is not None:
        return
    best = config.best_weights
    logger.warning(
        "stage %d, phase %d: no epoch has a score on the held-out pairs: the "
        "network has collapsed, or they show nothing that counts; begin again "
        "(--restart) with a lower lr, more epochs or other pairs. Kept are %s",
        *(config.stage, state.phase + 1),
        "the weights from before the phase" if best.is_file() else "the last weights",
    )
    if config.rank == 0 and not best.is_file():
        make_folder(best.parent)
        replace_file(best, config.run.weights(config.stage, "last").read_bytes())


def _average_sums(config: StageConfig, state: TrainingState) -> None:
    """Replace the sums of each rank by their mean over all ranks."""
    sums = torch.tensor(state.sums, dtype=torch.float64, device=config.device)
    state.sums = (distributed.all_reduce_sum(sums) / config.num_ranks).tolist()


def _save(
    config: StageConfig,
    state: TrainingState,
    net: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    average: AveragedModel | None = None,
) -> None:
    """Save the state; all ranks take part, the first one writes."""
    _average_sums(config, state)
    state.net = net.state_dict()
    state.optimizer = None if optimizer is None else optimizer.state_dict()
    state.average = None if average is None else average.state_dict()
    state.rng = torch.get_rng_state()
    if config.rank == 0:
        save_state(config.run.state(config.stage), state)


def try_folders(
    module: ModuleSpec, run: RunFolder, fields_path: Path | None, rank: int
) -> None:
    """Check, on the first rank, that the folders of a training can be written to.

    Args:
        module: is trained.
        run: folder of the state.
        fields_path: folder that its fields are written to; None if they are not.
        rank: of this process.

    Raises:
        StorageError: a folder cannot be written to.
    """
    if rank > 0:
        return
    try_writing(run.path)
    try_writing(module.weights_folder)
    if fields_path is not None:
        try_writing(fields_path, "--fields_path")


def _remove_partial_files(config: StageConfig) -> None:
    """Delete incomplete files that a killed run has left."""
    others = [config.run.weights(config.stage, which) for which in ("last", "initial")]
    state, metrics = config.run.state(config.stage), config.run.metrics
    for path in (state, metrics, config.best_weights, *others):
        remove_partial_files(path)


def discard_training(module: ModuleSpec, run: RunFolder, checkpoint_name: str) -> None:
    """Discard the training of a stage, so that the next one begins again (--restart).

    It starts from the checkpoint that the last training started from, or from fresh
    weights if there was none. The current weights of the module are kept in the folder
    of the run as "replaced".
    """
    if not run.state(module.stage).is_file():
        return
    current = checkpoint_path(module.weights_folder, checkpoint_name)
    initial = run.weights(module.stage, "initial")
    if current.is_file():
        content = current.read_bytes()
        replace_file(run.weights(module.stage, "replaced"), content)
        current.unlink()
    if initial.is_file():
        replace_file(current, initial.read_bytes())
    run.state(module.stage).unlink()
    keep_json_lines(run.metrics, (module.stage, 0, 0))
