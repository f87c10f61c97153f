"""Activations that are computed again in the backward pass, not kept for it."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from metroem.training.buffers import buffers_kept


def checkpoint_activations(net: nn.Module) -> None:
    """Let each block of a network keep what it is given, and nothing else.

    Blocks are the encoder of each level and each of its steps, of which one at a time
    is computed again. Values and gradients stay what they are, as do the names of the
    weights.

    Args:
        net: with `level_upmodules` and `level_downmodules`.
    """
    for block in _blocks(net):
        block.forward = _computed_again(block)  # type: ignore[method-assign]


def _blocks(net: nn.Module) -> Iterator[nn.Module]:
    for part in (net.level_upmodules, net.level_downmodules):
        assert isinstance(part, nn.ModuleDict)
        for block in part.values():
            if isinstance(block, nn.ModuleList):
                yield from block
            else:
                yield block


def _computed_again(block: nn.Module) -> Callable[..., Any]:
    forward = block.forward
    has_buffers = any(True for _ in block.buffers())

    def computed(*given: Any) -> Any:
        more = {}
        # Compiled, it writes into buffers once as it is; and takes no contexts.
        if has_buffers and not torch.compiler.is_compiling():
            more["context_fn"] = lambda: (nullcontext(), buffers_kept(block))
        return checkpoint(forward, *given, use_reentrant=False, **more)

    return computed
