"""Load the aligner that a stage trains, prepare it, and wrap it for DDP."""

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from metroem.aligner import Aligner
from metroem.data.sample import Sample
from metroem.io.files import replace_file
from metroem.models.load import load_module
from metroem.models.types import Prediction
from metroem.models.weights import checkpoint_path, load_weights
from metroem.training.buffers import buffers_kept
from metroem.training.compile import compile_network
from metroem.training.config import StageConfig
from metroem.training.cuda_graph_model import CudaGraphModel

logger = logging.getLogger(__name__)


class TrainingModel(nn.Module):
    """Wraps an aligner for DDP: one forward method returns all that a loss needs."""

    def __init__(
        self, aligner: Aligner, precision: str, *, is_recorded: bool = False
    ) -> None:
        """Wrap an aligner.

        Args:
            aligner: is trained.
            precision: "fp32" or "bf16" inside the network.
            is_recorded: whether its passes are recorded as CUDA graphs, see
                `CudaGraphModel`.
        """
        super().__init__()
        self.net = aligner.net
        self.options = aligner.options
        self._predict = aligner.predict
        self._is_bf16 = precision == "bf16"
        self._passes = CudaGraphModel(self._pass, self.net) if is_recorded else None

    def forward(self, sample: Sample, levels: tuple[int, ...]) -> Prediction:
        """Predict field and embeddings of a batch, float32 at any precision."""
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


def load_aligner(config: StageConfig, *, is_fresh: bool) -> Aligner:
    """Load the aligner that the training of a stage starts from.

    Fresh training keeps a copy of the weights that it starts from.

    Args:
        config: names module and checkpoint.
        is_fresh: False if a state is loaded afterwards.

    Raises:
        CheckpointError: weights do not fit the network.
    """
    initial = config.best_weights
    if is_fresh and config.rank == 0 and initial.is_file():
        kept = config.run.weights(config.stage, "initial")
        replace_file(kept, initial.read_bytes())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + config.stage)
        loaded = load_module(
            config.module.path,
            checkpoint_name=config.checkpoint_name if initial.is_file() else None,
            finetune=False,
            pass_field=True,
        )
    aligner: Aligner = loaded.aligner.to(config.device)  # type: ignore
    fits = getattr(aligner.net, "fits_any_stage", False)
    if is_fresh and fits and not initial.is_file():
        _load_previous_weights(aligner, config)
    return aligner


def load_labeller(config: StageConfig, *, is_fresh: bool) -> TrainingModel | None:
    """Load the network as it was when its training began; it makes pseudo-labels.

    A network that makes its own labels drifts: 10 minutes on serial sections led a
    pretrained one so far astray that neighbours were worse than not aligned (nerve
    cord, 4.6 nm, 2026-11).

    Args:
        config: names module and checkpoint.
        is_fresh: False if the training resumes.

    Returns:
        The network, or None if the trained one makes its own labels, or needs none.

    Raises:
        CheckpointError: its weights are gone, or do not fit.
    """
    warps = [phase.known_warp for phase in config.phases]
    if not config.keeps_labels or all(w is None or w.aligned for w in warps):
        return None
    kept = config.run.weights(config.stage, "initial")
    with torch.random.fork_rng(devices=[]):
        loaded = load_module(
            config.module.path, checkpoint_name=None, finetune=False, pass_field=True
        )
    aligner: Aligner = loaded.aligner  # type: ignore
    load_weights(aligner.net, config.best_weights if is_fresh else kept)
    return TrainingModel(aligner.to(config.device), config.precision).eval()


def _load_previous_weights(aligner: Aligner, config: StageConfig) -> None:
    """Start a fresh network from the previous stage's weights, if its spec is equal.

    Tissue looks alike at neighbouring mips: 100 steps from these weights do as much as
    450 steps from fresh weights (FIB-SEM, mips 1 and 0, 2026-11).
    """
    for previous in config.earlier[-1:]:
        weights = checkpoint_path(previous.weights_folder, config.checkpoint_name)
        if weights.is_file() and previous.spec() == config.module.spec():
            load_weights(aligner.net, weights)
            logger.info(
                "stage %d: no weights yet; it starts from the weights of stage %d",
                *(config.stage, previous.stage),
            )


def wrap_model(aligner: Aligner, config: StageConfig) -> nn.Module:
    """Wrap an aligner in a `TrainingModel`, and in DDP if there are several ranks."""
    if config.checkpoints_activations:
        checkpoint_activations(aligner.net)
    if config.compiles:
        compile_network(aligner)
    model = TrainingModel(
        aligner,
        config.precision,
        # Stock operators wait for the GPU, so they cannot be recorded. Activations are
        # computed twice for large batches, which keep a GPU busy without recording.
        is_recorded=aligner.operators == "corrected"
        and not config.checkpoints_activations,
    )
    if config.num_ranks == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[config.device] if config.device.type == "cuda" else None,
        # Networks of other programs have layers that a plain loss does not reach.
        find_unused_parameters=True,
    )


def unwrap_model(model: nn.Module) -> TrainingModel:
    """Return the `TrainingModel` itself, without DDP around it."""
    return getattr(model, "module", model)  # type: ignore[return-value]


def checkpoint_activations(net: nn.Module) -> None:
    """Make each block of a network keep its inputs, but not its activations.

    The backward pass computes the activations a second time, one block after the
    other. Blocks are the encoder of each level and each of its steps. Values,
    gradients and the names of weights stay the same.

    Args:
        net: with `level_upmodules` and `level_downmodules`.
    """
    for block in _blocks(net):
        block.forward = _checkpointed(block)  # type: ignore[method-assign]


def _blocks(net: nn.Module) -> Iterator[nn.Module]:
    for part in (net.level_upmodules, net.level_downmodules):
        assert isinstance(part, nn.ModuleDict)
        for block in part.values():
            if isinstance(block, nn.ModuleList):
                yield from block
            else:
                yield block


def _checkpointed(block: nn.Module) -> Callable[..., Any]:
    """A block's forward method whose activations are computed again for backward."""
    forward = block.forward
    has_buffers = any(True for _ in block.buffers())

    def checkpointed(*inputs: Any) -> Any:
        options = {}
        # The second forward pass must not change buffers. A compiled block changes
        # them only once anyway, and takes no contexts.
        if has_buffers and not torch.compiler.is_compiling():
            options["context_fn"] = lambda: (nullcontext(), buffers_kept(block))
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    return checkpointed
