"""What one training step sees, and the chance that it is made from."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """A pair of images with the field of the stage before."""

    src: Tensor  # (B, 1, H, W), normalised, 0 = no data
    tgt: Tensor  # (B, 1, H, W)
    prior_field: Tensor | None  # (B, 2, H, W), pixels of the sample's mip
    pair: tuple[str, ...]  # name of each pair, for reports

    def to(self, device: torch.device) -> "Sample":
        """The sample on another device."""
        prior = self.prior_field
        if prior is not None:
            prior = prior.to(device, non_blocking=True)
        src, tgt = (t.to(device, non_blocking=True) for t in (self.src, self.tgt))
        return Sample(src, tgt, prior, self.pair)


def stack_samples(samples: Sequence[Sample]) -> Sample:
    """One batch of samples of the same size."""
    priors = [s.prior_field for s in samples if s.prior_field is not None]
    return Sample(
        torch.cat([s.src for s in samples]),
        torch.cat([s.tgt for s in samples]),
        torch.cat(priors) if priors else None,
        tuple(name for s in samples for name in s.pair),
    )


def seeded_generator(*key: int) -> torch.Generator:
    """A generator that is a function of its key alone.

    Keys are (seed, stage, phase, epoch, ...): a run that was killed and
    resumed, or that runs on more ranks, draws the same chance.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
