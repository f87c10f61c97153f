"""Record the passes of a network as CUDA graphs, and replay them.

A pass consists of some thousand small operations. The CPU takes longer to start them
one by one than the GPU takes to compute them. Forward and backward pass of
`correlation` with 4 pairs of 256 px on an H100 take 56 ms, and 13 ms recorded, with
the same fields (2026-11).

Source: torch.cuda.make_graphed_callables works in the same way, but cannot be used.
While it records, nothing else in the process may use the GPU, but threads that pin
samples do. The next pass also writes over the gradients that it returns.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metroem.errors import ResourceError, first_line
from metroem.models.types import Prediction
from metroem.training.buffers import buffers_kept
from metroem.utils.cuda_graphs import recording

Predict = Callable[[Tensor, Tensor, Tensor | None, tuple[int, ...]], Prediction]

# Passes of a kind that run before it is recorded: the first ones compile and allocate.
_NUM_WARMUP_PASSES = 3
# Larger batches keep a GPU busy without recording, and a recorded pass keeps its
# activations in GPU memory between steps.
_MAX_PX = 2**22


class CudaGraphModel:
    """Runs the passes of a network, and records each kind of pass that is repeated.

    Kinds differ in shapes, levels, training mode, and in whether gradients are wanted.
    Passes are not recorded on a CPU, for large batches, or if an input needs a
    gradient. The backward pass of a recorded pass must come before the next pass.
    """

    def __init__(self, predict: Predict, net: nn.Module) -> None:
        """Start without recorded passes.

        Args:
            predict: turns src, tgt, prior and levels into a prediction. It depends on
                its arguments and the weights only, and never waits for the GPU.
            net: has the weights, which must stay where they are in memory.
        """
        self._predict, self._net = predict, net
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}
        self._passes: _Passes | None = None

    def __call__(
        self, src: Tensor, tgt: Tensor, prior: Tensor | None, levels: tuple[int, ...]
    ) -> Prediction:
        """Predict; the tensors of the result are copies that the caller may keep.

        Raises:
            ResourceError: the network has operations that cannot be recorded.
        """
        inputs = [src, tgt] if prior is None else [src, tgt, prior]
        if not _is_worth_recording(inputs):
            return self._predict(src, tgt, prior, levels)
        shapes = tuple(x.shape for x in inputs)
        kind = shapes, levels, torch.is_grad_enabled(), self._net.training
        if kind not in self._recorded:
            self._seen[kind] += 1
            if self._seen[kind] <= _NUM_WARMUP_PASSES:
                return self._predict(src, tgt, prior, levels)
            self._recorded[kind] = self._record(inputs, levels)
        return self._recorded[kind](inputs)

    def _record(self, inputs: Sequence[Tensor], levels: tuple[int, ...]) -> "_Recorded":
        if self._passes is None:
            self._passes = _Passes(inputs[0].device)

        def predict(
            src: Tensor, tgt: Tensor, prior: Tensor | None = None
        ) -> Prediction:
            return self._predict(src, tgt, prior, levels)

        try:
            return _Recorded(predict, self._net, inputs, self._passes)
        except RuntimeError as error:
            if "captur" not in str(error):  # CUDA says "capture" for recording
                raise
            raise ResourceError(
                "the GPU could not record the passes of this network "
                f"({first_line(error)}); the same command with "
                "--checkpoint_activations runs them without recording, and resumes "
                "from the last save"
            ) from error


class _Passes:
    """Stream and memory that the recorded passes of one network share.

    Since they share memory, each pass writes over the activations of the pass before,
    of any kind.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.memory = torch.cuda.graph_pool_handle()
        self.count = 0  # passes replayed so far

    def recording(self, graph: torch.cuda.CUDAGraph) -> AbstractContextManager[None]:
        """Record a graph in the block, with this stream and memory."""
        return recording(graph, self.stream, self.memory)


