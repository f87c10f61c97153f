"""Convert fields to torchfields, which corgie takes, and tensors back."""

from typing import Any

from torch import Tensor


def as_bchw(values: Tensor) -> Tensor:
    """(H, W) to (B, C, H, W), any layout or subclass -> contiguous (B, C, H, W)."""
    values = values.as_subclass(Tensor)
    return values.reshape((1,) * (4 - values.ndim) + tuple(values.shape)).contiguous()


def as_torchfields(field: Tensor) -> Any:
    """A field as the torchfields `Field` that corgie and its like expect."""
    import torchfields  # costs a second, and only this boundary needs it

    return torchfields.Field(field)
