"""Make the optimizer (Adam), set its learning rate, and average the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel

from metroem.specs.schedule import Phase
from metroem.training.checkpoint import TrainingState


def make_optimizer(
    net: nn.Module, phase: Phase, state: TrainingState
) -> tuple[torch.optim.Adam, AveragedModel | None]:
    """Make the optimizer of a phase, and the average of the weights if it has one.

    Args:
        net: its weights are optimised and averaged.
        phase: learning rate, and decay of the average.
        state: contains the states of both if the phase is resumed.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=phase.lr, fused=True)
    average = None if phase.ema is None else make_average(net, phase.ema)
    if state.optimizer is not None:
        optimizer.load_state_dict(state.optimizer)
    if state.average is not None and average is not None:
        average.load_state_dict(state.average)
    return optimizer, average


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def make_average(net: nn.Module, decay: float) -> AveragedModel:
    """Make an exponential moving average that starts at a network's current weights.

    Update n = 0, 1, ... keeps a fraction min(decay, (1 + n) / (10 + n)) of the
    average. With a fixed decay the first, untrained weights would count for long.
    `torch.optim.swa_utils.get_ema_multi_avg_fn` has a fixed decay, so it is not used.

    Args:
        net: its weights are averaged; buffers are copied, not averaged.
        decay: 0 <= decay < 1.
    """

    def update(averages: PARAM_LIST, weights: PARAM_LIST, count: Tensor | int) -> None:
        number = int(count) - 1
        fraction = min(decay, (1 + number) / (10 + number))
        for averaged, weight in zip(averages, weights, strict=True):
            averaged.lerp_(weight, 1 - fraction)

    average = AveragedModel(net, multi_avg_fn=update)
    average.update_parameters(net)  # the first update only copies, but it is counted
    return average


@contextmanager
def averaged_weights(net: nn.Module, average: AveragedModel | None) -> Iterator[None]:
    """Give the network its averaged weights within the block; do nothing without any.

    Weights stay where they are in memory, since recorded passes read them there.
    Buffers are not changed.
    """
    if average is None:
        yield
        return
    own = [weight.detach().clone() for weight in net.parameters()]
    copy_weights(net, average.module.parameters())
    try:
        yield
    finally:
        copy_weights(net, own)


@torch.no_grad()
def copy_weights(net: nn.Module, weights: Iterator[Tensor] | Sequence[Tensor]) -> None:
    """Write values into the weights of a network, in the order of `parameters()`."""
    for weight, value in zip(net.parameters(), weights, strict=True):
        weight.copy_(value)
