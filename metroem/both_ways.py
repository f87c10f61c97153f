"""The field of a pair and that of the swapped pair made to agree."""

import torch
from torch import Tensor

from metroem.field import invert

# Where the two are so far apart, the other one counts exp(-1) of its half: beside a
# tear, whose other side has no inverse.
_TRUSTED_PX = 4.0


def agree(forward: Tensor, backward: Tensor) -> Tensor:
    """The mean of a field and the inverse of the swapped pair's.

    What a network or a search errs by for a reason of its own, such as which of the
    two sections is sampled between its pixels, cancels in the mean. Swapping the
    arguments gives the inverse of the result (to 0.1 px for fields 1 px apart).

    Args:
        forward: of the pair, (B, 2, H, W), pixels.
        backward: of the pair with src and tgt swapped, (B, 2, H, W), pixels.

    Returns:
        (B, 2, H, W), pixels; `forward` where they contradict each other.
    """
    back = invert(backward)
    apart = (back - forward).square().sum(1, keepdim=True)
    return torch.lerp(forward, back, 0.5 * torch.exp(-apart / _TRUSTED_PX**2))
