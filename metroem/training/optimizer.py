"""Make what changes the weights: Adam, its learning rate, and a moving average."""

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
        net: its weights are changed and averaged.
        phase: says how.
        state: with the states of both where a phase is resumed.
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
    """Make an exponential moving average of a network's weights, at its weights now.

    The n-th update leaves a fraction min(decay, (1 + n) / (10 + n)) of the average,
    n = 0, 1, ...: else the first weights, which know nothing, would count for long.
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
    average.update_parameters(net)  # torch's first update copies, and counts as one
    return average


@contextmanager
def averaged_weights(net: nn.Module, average: AveragedModel | None) -> Iterator[None]:
    """In the block the network has the averages for weights; itself without any.

    Weights stay where they are in memory, since recorded passes read them there.
    Buffers stay those of the network.
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
