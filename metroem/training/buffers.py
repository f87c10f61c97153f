"""Buffers of a network, such as the running statistics of BatchNorm.

A pass in training mode writes into them. They are to be what the passes of updates have
made of them, and no others.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Kept = list[tuple[Tensor, Tensor]]  # each buffer, and what it held


def keep_buffers(net: nn.Module) -> Kept:
    """What the buffers of a network hold now."""
    return [(buffer, buffer.clone()) for buffer in net.buffers()]


@torch.no_grad()
def restore_buffers(kept: Kept) -> None:
    """Write back what buffers held; they stay where they are in memory."""
    for buffer, value in kept:
        buffer.copy_(value)


@contextmanager
def buffers_kept(net: nn.Module) -> Iterator[None]:
    """After the block the buffers of a network hold what they held before it."""
    kept = keep_buffers(net)
    try:
        yield
    finally:
        restore_buffers(kept)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In the block a model is applied, not trained: its buffers stay as they are."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
