"""Apply all stages of a pyramid to one pair of images."""

import operator
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from metroem.aligner import Aligner, as_array
from metroem.data.sample import Sample
from metroem.errors import PyramidError, UsageError
from metroem.geometry.field import resample_field, warp
from metroem.geometry.grid import Grid
from metroem.imaging.correlation_map import correlation_map
from metroem.imaging.normalize import coarsen_image, normalize, tissue_statistics
from metroem.models.finetuning import finetune_iterations
from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from metroem.models.options import AlignerOptions
from metroem.models.tiling import Tiling
from metroem.models.weights import check_weights
from metroem.specs.modules import find_modules

# A fork does not have its parent's threads and would wait for them for ever. So each
# fork, for example of a multiprocessing.Pool around `align`, gets one thread.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

# Where the finetuned field is so many px from the networks' own, confidence is 1 / e of
# what it would be. Together they tell pixels that are off by less than 4 px from others
# better than the correlation alone: area under the ROC curve 0.85 instead of 0.74,
# between neighbours 40 nm apart (FIB-SEM, 10 pairs warped by 12 to 60 px, 2026-11).
_SURE_PX = 3.0
# Whole sections are coarsened, normalised and resampled in bands of this many rows.
_BAND_ROWS = 512


class StageInput(NamedTuple):
    """A pair, as input of one stage."""

    sample: Sample  # of batch size 1, at the stage's mip
    grid: Grid  # its location


