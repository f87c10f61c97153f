"""Training of one stage: its phases, epochs and steps, from where it stood."""

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from metroem.aligner import Aligner
from metroem.data.epoch import EpochKey, ValidationPairs, num_steps
from metroem.data.loading import PhaseSamples, read_ahead
from metroem.data.sample import Sample
from metroem.errors import DatasetError
from metroem.io.replace import replace_file
from metroem.nets.checkpoint import checkpoint_path, load_weights, save_weights
from metroem.nets.loading import load_module
from metroem.progress import progress
from metroem.specs.pyramid import ModuleSpec
from metroem.specs.schedule import Phase
from metroem.training import distributed
from metroem.training.checkpoint import (
    RunFolder,
    TrainingState,
    append_json_line,
    keep_json_lines,
    load_state,
    save_state,
)
from metroem.training.job import StageJob
from metroem.training.objectives import levels_wanted, phase_loss, with_natural_field
from metroem.training.priors import StagesBefore
from metroem.training.step import (
    EpochReport,
    Scores,
    Step,
    TrainingModel,
    Watch,
    first_held_out,
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
    job: StageJob, run: RunFolder, stop: StopRequest, watch: Watch | None = None
) -> None:
    """Train one module, from where an earlier call stopped.

    The best weights of the last phase, by its validation loss, become the
    module's checkpoint; state and last weights are kept in the run's folder.

    Args:
        job: module, phases and pairs.
        run: folder of the state.
        stop: looked at before each step.
        watch: told, on the first rank, how the epochs went.

    Raises:
        Stopped: `stop` asked for it; the state is saved.
        DatasetError: too many steps went bad.
        CheckpointError: a state that this run cannot go on from.
    """
    state = load_state(run.state(job.module.stage), job.fingerprint())
    if state is not None and state.phase >= len(job.phases):
        logger.info("stage %d: trained already", job.module.stage)
        return
    StageTrainer(job, run, stop, state, watch).train()


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
        self.aligner = self._load_aligner(is_fresh=state is None)
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
        self.model = self._wrapped()
        self.optimizer: torch.optim.Optimizer | None = None

    def train(self) -> None:
        """Run the phases that are left, then mark the stage as done."""
        state, phases = self.state, self.job.phases
        while state.phase < len(phases):
            self._train_phase(phases[state.phase])
            state.phase, state.epoch, state.best = state.phase + 1, 0, None
            self.optimizer = None  # each phase begins with a new one
            self._save()

    def _train_phase(self, phase: Phase) -> None:
        self.optimizer = self._new_optimizer(phase)
        if self.state.optimizer is not None:
            self.optimizer.load_state_dict(self.state.optimizer)
        with closing(self._samples(phase)) as samples:
            while self.state.epoch < phase.num_epochs:
                started = time.monotonic()
                self._train_epoch(phase, samples)
                epoch = self.state.epoch + 1
                if epoch % phase.print_every == 0 or epoch == phase.num_epochs:
                    self._finish_epochs(phase, time.monotonic() - started)
                self.state.epoch, self.state.step = epoch, 0
                self._save()

    def _key(self) -> EpochKey:
        seed, stage = self.settings.seed, self.job.module.stage
        return EpochKey(seed, stage, self.state.phase, self.state.epoch)

    def _train_epoch(self, phase: Phase, samples: Iterator[Sample]) -> None:
        state, key = self.state, self._key()
        size = self.settings.batch_of(phase)
        left = num_steps(phase, len(self.job.split.training), size) - state.step
        self.model.train()
        for sample in progress(
            islice(samples, left),
            f"stage {self.job.module.stage}, epoch {state.epoch + 1}, steps",
            total=left,
            log=False,
        ):
            # Chance within a step is a function of its place, as its sample is.
            generator = key.generator(-1 - state.step)
            step = self._step(phase, sample.to(self.settings.device), generator)
            state.step += 1
            self._note(step, sample)

    def _step(self, phase: Phase, sample: Sample, generator: torch.Generator) -> Step:
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(phase)
        inner = getattr(self.model, "module", self.model)
        sample = with_natural_field(self.before.with_prior(sample), inner)
        return train_step(
            lambda: self.model(sample, levels_wanted(phase, self.aligner.options)),
            lambda prediction: phase_loss(
                phase, sample, prediction, generator, self.aligner.options
            ),
            self.optimizer,
            prior=sample.prior_field,
            stop=self.stop.code,
            max_grad_norm=phase.max_grad_norm,
        )

    def _rate(self, phase: Phase) -> float:
        """The learning rate of the step that comes next."""
        pairs, size = self.job.split.training, self.settings.batch_of(phase)
        steps = num_steps(phase, len(pairs), size)
        done = self.state.epoch * steps + self.state.step
        return phase.rate(done, phase.num_epochs * steps)

    def _samples(self, phase: Phase) -> Generator[Sample, None, None]:
        """This rank's share of the batches of a phase, from the current step on."""
        samples = PhaseSamples(
            self.job.split.training,
            phase,
            self._key(),
            batch_size=self.settings.batch_of(phase),
        )
        ranks = distributed.world_size()
        return read_ahead(
            samples,
            samples.batches(self.state.step, rank=distributed.rank(), ranks=ranks),
            num_workers=self.settings.num_workers,
            pin_memory=self.settings.device.type == "cuda",
        )

    def _note(self, step: Step, sample: Sample) -> None:
        """Count a step; end the run when it should."""
        state = self.state
        if step.taken:
            values = [*step.scores.tolist(), 1.0]
            sums = state.sums or [0.0] * len(values)
            state.sums = [a + b for a, b in zip(sums, values, strict=True)]
        else:
            self._quarantine(sample if step.suspect else None)
        window = [*state.recent_bad, int(not step.taken)]
        state.recent_bad = window[-BAD_STEPS_LOOKED_AT:]
        if sum(state.recent_bad) > BAD_STEPS_ALLOWED * BAD_STEPS_LOOKED_AT:
            self._refuse_bad_steps()
        if step.stop:
            self._save()
            raise Stopped(step.stop)
        if state.step % SAVE_EVERY_STEPS == 0:
            self._save()

    def _quarantine(self, sample: Sample | None) -> None:
        """List the pairs of a bad step, those of all ranks."""
        names = distributed.gather_names(sample.pair if sample else ())
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
        *sums, count = state.sums or [float("nan")] * (len(Scores._fields) + 1)
        training = Scores(*(value / count for value in sums))
        state.sums = []
        seed, device = self.settings.seed, self.settings.device
        held_out = ValidationPairs(self.job.split.validation, phase, seed)
        validation = validate(
            self.model, held_out, self.before, seed=seed, device=device
        )
        # Without held-out pairs the last weights are the ones to keep.
        is_best = validation is None or state.best is None
        if validation is not None and (is_best or validation.loss < (state.best or 0)):
            state.best, is_best = validation.loss, True
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
            best.parent.mkdir(exist_ok=True)
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
        is_last = state.epoch + 1 == phase.num_epochs
        if is_last and (validation or training).change_px < COLLAPSED_PX:
            logger.warning(
                "stage %d: the network changes the field it is given by %.4f px only: "
                "it has collapsed to doing nothing; try a lower smoothness (now %g), "
                "a higher lr (now %g), or more epochs",
                *(module.stage, (validation or training).change_px),
                *(phase.smoothness, phase.lr),
            )

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
        self.state.optimizer = self.optimizer and self.optimizer.state_dict()
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

    def _load_aligner(self, *, is_fresh: bool) -> Aligner:
        module, name = self.job.module, self.settings.checkpoint_name
        initial = checkpoint_path(module.weights_folder, name)
        if is_fresh and self.is_first_rank and initial.is_file():
            content = initial.read_bytes()
            replace_file(self.run.weights(module.stage, "initial"), content)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed + module.stage)
            loaded = load_module(
                module.path, checkpoint_name=name, finetune=False, pass_field=True
            )
        aligner: Aligner = loaded.aligner.to(self.settings.device)  # type: ignore
        fits = getattr(aligner.net, "fits_any_stage", False)
        if is_fresh and fits and not initial.is_file():
            self._take_weights_before(aligner)
        return aligner

    def _take_weights_before(self, aligner: Aligner) -> None:
        """Start a fresh network from the stage before, if that has the same one.

        Tissue looks alike at neighbouring mips: 100 steps then do what fresh
        weights need 450 for (FIB-SEM, mips 1 and 0, 2026-11).
        """
        module = self.job.module
        for before in self.job.before[-1:]:
            weights = checkpoint_path(
                before.weights_folder, self.settings.checkpoint_name
            )
            if weights.is_file() and before.spec() == module.spec():
                load_weights(aligner.net, weights)
                logger.info(
                    "stage %d: no weights yet; it starts from those of stage %d",
                    *(module.stage, before.stage),
                )

    def _wrapped(self) -> nn.Module:
        """The model as it is called: by DDP where there are several ranks."""
        model = TrainingModel(self.aligner, self.settings.precision)
        if distributed.world_size() == 1:
            return model
        is_cuda = self.settings.device.type == "cuda"
        return DistributedDataParallel(
            model,
            device_ids=[self.settings.device] if is_cuda else None,
            # Networks from elsewhere have layers that a plain loss does not reach.
            find_unused_parameters=True,
        )

    def _new_optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.aligner.net.parameters(), lr=phase.lr)
