"""A whole pyramid applied to one pair of images."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metroem.aligner import Aligner
from metroem.errors import PyramidError, UsageError
from metroem.field import move_field
from metroem.grid import Grid
from metroem.nets.loading import load_module
from metroem.normalize import coarsen_image, normalize
from metroem.specs.pyramid import find_modules
from metroem.training.generate import finetune_iterations


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
        full = Grid(mip, 0, 0, *src.shape)
        found, field, grid = [], None, full
        for stage_mip, aligner in zip(self.mips, self.aligners, strict=True):
            at_mip = [
                _image_at(image, stage_mip - mip).to(self.device) for image in images
            ]
            stage_grid = Grid(stage_mip, 0, 0, *at_mip[0].shape[-2:])
            if field is not None:
                field = move_field(field, grid, stage_grid)
            options = replace(aligner.options, finetune=finetune)
            field, grid = (
                aligner.align(at_mip[0], at_mip[1], field, options=options),
                stage_grid,
            )
            found.append(move_field(field, grid, full)[0].cpu().numpy())
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
