"""What one training step sees, and the chance that it is made from."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """A pair of images with the field of the stage before, and its defects."""

    src: Tensor  # (B, 1, H, W), normalised, 0 = no data
    tgt: Tensor  # (B, 1, H, W)
    prior_field: Tensor | None  # (B, 2, H, W), pixels of the sample's mip
    pair: tuple[str, ...]  # name of each pair, for reports
    src_defects: Tensor | None = None  # (B, 1, H, W) bool, True on defects
    tgt_defects: Tensor | None = None  # (B, 1, H, W) bool

    def to(self, device: torch.device) -> "Sample":
        """The sample on another device."""
        return self._replace(
            **{
                name: value.to(device, non_blocking=True)
                for name, value in self._asdict().items()
                if isinstance(value, Tensor)
            }
        )

    def window(self, rows: slice, cols: slice) -> "Sample":
        """Some rows and cols of everything."""
        return self._replace(
            **{
                name: value[..., rows, cols]
                for name, value in self._asdict().items()
                if isinstance(value, Tensor)
            }
        )


def stack_samples(samples: Sequence[Sample]) -> Sample:
    """One batch of samples of the same size.

    Where some have a defect mask and others have none, these have no defects.
    """
    priors = [s.prior_field for s in samples if s.prior_field is not None]
    return Sample(
        torch.cat([s.src for s in samples]),
        torch.cat([s.tgt for s in samples]),
        torch.cat(priors) if priors else None,
        tuple(name for s in samples for name in s.pair),
        _stacked_masks(samples, [s.src_defects for s in samples]),
        _stacked_masks(samples, [s.tgt_defects for s in samples]),
    )


def _stacked_masks(
    samples: Sequence[Sample], masks: Sequence[Tensor | None]
) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    return torch.cat(
        [
            torch.zeros_like(sample.src, dtype=torch.bool) if mask is None else mask
            for sample, mask in zip(samples, masks, strict=True)
        ]
    )


def seeded_generator(*key: int) -> torch.Generator:
    """A generator that is a function of its key alone.

    Keys are (seed, stage, phase, epoch, ...): a run that was killed and
    resumed, or that runs on more ranks, draws the same chance.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
