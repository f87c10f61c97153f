"""Moving averages of a network's weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# The n-th average forgets at most as fast as (1 + n) / (10 + n): else the first
# weights, which know nothing, would count for long.
_FIRST, _SLOWING = 1, 10


class Averages:
    """Exponential moving averages of the weights of a network.

    Each weight is averaged once, however many names it has: the state_dict of a
    network built by artificery has two for each. Buffers are not averaged: those of
    the network stay what they are.

    Attributes:
        decay: share of the average that an update leaves, 0 <= decay < 1.
        count: updates so far.
        values: the averages by the names of the weights.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        """Begin with the weights that a network has."""
        self.net = net
        self.decay = decay
        self.count = 0
        self.values = {name: p.detach().clone() for name, p in net.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights that the network has now."""
        decay = min(self.decay, (_FIRST + self.count) / (_SLOWING + self.count))
        for name, parameter in self.net.named_parameters():
            self.values[name].lerp_(parameter, 1 - decay)
        self.count += 1

    @torch.no_grad()
    def keep(self) -> None:
        """Make the averages the weights of the network."""
        for name, parameter in self.net.named_parameters():
            parameter.copy_(self.values[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averages for its weights, until the block ends."""
        own = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.keep()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.net.named_parameters():
                    parameter.copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"count": self.count, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from averages that were saved."""
        self.count = state["count"]
        for name, value in self.values.items():
            value.copy_(state["values"][name])
