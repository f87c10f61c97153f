"""What one training step sees, and the chance that it is made from."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metroem.imaging.defects import find_defects


class Sample(NamedTuple):
    """A pair of images with the field of the stage before, and what is known of it."""

    src: Tensor  # (B, 1, H, W), normalised, 0 = no data
    tgt: Tensor  # (B, 1, H, W)
    prior_field: Tensor | None  # (B, 2, H, W), pixels of the sample's mip
    pair: tuple[str, ...]  # name of each pair, for reports
    src_defects: Tensor | None = None  # (B, 1, H, W) bool, True on defects
    tgt_defects: Tensor | None = None  # (B, 1, H, W) bool
    truth: Tensor | None = None  # (B, 2, H, W), pixels: of a known warp of src
    truth_valid: Tensor | None = None  # (B, 1, H, W) bool
    # Where the truth rests on what the network itself has found: the pixels that a
    # score counts whatever that was, (B, 1, H, W) bool, and their truth where `truth`
    # is not valid, (B, 2, H, W), pixels.
    truth_due: Tensor | None = None
    truth_lost: Tensor | None = None
    # Where the truth is that of the warp alone: src before it, and its prior field;
    # a blank src for samples whose natural field is 0.
    unwarped_src: Tensor | None = None  # (B, 1, H, W)
    unwarped_prior: Tensor | None = None  # (B, 2, H, W), pixels

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


def with_defects(sample: Sample) -> Sample:
    """The sample with the defects of both sides: its own, or those found in it."""
    src, tgt = sample.src_defects, sample.tgt_defects
    return sample._replace(
        src_defects=find_defects(sample.src) if src is None else src,
        tgt_defects=find_defects(sample.tgt) if tgt is None else tgt,
    )


def stack_samples(samples: Sequence[Sample]) -> Sample:
    """One batch of samples of the same size.

    Where some have a defect mask and others have none, these have no defects.
    """
    pair = tuple(name for sample in samples for name in sample.pair)
    stacked = {
        name: _stacked(samples, name) for name in Sample._fields if name != "pair"
    }
    return Sample(pair=pair, **stacked)  # type: ignore[arg-type]


def _stacked(samples: Sequence[Sample], name: str) -> Tensor | None:
    values: list[Tensor | None] = [getattr(sample, name) for sample in samples]
    if all(value is None for value in values):
        return None
    if name in ("src_defects", "tgt_defects"):
        values = [
            torch.zeros_like(sample.src, dtype=torch.bool) if value is None else value
            for sample, value in zip(samples, values, strict=True)
        ]
    return torch.cat(values)  # type: ignore[arg-type]


def seeded_generator(*key: int) -> torch.Generator:
    """A generator that is a function of its key alone.

    Keys are (seed, stage, phase, epoch, ...): a run that was killed and
    resumed, or that runs on more ranks, draws the same chance.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
