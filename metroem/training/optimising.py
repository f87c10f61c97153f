"""How the weights of a phase change: the optimizer, its rate, and their average."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from metroem.specs.schedule import Phase
from metroem.training.averages import Averages
from metroem.training.checkpoint import TrainingState


class PhaseOptimizer:
    """Adam with the rate of the schedule, and averages of what it makes.

    Attributes:
        phase: says how.
        num_updates: of the whole phase, which the rate is stretched over.
        adam: the optimizer.
        averages: None where weights are not averaged.
    """

    def __init__(
        self, net: nn.Module, phase: Phase, num_updates: int, state: TrainingState
    ) -> None:
        """Begin a phase, or go on where a state says it stood."""
        self.phase = phase
        self.num_updates = num_updates
        self.adam = torch.optim.Adam(net.parameters(), lr=phase.lr, fused=True)
        self.averages = None if phase.ema is None else Averages(net, phase.ema)
        if state.optimizer is not None:
            self.adam.load_state_dict(state.optimizer)
        if state.averages is not None and self.averages is not None:
            self.averages.load_state_dict(state.averages)

    def set_rate(self, done: int) -> None:
        """Take the learning rate of the update that comes next.

        Args:
            done: updates of the phase, those that were skipped among them.
        """
        rate = self.phase.rate(done, self.num_updates)
        for group in self.adam.param_groups:
            group["lr"] = rate

    def note_update(self) -> None:
        """Take in what the last update made."""
        if self.averages is not None:
            self.averages.update()

    @contextmanager
    def best_weights(self) -> Iterator[None]:
        """The network has the weights that are to be validated and kept."""
        with nullcontext() if self.averages is None else self.averages.applied():
            yield

    def finish(self) -> None:
        """Leave to the network the weights that the phase ends with."""
        if self.averages is not None:
            self.averages.keep()

    def note_state(self, state: TrainingState) -> None:
        """Write into a state what a phase goes on from."""
        state.optimizer = self.adam.state_dict()
        state.averages = None if self.averages is None else self.averages.state_dict()
