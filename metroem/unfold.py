"""Folds taken out of a field."""

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.metrics import jacobian_determinant

# A place that shrinks to less than this share is on its way to folding over.
_LEAST_DETERMINANT = 0.02
_MOST_ROUNDS = 6


def unfold(field: Tensor) -> Tensor:
    """Smooth a field where it folds over, and nowhere else.

    Tissue does not fold over itself within a section, so a fold is an error, at
    most places one of a sharp bend beside a tear. Each round averages the field
    over a window around the folds that are left, twice as wide as the round before.

    Args:
        field: (B, 2, H, W), pixels; H and W >= 3.

    Returns:
        (B, 2, H, W); `field` itself where nothing folds. Folds that 64 px windows do
        not smooth away stay.
    """
    for round_ in range(_MOST_ROUNDS):
        folded = jacobian_determinant(field) < _LEAST_DETERMINANT
        if not bool(folded.any()):
            break
        reach = 2**round_
        size = 2 * reach + 1
        around = F.max_pool2d(F.pad(folded.float(), (1, 1, 1, 1)), size, 1, reach)
        # A soft border, so that the window does not leave a step of its own.
        share = F.avg_pool2d(around, size, 1, reach, count_include_pad=False)
        smooth = F.avg_pool2d(field, size, 1, reach, count_include_pad=False)
        field = torch.lerp(field, smooth, torch.maximum(share, around))
    return field
