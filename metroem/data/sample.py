"""Define samples: what a training step reads; stack them; seed their randomness."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metroem.imaging.defects import find_defects


class Sample(NamedTuple):
    """A pair of images with its prior field, its defects and its ground truth."""

    src: Tensor  # (B, 1, H, W), normalised, 0 = no data
    tgt: Tensor  # (B, 1, H, W)
    prior_field: Tensor | None  # (B, 2, H, W), pixels of the sample's mip
    pair: tuple[str, ...]  # name of each pair, for reports
    src_defects: Tensor | None = None  # (B, 1, H, W) bool, True on defects
    tgt_defects: Tensor | None = None  # (B, 1, H, W) bool
    truth: Tensor | None = None  # (B, 2, H, W), pixels: of a known warp of src
    truth_valid: Tensor | None = None  # (B, 1, H, W) bool
    # Set if the truth includes a pseudo-label, so that the network's own field decides
    # where it is valid. `scored`: pixels that a score counts whatever that field is.
    # `fallback_truth`: their truth where `truth` is not valid.
    scored: Tensor | None = None  # (B, 1, H, W) bool
    fallback_truth: Tensor | None = None  # (B, 2, H, W), pixels
    # Set if the truth is the truth of the warp alone: the pair and its prior field
    # before the warp, and before all other changes of noise, contrast and damage. src
    # is blank for samples whose natural field is 0.
    unwarped_src: Tensor | None = None  # (B, 1, H, W)
    unwarped_tgt: Tensor | None = None  # (B, 1, H, W)
    unwarped_prior: Tensor | None = None  # (B, 2, H, W), pixels

    def to(self, device: torch.device) -> "Sample":
        """Copy the sample to another device."""
        return self._replace(
            **{
                name: value.to(device, non_blocking=True)
                for name, value in self._asdict().items()
                if isinstance(value, Tensor)
            }
        )

    def window(self, rows: slice, cols: slice) -> "Sample":
        """Take some rows and cols of all maps."""
        return self._replace(
            **{
                name: value[..., rows, cols]
                for name, value in self._asdict().items()
                if isinstance(value, Tensor)
            }
        )


def with_defects(sample: Sample) -> Sample:
    """Find the defects of each side that has no defect mask."""
    src, tgt = sample.src_defects, sample.tgt_defects
    return sample._replace(
        src_defects=find_defects(sample.src) if src is None else src,
        tgt_defects=find_defects(sample.tgt) if tgt is None else tgt,
    )


def stack_samples(samples: Sequence[Sample]) -> Sample:
    """Stack samples of the same size to one batch.

    If only some have a defect mask, the others get an empty one.
    """
    pair = tuple(name for sample in samples for name in sample.pair)
    stacked = {
        name: _stack_maps(samples, name) for name in Sample._fields if name != "pair"
    }
    return Sample(pair=pair, **stacked)  # type: ignore[arg-type]


def _stack_maps(samples: Sequence[Sample], name: str) -> Tensor | None:
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
    """Make a random number generator whose seed depends on a key only.

    Keys are (seed, stage, phase, epoch, ...): a run that was killed and resumed, or
    that runs on more ranks, draws the same numbers.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
