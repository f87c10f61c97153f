"""Training of one stage: its phases, epochs and steps, from where it stood."""

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from itertools import compress, islice
from pathlib import Path

import torch
from torch import Tensor

from metroem.data.epoch import EpochKey, ValidationPairs, num_steps
from metroem.data.loading import PhaseSamples, read_ahead
from metroem.data.sample import Sample
from metroem.errors import CheckpointError, DatasetError
from metroem.io.replace import drop_partials, make_folder, replace_file, try_writing
from metroem.loss import LossTerms
from metroem.nets.checkpoint import checkpoint_path, save_weights
from metroem.progress import progress
from metroem.specs.pyramid import ModuleSpec
from metroem.specs.schedule import Phase
from metroem.training import distributed
from metroem.training.buffers import evaluating, keep_buffers, restore_buffers
from metroem.training.checkpoint import (
    RunFolder,
    TrainingState,
    append_json_line,
    keep_json_lines,
    load_state,
    save_state,
)
from metroem.training.compiling import compiler_failures_named
from metroem.training.job import StageJob
from metroem.training.memory import enough_memory
from metroem.training.model import inner_model, load_aligner, prepared_model
from metroem.training.natural import with_natural_field
from metroem.training.objectives import covered, levels_wanted, phase_loss
from metroem.training.optimising import PhaseOptimizer
from metroem.training.priors import StagesBefore
from metroem.training.step import (
    EpochReport,
    Scores,
    Step,
    Watch,
    first_held_out,
    scores_of,
    train_step,
    validate,
)
from metroem.training.stopping import Stopped, StopRequest

logger = logging.getLogger(__name__)

# Steps between saves within an epoch; steps, since all ranks must agree on it.
SAVE_EVERY_STEPS = 200
# The run ends when more than this share of the last steps went bad.
BAD_STEPS_LOOKED_AT, BAD_STEPS_ALLOWED = 50, 0.2
# Below this mean change of the prior field a network does nothing, px.
COLLAPSED_PX = 0.01


def train_stage(
    job: StageJob,
    run: RunFolder,
    stop: StopRequest,
    watch: Watch | None = None,
    fields_path: Path | None = None,
) -> None:
    """Train one module, from where an earlier call stopped.

    The best weights of the last phase, by its validation loss, become the
    module's checkpoint; state and last weights are kept in the run's folder.

    Args:
        job: module, phases and pairs.
        run: folder of the state.
        stop: looked at before each step.
        watch: told, on the first rank, how the epochs went.
        fields_path: where fields are written after it, tried before; None: none are.

    Raises:
        Stopped: `stop` asked for it; the state is saved.
        StorageError: a folder may not be written to.
        DatasetError: too many steps went bad.
        CheckpointError: a state that this run cannot go on from.
        ResourceError: memory does not suffice.
    """
    if distributed.rank() == 0:
        _drop_partials(job, run)
    state = load_state(run.state(job.module.stage), job.fingerprint())
    best = checkpoint_path(job.module.weights_folder, job.settings.checkpoint_name)
    has_weights = state and (state.phase >= len(job.phases) or state.best is not None)
    if has_weights and not best.is_file():
        raise CheckpointError(
            f"{best}: is gone, though stage {job.module.stage} was trained; put it "
            f"back (the last weights are {run.weights(job.module.stage, 'last')}), or "
            "begin anew with --restart"
        )
    if state is not None and state.phase >= len(job.phases):
        logger.info("stage %d: trained already", job.module.stage)
        return
    try_folders(job.module, run, fields_path)
    StageTrainer(job, run, stop, state, watch).train()


def try_folders(module: ModuleSpec, run: RunFolder, fields_path: Path | None) -> None:
    """Make sure that what a training writes can be written; arguments as above.

    Raises:
        StorageError: a folder takes no files.
    """
    if distributed.rank() > 0:
        return
    try_writing(run.path)
    try_writing(module.weights_folder)
    if fields_path is not None:
        try_writing(fields_path, "--fields_path")


def _drop_partials(job: StageJob, run: RunFolder) -> None:
    """Delete what a run that was killed had half written."""
    stage, name = job.module.stage, job.settings.checkpoint_name
    kept = [run.weights(stage, which) for which in ("last", "initial")]
    best = checkpoint_path(job.module.weights_folder, name)
    for path in (run.state(stage), run.metrics, best, *kept):
        drop_partials(path)