class _Recorded:
    """A recorded forward and backward pass of one kind."""

    def __init__(
        self,
        predict: Callable[..., Prediction],
        net: nn.Module,
        inputs: Sequence[Tensor],
        passes: _Passes,
    ) -> None:
        self.passes = passes
        self.inputs = [x.clone() for x in inputs]
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Use aliases, i.e. other parameters in the same memory. autograd may have tied
        # the gradients of the weights to the stream of an earlier pass. That stream
        # cannot be recorded together with this one.
        weights = [p for p in net.parameters() if p.requires_grad]
        aliases = [nn.Parameter(p.detach()) for p in weights]
        with _replaced(net, dict(zip(weights, aliases, strict=True))):
            # A compiled network may have to compile for the aliases first. No update
            # uses this pass, so buffers and random states are restored.
            with buffers_kept(net), torch.random.fork_rng(_gpus(inputs)):
                predict(*self.inputs)
            with passes.recording(self.forward):
                prediction = predict(*self.inputs)
        outputs = _tensors(prediction)
        self.has_gradient = [x.requires_grad for x in outputs]
        with_gradient = [x for x in outputs if x.requires_grad]
        self.output_gradients = [torch.zeros_like(x) for x in with_gradient]
        self.weights: list[Tensor] = []
        self.gradients: list[Tensor] = []
        if self.output_gradients:
            with passes.recording(self.backward):
                gradients = torch.autograd.grad(
                    with_gradient, aliases, self.output_gradients, allow_unused=True
                )
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    self.weights.append(weight)
                    self.gradients.append(gradient)
        # Detached, since the autograd graph would keep its tensors in memory.
        self.prediction = _map_tensors(prediction, Tensor.detach)

    def __call__(self, inputs: Sequence[Tensor]) -> Prediction:
        for ours, theirs in zip(self.inputs, inputs, strict=True):
            ours.copy_(theirs)
        outputs = iter(_Replay.apply(self, *self.weights))  # type: ignore[no-untyped-call]
        return _map_tensors(self.prediction, lambda _: next(outputs))  # type: ignore[no-any-return]


class _Replay(torch.autograd.Function):
    """Replays a recorded pass, as a function of its weights for autograd."""

    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, *weights: Tensor) -> tuple[Tensor, ...]:
        recorded.passes.count += 1
        ctx.recorded, ctx.number = recorded, recorded.passes.count
        recorded.forward.replay()
        outputs = [x.clone() for x in _tensors(recorded.prediction)]
        pairs = zip(outputs, recorded.has_gradient, strict=True)
        ctx.mark_non_differentiable(*(x for x, wanted in pairs if not wanted))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        recorded = ctx.recorded
        if ctx.number != recorded.passes.count:
            raise RuntimeError(
                "the backward pass of a recorded pass came after another pass, which "
                "has written over its activations; expected it before that pass"
            )
        pairs = zip(output_gradients, recorded.has_gradient, strict=True)
        wanted = [gradient for gradient, has_gradient in pairs if has_gradient]
        for ours, theirs in zip(recorded.output_gradients, wanted, strict=True):
            ours.copy_(theirs)
        recorded.backward.replay()
        return None, *(gradient.clone() for gradient in recorded.gradients)


@contextmanager
def _replaced(
    net: nn.Module, others: Mapping[nn.Parameter, nn.Parameter]
) -> Iterator[None]:
    """Replace parameters of a network within the block, wherever it uses them."""
    uses = [
        (module, name, parameter)
        for module in net.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter in others
    ]
    for module, name, parameter in uses:
        setattr(module, name, others[parameter])
    try:
        yield
    finally:
        for module, name, parameter in uses:
            setattr(module, name, parameter)


def _is_worth_recording(inputs: Sequence[Tensor]) -> bool:
    src = inputs[0]
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return src.is_cuda and src.numel() <= _MAX_PX and not wants_gradient


def _gpus(inputs: Sequence[Tensor]) -> list[torch.device]:
    return [inputs[0].device] if inputs[0].is_cuda else []


def _tensors(prediction: Prediction) -> list[Tensor]:
    """List the tensors of a prediction."""
    found: list[Tensor] = []
    _map_tensors(prediction, lambda x: found.append(x) or x)
    return found


def _map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to each tensor of a prediction."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return type(tree)(*(_map_tensors(value, change) for value in tree))
    return tree
