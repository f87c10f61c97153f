"""Protect the buffers of a network, such as the running statistics of BatchNorm.

A pass in training mode writes into them. Only the passes of applied updates may change
them; other passes are undone here.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Saved = list[tuple[Tensor, Tensor]]  # each buffer, and a copy of its values


def save_buffers(net: nn.Module) -> Saved:
    """Copy the values of a network's buffers."""
    return [(buffer, buffer.clone()) for buffer in net.buffers()]


@torch.no_grad()
def restore_buffers(saved: Saved) -> None:
    """Write saved values back; the buffers stay where they are in memory."""
    for buffer, value in saved:
        buffer.copy_(value)


@contextmanager
def buffers_kept(net: nn.Module) -> Iterator[None]:
    """Restore the buffers of a network at the end of the block."""
    saved = save_buffers(net)
    try:
        yield
    finally:
        restore_buffers(saved)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode within the block: its buffers do not change."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