def discard_training(module: ModuleSpec, run: RunFolder, checkpoint_name: str) -> None:
    """Make the next training of a stage begin anew (--restart).

    It begins from the checkpoint that the training before began from, or from
    fresh weights if there was none. What the module has now is kept in the
    run's folder as "replaced".
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


class StageTrainer:
    """The training of one stage in one process (one rank)."""

    def __init__(
        self,
        job: StageJob,
        run: RunFolder,
        stop: StopRequest,
        state: TrainingState | None,
        watch: Watch | None = None,
    ) -> None:
        self.job, self.run, self.stop, self.watch = job, run, stop, watch
        self.settings = job.settings
        self.is_first_rank = distributed.rank() == 0
        self.aligner = load_aligner(job, run, is_fresh=state is None)
        self.before = StagesBefore(
            job.module.in_mip,
            job.before,
            job.settings.checkpoint_name,
            job.settings.device,
        )
        self.state = state or TrainingState(job.fingerprint())
        if state is None:
            self.state.net = self.aligner.net.state_dict()
        else:
            self._restore(state)
        self.model = prepared_model(self.aligner, self.settings)
        self.optimizer: PhaseOptimizer | None = None

    def train(self) -> None:
        """Run the phases that are left, then mark the stage as done."""
        state, phases = self.state, self.job.phases
        while state.phase < len(phases):
            self._train_phase(phases[state.phase])
            state.phase, state.epoch, state.best = state.phase + 1, 0, None
            self.optimizer = None  # each phase begins with a new one
            self._save()

    def _train_phase(self, phase: Phase) -> None:
        state, num_updates = self.state, self._updates_of_epoch(phase)
        self.optimizer = PhaseOptimizer(
            self.aligner.net, phase, phase.num_epochs * num_updates, state
        )
        with (
            compiler_failures_named(),
            self._enough_memory(phase),
            closing(self._samples(phase)) as samples,
        ):
            while state.epoch < phase.num_epochs:
                started = time.monotonic()
                self._train_epoch(self.optimizer, samples)
                epoch = state.epoch + 1
                if (state.phase, epoch) == (0, 1):
                    # A run that is killed without a state begins anew: from the
                    # weights it began from, not from the best that replace them now.
                    self._save()
                if epoch % phase.print_every == 0 or epoch == phase.num_epochs:
                    with self.optimizer.best_weights():
                        self._finish_epochs(phase, time.monotonic() - started)
                state.epoch, state.step = epoch, 0
                self._save()
        self._warn_without_score()
        self.optimizer.finish()

    def _warn_without_score(self) -> None:
        """Say that a phase has no weights to keep; keep the last if there are none."""
        if not self.job.split.validation or self.state.best is not None:
            return
        stage, name = self.job.module.stage, self.settings.checkpoint_name
        best = checkpoint_path(self.job.module.weights_folder, name)
        logger.warning(
            "stage %d, phase %d: no epoch has a score on the held-out pairs: the "
            "network has collapsed, or they show nothing that counts; begin anew "
            "(--restart) with a lower lr, more epochs or other pairs. Kept are %s",
            *(stage, self.state.phase + 1),
            "the weights from before the phase"
            if best.is_file()
            else "the last weights",
        )
        if self.is_first_rank and not best.is_file():
            make_folder(best.parent)
            replace_file(best, self.run.weights(stage, "last").read_bytes())

    def _enough_memory(self, phase: Phase) -> AbstractContextManager[None]:
        stage, size = self.job.module.stage, self.settings.batch_of(phase)
        return enough_memory(
            f"stage {stage}, phase {self.state.phase + 1}",
            "give --checkpoint_activations, with which this run goes on from its "
            f"last save, or begin anew (--restart) with a lower --batch_size (now "
            f"{size}) or crop_size of the schedule (now {phase.crop_size})",
        )

    def _updates_of_epoch(self, phase: Phase) -> int:
        pairs = self.job.split.training
        return num_steps(phase, len(pairs), self.settings.pairs_of_update(phase))

    def _key(self) -> EpochKey:
        seed, stage = self.settings.seed, self.job.module.stage
        return EpochKey(seed, stage, self.state.phase, self.state.epoch)

    def _train_epoch(
        self, optimizer: PhaseOptimizer, samples: Iterator[Sample]
    ) -> None:
        state, key = self.state, self._key()
        updates = self._updates_of_epoch(optimizer.phase)
        self.model.train()
        for _ in progress(
            range(state.step, updates),
            f"stage {self.job.module.stage}, epoch {state.epoch + 1}, steps",
            total=updates - state.step,
            log=False,
        ):
            optimizer.set_rate(state.epoch * updates + state.step)
            step, suspects = self._step(optimizer, samples, key)
            state.step += 1
            self._note(step, suspects)

    def _step(
        self, optimizer: PhaseOptimizer, samples: Iterator[Sample], key: EpochKey
    ) -> tuple[Step, list[str]]:
        """One update, and the names of the pairs that may be why it was skipped."""
        phase, inner = optimizer.phase, inner_model(self.model)
        levels = levels_wanted(phase, inner.options)
        pairs = []

        def loss_of(sample: Sample) -> tuple[LossTerms, Tensor]:
            pairs.append(sample.pair)
            sample = self.before.with_prior(sample.to(self.settings.device))
            with evaluating(inner):
                sample = with_natural_field(sample, inner, phase.known_warp)
            prediction = self.model(sample, levels)
            # Chance within a step is a function of its place, as its samples are.
            chance = key.generator(-1 - self.state.step)
            terms = phase_loss(phase, sample, prediction, chance, inner.options)
            share = covered(sample, prediction.field.detach())
            scores = scores_of(prediction, terms, sample.prior_field, share)
            return terms, scores

        kept = keep_buffers(self.aligner.net)
        step = train_step(
            (partial(loss_of, sample) for sample in islice(samples, phase.accumulate)),
            optimizer.adam,
            num_batches=phase.accumulate,
            stop=self.stop.code,
            max_grad_norm=phase.max_grad_norm,
            unsynced=getattr(self.model, "no_sync", nullcontext),
        )
        if step.taken:
            optimizer.note_update()
        else:
            restore_buffers(kept)
        suspects = compress(pairs, step.suspects)
        return step, [name for pair in suspects for name in pair]

    def _samples(self, phase: Phase) -> Generator[Sample, None, None]:
        """This rank's share of the batches of a phase, from the current step on."""
        samples = PhaseSamples(
            self.job.split.training,
            phase,
            self._key(),
            update_size=self.settings.pairs_of_update(phase),
        )
        size, ranks = self.settings.batch_of(phase), distributed.world_size()
        return read_ahead(
            samples,
            samples.batches(
                self.state.step, size, rank=distributed.rank(), ranks=ranks
            ),
            num_workers=self.settings.num_workers,
            pin_memory=self.settings.device.type == "cuda",
        )

    def _note(self, step: Step, suspects: Sequence[str]) -> None:
        """Count a step; end the run when it should."""
        state = self.state
        if step.taken:
            # What is not known of a step is left out of the means.
            known = ~step.scores.isnan()
            values = [*torch.where(known, step.scores, 0.0).tolist(), *known.tolist()]
            sums = state.sums or [0.0] * len(values)
            state.sums = [a + b for a, b in zip(sums, values, strict=True)]
        else:
            self._quarantine(suspects)
        window = [*state.recent_bad, int(not step.taken)]
        state.recent_bad = window[-BAD_STEPS_LOOKED_AT:]
        if sum(state.recent_bad) > BAD_STEPS_ALLOWED * BAD_STEPS_LOOKED_AT:
            self._refuse_bad_steps()
        if step.stop:
            self._save()
            raise Stopped(step.stop)
        if state.step % SAVE_EVERY_STEPS == 0:
            self._save()

    def _quarantine(self, suspects: Sequence[str]) -> None:
        """List the pairs of a bad step, those of all ranks."""
        names = distributed.gather_names(suspects)
        place = {"stage": self.job.module.stage, "phase": self.state.phase}
        for name in names:
            logger.warning("bad loss, step skipped: %s", name)
            if name not in self.state.quarantine:
                self.state.quarantine.append(name)
                if self.is_first_rank:
                    append_json_line(
                        self.run.quarantine,
                        {**place, "epoch": self.state.epoch, "pair": name},
                    )

    def _refuse_bad_steps(self) -> None:
        raise DatasetError(
            f"stage {self.job.module.stage}: {sum(self.state.recent_bad)} of the last "
            f"{len(self.state.recent_bad)} steps gave a loss that is not finite or too "
            f"large; the pairs are listed in {self.run.quarantine}. Try a lower lr, a "
            "lower smoothness, or check that the images are normalised (python -m "
            "metroem inspect)"
        )

    def _finish_epochs(self, phase: Phase, seconds: float) -> None:
        """Validate, report, and keep the weights if they are the best."""
        state, module = self.state, self.job.module
        if all(state.recent_bad):
            self._refuse_bad_steps()
        self._share_sums()
        training = Scores(*_means(state.sums))
        state.sums = []
        seed, device = self.settings.seed, self.settings.device
        held_out = ValidationPairs(self.job.split.validation, phase, seed)
        validation = validate(
            self.model, held_out, self.before, seed=seed, device=device
        )
        # Without held-out pairs the last weights are the ones to keep.
        is_best = validation is None
        if validation is not None and validation.is_known:
            is_best = state.best is None or validation.loss < state.best
            state.best = validation.loss if is_best else state.best
        if not self.is_first_rank:
            return
        self._report(phase, seconds, training, validation)
        if self.watch is not None:
            done = sum(p.num_epochs for p in self.job.phases[: state.phase])
            pair = first_held_out(self.model, held_out, self.before, device=device)
            epochs = done + state.epoch + 1
            self.watch(EpochReport(module.stage, epochs, training, validation, pair))
        save_weights(self.aligner.net, self.run.weights(module.stage, "last"))
        if is_best:
            best = checkpoint_path(module.weights_folder, self.settings.checkpoint_name)
            make_folder(best.parent)
            save_weights(self.aligner.net, best)

    def _report(
        self, phase: Phase, seconds: float, training: Scores, validation: Scores | None
    ) -> None:
        """One line in the log, one object in the metrics file."""
        state, module = self.state, self.job.module
        num_pairs = phase.num_samples or len(self.job.split.training)
        logger.info(
            "stage %d mip %d phase %d/%d epoch %d/%d: train %s%s, %.1f s, %.1f pairs/s",
            *(module.stage, module.in_mip, state.phase + 1, len(self.job.phases)),
            *(state.epoch + 1, phase.num_epochs, training.as_text()),
            f"; validation {validation.as_text()}" if validation else "",
            *(seconds, num_pairs / max(seconds, 1e-9)),
        )
        place = {"stage": module.stage, "phase": state.phase, "epoch": state.epoch}
        scores = {"training": training.as_json()}
        if validation is not None:
            scores["validation"] = validation.as_json()
        append_json_line(self.run.metrics, {**place, **scores, "seconds": seconds})
        is_last, scores = state.epoch + 1 == phase.num_epochs, validation or training
        if is_last and scores.change_px < COLLAPSED_PX:
            logger.warning(
                "stage %d: the network changes the field it is given by %.4f px only: "
                "it has collapsed to doing nothing; try a lower smoothness (now %g), "
                "a higher lr (now %g), or more epochs",
                *(module.stage, scores.change_px, phase.smoothness, phase.lr),
            )
        if scores.has_collapsed:
            logger.warning(
                "stage %d: the field leaves %.1f%% of what the pairs show to compare: "
                "the network has collapsed: its field is rough or points out of the "
                "images; try a lower lr (now %g) or more epochs",
                *(module.stage, 100 * scores.covered, phase.lr),
            )
        if validation is not None and not validation.is_known:
            logger.warning("stage %d: no score, so not the best", module.stage)

    def _share_sums(self) -> None:
        """Give each rank the mean of all ranks' running sums."""
        sums = torch.tensor(
            self.state.sums, dtype=torch.float64, device=self.settings.device
        )
        shared = distributed.total(sums) / distributed.world_size()
        self.state.sums = shared.tolist()

    def _save(self) -> None:
        self._share_sums()
        self.state.net = self.aligner.net.state_dict()
        self.state.optimizer = self.state.averages = None
        if self.optimizer is not None:
            self.optimizer.note_state(self.state)
        self.state.rng = torch.get_rng_state()
        if self.is_first_rank:
            save_state(self.run.state(self.job.module.stage), self.state)

    def _restore(self, state: TrainingState) -> None:
        place = (self.job.module.stage, state.phase, state.epoch)
        self.aligner.net.load_state_dict(state.net)
        if state.rng is not None:
            torch.set_rng_state(state.rng)
        if self.is_first_rank:
            keep_json_lines(self.run.metrics, place)
        logger.info(
            "stage %d: going on at phase %d, epoch %d, step %d",
            *(place[0], place[1] + 1, place[2] + 1, state.step),
        )


def _means(sums: Sequence[float]) -> list[float]:
    """Means of running sums, which each score's number of steps follows."""
    if not sums:
        return [float("nan")] * len(Scores._fields)
    half = len(sums) // 2
    return [
        value / count if count else float("nan")
        for value, count in zip(sums[:half], sums[half:], strict=True)
    ]
