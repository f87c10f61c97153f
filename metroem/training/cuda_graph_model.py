"""Repeat the passes of a network as CUDA graphs.

A pass is some thousand small operations, and starting them one by one takes a host
longer than they take a GPU: forward and backward pass of `correlation`, 4 pairs of
256 px, on an H100, 56 ms one by one and 13 recorded, with the same fields (2026-11).

Source: what torch.cuda.make_graphed_callables does. That one records while nothing
else in the process may use the GPU, which threads that pin samples do, and gives
gradients that the next pass writes over.
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

# Passes of a kind before it is recorded: the first ones compile and allocate.
_AS_THEY_ARE = 3
# Larger batches keep a GPU busy, and what they keep for the backward pass would stay
# in its memory between steps.
_MOST_PX = 2**22


class CudaGraphModel:
    """A network's forward and backward passes, each kind recorded when it comes again.

    Kinds differ in shapes, in what is wanted, and in whether gradients are. On a CPU,
    of large batches and of inputs that want a gradient, passes are made as they are.
    A recorded pass has to be followed by its backward pass before the next one.
    """

    def __init__(self, predict: Predict, net: nn.Module) -> None:
        """Nothing is recorded yet.

        Args:
            predict: makes src, tgt, prior and levels a prediction; a function of its
                arguments and of the weights alone, which waits for no GPU.
            net: whose weights those are; they stay where they are in memory.
        """
        self._predict, self._net = predict, net
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}
        self._passes: _Passes | None = None

    def __call__(
        self, src: Tensor, tgt: Tensor, prior: Tensor | None, levels: tuple[int, ...]
    ) -> Prediction:
        """The prediction; its tensors are the caller's, as if nothing were recorded.

        Raises:
            ResourceError: the network does what cannot be recorded.
        """
        given = [src, tgt] if prior is None else [src, tgt, prior]
        if not _is_worth_it(given):
            return self._predict(src, tgt, prior, levels)
        shapes = tuple(x.shape for x in given)
        kind = shapes, levels, torch.is_grad_enabled(), self._net.training
        if kind not in self._recorded:
            self._seen[kind] += 1
            if self._seen[kind] <= _AS_THEY_ARE:
                return self._predict(src, tgt, prior, levels)
            self._recorded[kind] = self._record(given, levels)
        return self._recorded[kind](given)

    def _record(self, given: Sequence[Tensor], levels: tuple[int, ...]) -> "_Recorded":
        if self._passes is None:
            self._passes = _Passes(given[0].device)

        def predict(
            src: Tensor, tgt: Tensor, prior: Tensor | None = None
        ) -> Prediction:
            return self._predict(src, tgt, prior, levels)

        try:
            return _Recorded(predict, self._net, given, self._passes)
        except RuntimeError as error:
            if "captur" not in str(error):  # as CUDA calls it
                raise
            raise ResourceError(
                "the GPU could not record the passes of this network "
                f"({first_line(error)}); the same command with "
                "--checkpoint_activations makes them one by one, and goes on from the "
                "last save"
            ) from error


class _Passes:
    """What the recorded passes of one network share.

    Their memory is one: what a pass keeps for its backward pass is written over by
    the next pass, of whatever kind.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.memory = torch.cuda.graph_pool_handle()
        self.made = 0

    def recording(self, graph: torch.cuda.CUDAGraph) -> AbstractContextManager[None]:
        """`metroem.utils.cuda_graphs.recording` of one of them."""
        return recording(graph, self.stream, self.memory)


