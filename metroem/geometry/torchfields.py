"""Convert fields to torchfields for corgie, and tensors of any form to plain ones."""

from typing import Any

from torch import Tensor


def as_bchw(values: Tensor) -> Tensor:
    """Make a tensor (B, C, H, W), contiguous and plain.

    Args:
        values: (H, W) to (B, C, H, W), any layout or subclass of Tensor.
    """
    values = values.as_subclass(Tensor)
    return values.reshape((1,) * (4 - values.ndim) + tuple(values.shape)).contiguous()


def as_torchfields(field: Tensor) -> Any:
    """Make a torchfields `Field`, as corgie expects it, of (B, 2, H, W), pixels."""
    import torchfields  # takes a second, and is needed here only

    return torchfields.Field(field)
