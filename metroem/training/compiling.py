"""Networks compiled by torch.compile."""

import sys
import types

import torch
from torch import Tensor

from metroem.aligner import Aligner
from metroem.errors import UsageError

# What artificery runs its parsers under, which is no module that can be imported: the
# compiler looks names of functions up there.
_PARSERS = "parser"


def check_compiler(device: torch.device) -> None:
    """Refuse a machine that cannot compile, before any work is done.

    Args:
        device: that networks are to run on.

    Raises:
        UsageError: compiling a few operations fails there.
    """

    def probe(x: Tensor) -> Tensor:
        return (x.sin() + 1) * x

    # What was compiled earlier on this machine would hide a compiler that is gone.
    compiled = torch.compile(probe, options={"force_disable_caches": True})
    try:
        compiled(torch.zeros(16, device=device))
    except Exception as error:  # the compiler raises whatever its parts raise
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"--compile: torch.compile does not work on this machine: {first_line}. It "
            "needs a C++ compiler and the headers of Python for a CPU (for example apt "
            "install g++ python3-dev), triton for a GPU; or leave the flag out"
        ) from error


def check_compiles(aligner: Aligner, path: object) -> None:
    """Refuse a network that does not compile; `path` of its module (UsageError)."""
    if aligner.operators != "corrected":
        raise UsageError(
            f"--compile: {path} has stock operators, which torch.compile cannot take; "
            "leave the flag out, or say operators='corrected' in its create.py and "
            "train it anew"
        )


def compile_network(aligner: Aligner) -> None:
    """Let torch compile the network's forward pass when it is first called.

    The network stays the object that it is: names of weights do not change.

    Args:
        aligner: with corrected operators.
    """
    if _PARSERS not in sys.modules:
        sys.modules[_PARSERS] = types.ModuleType(_PARSERS)
    # Each size by itself: with sizes as symbols torch 2.13 fails on the network
    # `correlation` ("Exponent must be non-negative"). After 8 kinds of calls torch
    # compiles no further ones and runs them as they are, so mixed sizes end there.
    aligner.net.compile(dynamic=False)
