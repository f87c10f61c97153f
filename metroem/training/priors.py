"""Prior fields of samples that no stage has seen: made by the stages before.

The fields that a stage writes are of the pairs as they came. A sample that a known
warp has changed needs one of its own, with the errors that the stages before
really make.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metroem.aligner import Aligner
from metroem.data.sample import Sample
from metroem.field import upsample_field
from metroem.nets.checkpoint import checkpoint_path
from metroem.nets.loading import load_module
from metroem.normalize import coarsen_image, normalize
from metroem.specs.pyramid import ModuleSpec


class StagesBefore:
    """The stages before one, as they are once they have been trained.

    Attributes:
        mip: of the stage whose samples get prior fields.
        aligners: mip and network of each stage before, coarse first. Empty if
            one of them has no weights, for example where fields that were
            downloaded take its place.
    """

    def __init__(
        self,
        mip: int,
        modules: Sequence[ModuleSpec],
        checkpoint_name: str,
        device: torch.device,
    ) -> None:
        """Load them.

        Raises:
            CheckpointError: weights that do not fit.
        """
        self.mip = mip
        self.aligners: list[tuple[int, Aligner]] = []
        for module in modules:
            if not checkpoint_path(module.weights_folder, checkpoint_name).is_file():
                self.aligners = []
                return
            loaded = load_module(
                module.path, checkpoint_name=checkpoint_name, finetune=False
            )
            aligner: Aligner = loaded.aligner.to(device).eval()  # type: ignore
            self.aligners.append((module.in_mip, aligner))

    def with_prior(self, sample: Sample) -> Sample:
        """A sample of a known warp with the prior field that it would have.

        Args:
            sample: left as it is where no stage comes before, or no warp has
                changed it.
        """
        if not self.aligners or sample.truth is None:
            return sample
        field, field_mip = None, self.mip
        with torch.no_grad():
            for mip, aligner in self.aligners:
                src, tgt = (
                    _coarsened(image, mip - self.mip)
                    for image in (sample.src, sample.tgt)
                )
                if field is not None:
                    field = _finer(field, field_mip - mip, src)
                field, field_mip = (
                    aligner.predict(src, tgt, field, levels=()).field,
                    mip,
                )
            assert field is not None
            return sample._replace(
                prior_field=_finer(field, field_mip - self.mip, sample.src)
            )


def _coarsened(images: Tensor, levels: int) -> Tensor:
    """Images as a coarser stage reads them, each normalised by itself."""
    coarse = coarsen_image(images, levels)
    return torch.cat([normalize(image) for image in coarse.split(1)])


def _finer(field: Tensor, levels: int, like: Tensor) -> Tensor:
    rows, cols = like.shape[-2:]
    return upsample_field(field, levels)[..., :rows, :cols].contiguous()