class _Recorded:
    """One kind of pass."""

    def __init__(
        self,
        predict: Callable[..., Prediction],
        net: nn.Module,
        given: Sequence[Tensor],
        passes: _Passes,
    ) -> None:
        self.passes = passes
        self.given = [x.clone() for x in given]
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Others in the same memory: how the weights gather gradients may be tied to
        # the stream of an earlier pass, which cannot be recorded along with this one.
        weights = [p for p in net.parameters() if p.requires_grad]
        others = [nn.Parameter(p.detach()) for p in weights]
        with _replaced(net, dict(zip(weights, others, strict=True))):
            # In case that it has to be compiled for them. No update comes of this pass:
            # it leaves no trace in statistics, nor in chance.
            with buffers_kept(net), torch.random.fork_rng(_gpus(given)):
                predict(*self.given)
            with passes.recording(self.forward):
                prediction = predict(*self.given)
        made = _tensors(prediction)
        self.has_gradient = [x.requires_grad for x in made]
        with_gradient = [x for x in made if x.requires_grad]
        self.slopes = [torch.zeros_like(x) for x in with_gradient]
        self.weights: list[Tensor] = []
        self.gradients: list[Tensor] = []
        if self.slopes:
            with passes.recording(self.backward):
                gradients = torch.autograd.grad(
                    with_gradient, others, self.slopes, allow_unused=True
                )
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    self.weights.append(weight)
                    self.gradients.append(gradient)
        # Without what they were made from, which would stay in memory.
        self.prediction = _each(prediction, Tensor.detach)

    def __call__(self, given: Sequence[Tensor]) -> Prediction:
        for ours, theirs in zip(self.given, given, strict=True):
            ours.copy_(theirs)
        made = iter(_Repeat.apply(self, *self.weights))  # type: ignore[no-untyped-call]
        return _each(self.prediction, lambda _: next(made))  # type: ignore[no-any-return]


class _Repeat(torch.autograd.Function):
    """A recorded pass as autograd knows it: a function of the weights it depends on."""

    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, *weights: Tensor) -> tuple[Tensor, ...]:
        recorded.passes.made += 1
        ctx.recorded, ctx.number = recorded, recorded.passes.made
        recorded.forward.replay()
        made = [x.clone() for x in _tensors(recorded.prediction)]
        pairs = zip(made, recorded.has_gradient, strict=True)
        ctx.mark_non_differentiable(*(x for x, wanted in pairs if not wanted))
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        recorded = ctx.recorded
        if ctx.number != recorded.passes.made:
            raise RuntimeError(
                "the backward pass of a recorded pass came after another pass, which "
                "has written over what it needs; expected it before that one"
            )
        pairs = zip(slopes, recorded.has_gradient, strict=True)
        wanted = [slope for slope, has_gradient in pairs if has_gradient]
        for ours, theirs in zip(recorded.slopes, wanted, strict=True):
            ours.copy_(theirs)
        recorded.backward.replay()
        return None, *(gradient.clone() for gradient in recorded.gradients)


@contextmanager
def _replaced(
    net: nn.Module, others: Mapping[nn.Parameter, nn.Parameter]
) -> Iterator[None]:
    """The network has other weights until the block ends, wherever it has them."""
    places = [
        (module, name, parameter)
        for module in net.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter in others
    ]
    for module, name, parameter in places:
        setattr(module, name, others[parameter])
    try:
        yield
    finally:
        for module, name, parameter in places:
            setattr(module, name, parameter)


def _is_worth_it(given: Sequence[Tensor]) -> bool:
    src = given[0]
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return src.is_cuda and src.numel() <= _MOST_PX and not wants_gradient


def _gpus(given: Sequence[Tensor]) -> list[torch.device]:
    return [given[0].device] if given[0].is_cuda else []


def _tensors(prediction: Prediction) -> list[Tensor]:
    found: list[Tensor] = []
    _each(prediction, lambda x: found.append(x) or x)
    return found


def _each(made: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A prediction with each of its tensors changed."""
    if isinstance(made, Tensor):
        return change(made)
    if isinstance(made, dict):
        return {key: _each(value, change) for key, value in made.items()}
    if isinstance(made, tuple):
        return type(made)(*(_each(value, change) for value in made))
    return made
