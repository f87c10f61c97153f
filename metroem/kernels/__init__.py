"""What a GPU does in one go where torch takes many; Triton is imported when it is used.

Triton comes with torch for GPUs, and is not there on other machines.
"""

import logging
from functools import cache

import torch
from torch import Tensor

from metroem.errors import first_line

logger = logging.getLogger(__name__)


def has_kernels(field: Tensor) -> bool:
    """Whether kernels can be used for a field, (B, 2, H, W), where it is."""
    is_float = field.dtype == torch.float32
    return field.is_cuda and is_float and _kernels_work(field.device)


@cache
def _kernels_work(device: torch.device) -> bool:
    """Triton comes with torch for GPUs, but needs a C compiler beside it."""
    try:
        from metroem.kernels import search

        search.coarser(torch.zeros(1, 2, 2, 2, device=device), 2)
    except Exception as error:  # it raises whatever its parts raise
        logger.warning(
            "fields are finetuned 6 to 13 times slower than they could be, since "
            "Triton does not work on this machine: %s. It needs a C compiler, for "
            "example apt install gcc",
            first_line(error),
        )
        return False
    return True
