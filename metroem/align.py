"""A whole pyramid applied to one pair of images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metroem.aligner import Aligner
from metroem.data.sample import Sample
from metroem.errors import PyramidError, UsageError
from metroem.field import move_field
from metroem.grid import Grid
from metroem.nets.loading import load_module
from metroem.normalize import coarsen_image, normalize
from metroem.specs.pyramid import find_modules
from metroem.training.generate import finetune_iterations


class StageInput(NamedTuple):
    """A pair as one stage reads it."""

    sample: Sample  # of batch size 1, at the stage's mip
    grid: Grid  # where it lies


@dataclass(frozen=True)
class Pyramid:
    """The modules of a pyramid, loaded.

    Attributes:
        mips: mip of each stage's images, coarse first.
        aligners: the stages.
        device: where they run.
    """

    mips: tuple[int, ...]
    aligners: tuple[Aligner, ...]
    device: torch.device

    @classmethod
    def load(
        cls,
        path: str | Path,
        checkpoint_name: str = "checkpoint",
        device: str | torch.device = "cpu",
    ) -> "Pyramid":
        """Load every module of a pyramid.

        Raises:
            PyramidError: a directory that is no pyramid, or a broken module.
            CheckpointError: weights that do not fit.
        """
        modules = find_modules(Path(path))
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

    def align(
        self, src: np.ndarray, tgt: np.ndarray, mip: int = 0, finetune: bool = True
    ) -> np.ndarray:
        """The field that warps src onto tgt.

        Args:
            src: (H, W) raw grey levels of any dtype at `mip`, 0 = no data.
            tgt: (H, W), likewise.
            mip: of the images.
            finetune: let each stage improve its field on the pair itself.

        Returns:
            (2, H, W) float32, pull, pixels of `mip`, channel 0 along cols.

        Raises:
            UsageError: images that are not 2-d or differ in shape.
            PyramidError: a stage that needs a finer mip than `mip`.
        """
        return self.fields(src, tgt, mip, finetune)[-1]

    def fields(
        self, src: np.ndarray, tgt: np.ndarray, mip: int = 0, finetune: bool = True
    ) -> list[np.ndarray]:
        """What each stage makes of a pair; arguments and errors as `align`.

        Returns:
            One (2, H, W) float32 field a stage, pixels of `mip`; the last is
            the field of the pyramid.
        """
        self._check(src, tgt, mip)
        images = [
            torch.as_tensor(np.ascontiguousarray(image), dtype=torch.float32)
            for image in (src, tgt)
        ]
        inputs = []
        for stage_mip in self.mips:
            at_mip = [_image_at(image, stage_mip - mip) for image in images]
            grid = Grid(stage_mip, 0, 0, *at_mip[0].shape[-2:])
            inputs.append(StageInput(Sample(at_mip[0], at_mip[1], None, ()), grid))
        full = Grid(mip, 0, 0, *src.shape)
        return [
            move_field(field, stage.grid, full)[0].cpu().numpy()
            for field, stage in zip(self.run(inputs, finetune), inputs, strict=True)
        ]

    def run(self, inputs: Sequence[StageInput], finetune: bool = True) -> list[Tensor]:
        """What each stage makes of a pair whose mips lie where they lie.

        Args:
            inputs: the pair as each stage reads it; prior fields are not read.
            finetune: let each stage improve its field on the pair itself.

        Returns:
            One field a stage, (1, 2, H, W), on the grid and in the pixels of its
            own input, on the pyramid's device.
        """
        found: list[Tensor] = []
        for stage, (aligner, (sample, grid)) in enumerate(
            zip(self.aligners, inputs, strict=True)
        ):
            prior = None
            if found:
                prior = move_field(found[-1], inputs[stage - 1].grid, grid)
            sample = sample.to(self.device)
            found.append(
                aligner.align(
                    sample.src,
                    sample.tgt,
                    prior,
                    options=replace(aligner.options, finetune=finetune),
                    defects=(sample.src_defects, sample.tgt_defects),
                )
            )
        return found

    def _check(self, src: np.ndarray, tgt: np.ndarray, mip: int) -> None:
        if src.ndim != 2 or src.shape != tgt.shape:
            raise UsageError(
                f"src {src.shape} and tgt {tgt.shape}: expected two images [rows, "
                "cols] of the same shape"
            )
        if mip > self.mips[-1]:
            raise PyramidError(
                f"the images are at mip {mip}, but the stages read mips "
                f"{list(self.mips)}: images at mip {self.mips[-1]} or finer are needed"
            )


def _image_at(image: Tensor, levels: int) -> Tensor:
    """A raw image (H, W) as a stage reads it: coarsened, then normalised."""
    return normalize(coarsen_image(image[None, None], levels))
