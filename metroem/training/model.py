"""The model that a stage trains: its aligner, loaded, prepared and wrapped."""

import logging

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metroem.aligner import Aligner, Prediction
from metroem.data.sample import Sample
from metroem.io.replace import replace_file
from metroem.nets.checkpoint import checkpoint_path, load_weights
from metroem.nets.loading import load_module
from metroem.training import distributed
from metroem.training.activations import checkpoint_activations
from metroem.training.checkpoint import RunFolder
from metroem.training.compiling import compile_network
from metroem.training.job import StageJob, TrainingSettings
from metroem.training.recorded_passes import RecordedPasses

logger = logging.getLogger(__name__)


class TrainingModel(nn.Module):
    """An aligner as DDP wants it: one forward that gives all a loss needs."""

    def __init__(
        self, aligner: Aligner, precision: str, *, is_recorded: bool = False
    ) -> None:
        """Wrap it.

        Args:
            aligner: what is trained.
            precision: "fp32" or "bf16" inside the network.
            is_recorded: whether a GPU may repeat its passes by itself: see
                `RecordedPasses`.
        """
        super().__init__()
        self.net = aligner.net
        self.options = aligner.options
        self._predict = aligner.predict
        self._is_bf16 = precision == "bf16"
        self._passes = RecordedPasses(self._pass, self.net) if is_recorded else None

    def forward(self, sample: Sample, levels: tuple[int, ...]) -> Prediction:
        """Field and embeddings of a batch; bf16 inside the network if asked."""
        run = self._passes or self._pass
        return run(sample.src, sample.tgt, sample.prior_field, levels)

    def _pass(
        self, src: Tensor, tgt: Tensor, prior: Tensor | None, levels: tuple[int, ...]
    ) -> Prediction:
        with torch.autocast(src.device.type, torch.bfloat16, enabled=self._is_bf16):
            prediction = self._predict(src, tgt, prior, levels=levels)
        embeddings = {
            level: type(pair)(pair.src.float(), pair.tgt.float())
            for level, pair in prediction.embeddings.items()
        }
        return prediction._replace(
            field=prediction.field.float(), embeddings=embeddings
        )


def load_aligner(job: StageJob, run: RunFolder, *, is_fresh: bool) -> Aligner:
    """The aligner that a stage's training begins with.

    Args:
        job: names module and checkpoint.
        run: keeps a copy of the weights that a fresh training begins with.
        is_fresh: False where a state is about to be loaded.

    Raises:
        CheckpointError: weights that do not fit.
    """
    module, name = job.module, job.settings.checkpoint_name
    initial = checkpoint_path(module.weights_folder, name)
    if is_fresh and distributed.rank() == 0 and initial.is_file():
        content = initial.read_bytes()
        replace_file(run.weights(module.stage, "initial"), content)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.settings.seed + module.stage)
        loaded = load_module(
            module.path,
            checkpoint_name=name if initial.is_file() else None,
            finetune=False,
            pass_field=True,
        )
    aligner: Aligner = loaded.aligner.to(job.settings.device)  # type: ignore
    fits = getattr(aligner.net, "fits_any_stage", False)
    if is_fresh and fits and not initial.is_file():
        _take_weights_before(aligner, job)
    return aligner


def _take_weights_before(aligner: Aligner, job: StageJob) -> None:
    """Start a fresh network from the stage before, if that has the same one.

    Tissue looks alike at neighbouring mips: 100 steps then do what fresh
    weights need 450 for (FIB-SEM, mips 1 and 0, 2026-11).
    """
    for before in job.before[-1:]:
        weights = checkpoint_path(before.weights_folder, job.settings.checkpoint_name)
        if weights.is_file() and before.spec() == job.module.spec():
            load_weights(aligner.net, weights)
            logger.info(
                "stage %d: no weights yet; it starts from those of stage %d",
                *(job.module.stage, before.stage),
            )


def prepared_model(aligner: Aligner, settings: TrainingSettings) -> nn.Module:
    """A `TrainingModel` as it is called: by DDP where there are several ranks."""
    if settings.checkpoints_activations:
        checkpoint_activations(aligner.net)
    if settings.compiles:
        compile_network(aligner)
    model = TrainingModel(
        aligner,
        settings.precision,
        # Stock operators wait for the GPU; what is computed again suits batches that
        # keep it busy.
        is_recorded=aligner.operators == "corrected"
        and not settings.checkpoints_activations,
    )
    if distributed.world_size() == 1:
        return model
    is_cuda = settings.device.type == "cuda"
    return DistributedDataParallel(
        model,
        device_ids=[settings.device] if is_cuda else None,
        # Networks from elsewhere have layers that a plain loss does not reach.
        find_unused_parameters=True,
    )


def inner_model(model: nn.Module) -> TrainingModel:
    """The `TrainingModel` that a model is, or that DDP has around it."""
    return getattr(model, "module", model)  # type: ignore[return-value]
