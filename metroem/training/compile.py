"""Compile networks with torch.compile, and say what to do if that fails."""

import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metroem.aligner import Aligner
from metroem.errors import ResourceError, UsageError, first_line

# artificery runs its parsers under this module name, which cannot be imported. The
# compiler looks up function names in that module.
_PARSERS = "parser"


def check_compiler(device: torch.device) -> None:
    """Refuse a machine that cannot compile, before any work is done.

    Args:
        device: on which networks will run.

    Raises:
        UsageError: compiling a few operations fails there.
    """

    # A new number each time, since torch reuses what it compiled earlier on this
    # machine. That would hide a compiler that is gone.
    unseen = float(time.time_ns() % 10**15)

    def probe(x: Tensor) -> Tensor:
        return (x.sin() + unseen) * x

    try:
        torch.compile(probe, dynamic=False)(torch.zeros(16, device=device))
    except Exception as error:  # the compiler passes on any error of its parts
        raise UsageError(
            "--compile: torch.compile does not work on this machine: "
            f"{first_line(error)}. It needs a C++ compiler and the headers of Python "
            "for a CPU (for example apt install g++ python3-dev), triton for a GPU; or "
            "leave the flag out"
        ) from error


def check_compiles(aligner: Aligner, path: object) -> None:
    """Refuse a network that cannot be compiled.

    Args:
        aligner: has the network.
        path: of its module, for the message.

    Raises:
        UsageError: it has stock operators.
    """
    if aligner.operators != "corrected":
        raise UsageError(
            f"--compile: {path} has stock operators, which torch.compile cannot take; "
            "leave the flag out, or say operators='corrected' in its create.py and "
            "train it again"
        )


@contextmanager
def compiler_failures_named() -> Iterator[None]:
    """Turn a failure of torch.compile into a ResourceError that says what to do.

    torch compiles each sample size when it is first used, so training may have started.
    """
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException  # takes a second to load

        if not isinstance(error, TorchDynamoException):
            raise
        cause = getattr(error, "inner_exception", error)
        raise ResourceError(
            "--compile: torch.compile failed on the network "
            f"({type(cause).__name__}: {first_line(cause)}). The same command without "
            "the flag resumes from the last save; another crop_size of the schedule or "
            "another version of torch may compile"
        ) from error


def compile_network(aligner: Aligner, backend: Any = "inductor") -> None:
    """Let torch compile the network's forward pass when it is first called.

    The network object and the names of its weights do not change. Networks that this
    process compiled before are compiled once more if they are called again.

    Args:
        aligner: with corrected operators.
        backend: as torch.compile takes it.
    """
    if _PARSERS not in sys.modules:
        sys.modules[_PARSERS] = types.ModuleType(_PARSERS)
    # torch compiles at most 8 kinds of calls (sizes; with and without gradients) and
    # does not compile others. All networks of a process share these 8, so the count is
    # reset for each stage of a pyramid.
    torch.compiler.reset()
    # dynamic=False compiles each size separately: with symbolic sizes the compiler of
    # torch 2.13 fails on the network `correlation`.
    aligner.net.compile(dynamic=False, backend=backend)