@dataclass(frozen=True)
class Pyramid:
    """A pyramid with its modules loaded.

    Attributes:
        mips: mip of each stage's images, coarse first.
        aligners: the aligner of each stage.
        device: device of the aligners.
        tiling: how images larger than a tile are split for the networks; None: never.
    """

    mips: tuple[int, ...]
    aligners: tuple[Aligner, ...]
    device: torch.device
    tiling: Tiling | None = Tiling()

    @classmethod
    def load(
        cls,
        path: str | Path,
        checkpoint_name: str | None = "checkpoint",
        device: str | torch.device = "cpu",
        num_stages: int | None = None,
    ) -> "Pyramid":
        """Load the modules of a pyramid.

        Args:
            path: directory of the pyramid.
            checkpoint_name: name of the weights; None: untrained networks, whose
                weights are torch's next random numbers (`torch.manual_seed`).
            device: device of the aligners.
            num_stages: how many of the first stages to load; None loads all. The
                others need no weights.

        Raises:
            PyramidError: the directory is not a pyramid, or a module is broken.
            CheckpointError: a module does not have these weights, or they do not fit.
        """
        modules = find_modules(Path(path))[:num_stages]
        if checkpoint_name is not None:
            check_weights(modules, checkpoint_name, str(path))
        device = torch.device(device)
        aligners = [
            load_module(
                module.path,
                checkpoint_name=checkpoint_name,
                finetune=True,
                pass_field=True,
                finetune_iter=finetune_iterations(module.stage),
            ).aligner
            for module in modules
        ]
        return cls(
            tuple(module.in_mip for module in modules),
            tuple(a.to(device).eval() for a in aligners),  # type: ignore[union-attr]
            device,
        )

    @classmethod
    def pretrained(
        cls, mips: Sequence[int] = (2, 1, 0), device: str | torch.device = "cpu"
    ) -> "Pyramid":
        """Load a pyramid with the weights of the package, see docs/pretrained.md.

        Args:
            mips: mip of each stage's images, coarse first.
            device: device of the aligners.

        Raises:
            UsageError: no mips, or a negative or increasing mip.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pyramid"
            init_pyramid(path, mips, pretrained=True)
            return cls.load(path, device=device)

    @overload
    def align(
        self,
        src: ArrayLike,
        tgt: ArrayLike,
        mip: int = 0,
        finetune: bool = True,
        confidence: Literal[False] = False,
    ) -> np.ndarray: ...

    @overload
    def align(
        self,
        src: ArrayLike,
        tgt: ArrayLike,
        mip: int = 0,
        finetune: bool = True,
        *,
        confidence: Literal[True],
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def align(
        self,
        src: ArrayLike,
        tgt: ArrayLike,
        mip: int = 0,
        finetune: bool = True,
        confidence: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Find the field that warps src onto tgt.

        Args:
            src: (H, W) raw grey levels at `mip`; an array, tensor, PIL image or list of
                whole numbers or floats of any type. 0 = no data, as are NaN, infinite
                and masked pixels.
            tgt: (H, W), the same form as src.
            mip: mip of the images.
            finetune: let each stage improve its field on the pair itself.
            confidence: also return how sure the field is at each pixel. With
                `finetune` the networks run once more for it.

        Returns:
            The field, (2, H, W) float32, pull, pixels of `mip`, channel 0 along cols;
            and with `confidence`, (H, W) float32, 0 to 1: the correlation of warped src
            and tgt around the pixel, see `correlation_map`, times exp(-d / 3), with d
            the distance in px, at the last stage, of the finetuned field from the
            networks' own. It is 0 where either has no tissue.

        Raises:
            UsageError: the images are not grey levels, not 2-d, without pixels, or
                differ in shape; or `mip` is not a whole number >= 0.
            PyramidError: a stage needs a finer mip than `mip`.
        """
        inputs, full = self._inputs(src, tgt, mip)
        found = self.run(inputs, finetune)[-1]
        field = _resample_by_bands(found, inputs[-1].grid, full)[0].cpu().numpy()
        if not confidence:
            return field
        images = inputs[-1].sample
        sure = correlation_map(warp(images.src, found.cpu()), images.tgt)
        if finetune:
            apart = (found - self.run(inputs, False)[-1]).norm(dim=1, keepdim=True)
            sure = sure * torch.exp(-apart.cpu() / _SURE_PX)
        levels = inputs[-1].grid.mip - mip
        sure = F.interpolate(sure, scale_factor=2**levels, mode="nearest")
        return field, sure[0, 0, : full.rows, : full.cols].numpy()

    def fields(
        self, src: ArrayLike, tgt: ArrayLike, mip: int = 0, finetune: bool = True
    ) -> list[np.ndarray]:
        """Find the field of each stage; arguments and errors as in `align`.

        Returns:
            One (2, H, W) float32 field a stage, pixels of `mip`; the last is
            the field of the pyramid.
        """
        inputs, full = self._inputs(src, tgt, mip)
        return [
            _resample_by_bands(field, stage.grid, full)[0].cpu().numpy()
            for field, stage in zip(self.run(inputs, finetune), inputs, strict=True)
        ]

    def run(self, inputs: Sequence[StageInput], finetune: bool = True) -> list[Tensor]:
        """Find the field of each stage, each with its own input of the pair.

        Args:
            inputs: the input of each stage; prior fields in it are not used.
            finetune: let each stage improve its field on the pair itself.

        Returns:
            One field a stage, (1, 2, H, W), on the grid of its own input, in its
            pixels, on the pyramid's device.
        """
        found: list[Tensor] = []
        for aligner, given, prior in self._stages(inputs, found):
            sample = given.sample.to(self.device)
            field = aligner.align(
                sample.src,
                sample.tgt,
                prior,
                options=self._options(aligner, finetune),
                defects=(sample.src_defects, sample.tgt_defects),
            )
            found.append(field)
        return found

    def run_both_ways(
        self, inputs: Sequence[StageInput], finetune: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Find the field of each stage, for a pair and for the pair swapped.

        With `finetune_both_ways`, each direction is searched once, see
        `Aligner.align_both_ways`.

        Args:
            inputs: as in `run`.
            finetune: as in `run`.

        Returns:
            The fields of `run`, bit by bit, and the fields of tgt to src.
        """
        forward: list[Tensor] = []
        backward: list[Tensor] = []
        for one, other in zip(
            self._stages(inputs, forward), self._stages(inputs, backward), strict=True
        ):
            aligner, given, priors = one[0], one[1], (one[2], other[2])
            sample = given.sample.to(self.device)
            fields = aligner.align_both_ways(
                sample.src,
                sample.tgt,
                priors,
                options=self._options(aligner, finetune),
                defects=(sample.src_defects, sample.tgt_defects),
            )
            forward.append(fields[0])
            backward.append(fields[1])
        return forward, backward

    def _options(self, aligner: Aligner, finetune: bool) -> AlignerOptions:
        return replace(aligner.options, finetune=finetune, tiling=self.tiling)

    def _stages(
        self, inputs: Sequence[StageInput], found: Sequence[Tensor]
    ) -> Iterator[tuple[Aligner, StageInput, Tensor | None]]:
        """Iterate over stages: aligner, input, and prior from the last field found."""
        for stage, given in enumerate(inputs):
            prior = None
            if stage:
                prior = _resample_by_bands(
                    found[-1], inputs[stage - 1].grid, given.grid
                )
            yield self.aligners[stage], given, prior

    def _inputs(
        self, src: ArrayLike, tgt: ArrayLike, mip: int
    ) -> tuple[list[StageInput], Grid]:
        """Make the input of each stage from a raw pair, and the grid of the pair."""
        try:
            mip = operator.index(mip)
        except TypeError:
            raise UsageError(f"mip {mip!r}: expected a whole number") from None
        images = [
            torch.from_numpy(as_array(image, name))
            for image, name in ((src, "src"), (tgt, "tgt"))
        ]
        self._check(images[0].shape, images[1].shape, mip)
        images = [_to_float(image) for image in images]
        inputs = []
        for stage_mip in self.mips:
            at_mip = [
                _coarsen_and_normalize(image, stage_mip - mip) for image in images
            ]
            grid = Grid(stage_mip, 0, 0, *at_mip[0].shape[-2:])
            inputs.append(StageInput(Sample(at_mip[0], at_mip[1], None, ()), grid))
        return inputs, Grid(mip, 0, 0, *images[0].shape)

    def _check(self, src: Sequence[int], tgt: Sequence[int], mip: int) -> None:
        """Refuse shapes and mips that the stages cannot read."""
        if len(src) != 2 or src != tgt or 0 in src:
            raise UsageError(
                f"src {tuple(src)} and tgt {tuple(tgt)}: expected two images [rows, "
                "cols] of the same shape, with pixels"
            )
        if mip < 0:
            raise UsageError(f"mip {mip}: expected 0 (full resolution) or more")
        if mip > self.mips[-1]:
            raise PyramidError(
                f"the images are at mip {mip}, but the stages read mips "
                f"{list(self.mips)}: images at mip {self.mips[-1]} or finer are needed"
            )


def _to_float(image: Tensor) -> Tensor:
    """Convert grey levels to float32, or to float64 for 64-bit types.

    Values that are not finite in float32 (NaN, infinite, 1e39) become 0, "no data".
    """
    is_long = image.dtype in (torch.int64, torch.float64)
    image = image.double() if is_long else image.float()
    return torch.where(torch.isfinite(image.float()), image, 0.0)


def _coarsen_and_normalize(image: Tensor, levels: int) -> Tensor:
    """Make the input of a stage, (1, 1, h, w), from a raw image, (H, W)."""
    rows = _BAND_ROWS << levels
    bands = [coarsen_image(band[None, None], levels) for band in image.split(rows)]
    coarse = torch.cat(bands, -2) if levels else image[None, None]
    statistics = tissue_statistics(coarse)
    if statistics is None:
        return torch.zeros_like(coarse, dtype=torch.float32)
    bands = [normalize(band, statistics) for band in coarse.split(_BAND_ROWS, -2)]
    return torch.cat(bands, -2)


def _resample_by_bands(field: Tensor, source: Grid, target: Grid) -> Tensor:
    """Do the same as `resample_field`, bit by bit, in bands of rows."""
    if source == target:
        return field
    resampled = field.new_empty(*field.shape[:2], *target.shape)
    for row in range(0, target.rows, _BAND_ROWS):
        num_rows = min(_BAND_ROWS, target.rows - row)
        band = target.crop(row, 0, num_rows, target.cols)
        resampled[..., row : row + num_rows, :] = resample_field(field, source, band)
    return resampled
