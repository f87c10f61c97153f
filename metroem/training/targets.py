"""Give a sample what it is trained towards: its prior field and its ground truth.

Prior fields. The fields that a stage writes are of the pairs as they came. A sample
that a known warp has changed needs a prior field of its own, with the errors that the
earlier stages really make. `EarlierStages` makes it with their networks.

Pseudo-labels. The natural field of a pair, between its two sections before the known
warp, is unknown. The smooth part of the network's own field is used for it. Sections
are cut and dried as smooth sheets, except at tears. But what they show moves by itself
from one section to the next: where neurites run obliquely, by 1 to 2 px of 10 nm, in
directions that change from place to place. A network that is told to follow what it
followed before never learns to tell the two apart. With the smooth part as its label
it does: 1.25 px off between neighbours after 300 steps of 4 samples, 1.94 px without
(made tissue, 2026-11).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metroem.aligner import Aligner
from metroem.data.sample import Sample
from metroem.geometry.field import compose, upsample_field, warp
from metroem.geometry.regularize import smooth_field
from metroem.imaging.masks import tissue_mask
from metroem.imaging.normalize import coarsen_image, normalize
from metroem.models.load import load_module
from metroem.models.types import Prediction
from metroem.models.weights import checkpoint_path
from metroem.specs.augmentations import KnownWarp
from metroem.specs.modules import ModuleSpec

Predict = Callable[[Sample, tuple[int, ...]], Prediction]

# A pixel whose field is further than this from its smooth part is torn or was not
# found, and teaches nothing; as a fraction of the spacing of the knots of known warps.
_TORN = 1 / 4


class EarlierStages:
    """The trained networks of the stages before one.

    Attributes:
        mip: of the stage whose samples get prior fields.
        aligners: mip and network of each earlier stage, coarse first. Empty if
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

    def add_prior(self, sample: Sample) -> Sample:
        """Give a sample of a known warp the prior field that it would have.

        Args:
            sample: returned as it is where there is no earlier stage, or no warp has
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


def add_pseudo_label(
    sample: Sample, predict: Predict, options: KnownWarp | None
) -> Sample:
    """Complete the ground truth of samples whose true field is unknown.

    The smooth part of the network's field before the known warp is taken for the
    natural field of the pair; samples that show one section twice have none. A network
    that knows nothing yet would learn its own noise: it has to be trained on samples
    of the second kind first.

    What the network finds decides where the truth is known. So `truth_due` is where it
    would be known had the network found the prior field (or nothing, where that
    points out of the image), and `truth_lost` is the truth in that case: right for a
    network that finds nothing, and far from a field that points out of the image.

    Args:
        sample: with `unwarped_src`; without it, it is returned as it is.
        predict: the network; its gradients are not recorded.
        options: of the known warps; natural fields bend as little as these.
    """
    src, prior = sample.unwarped_src, sample.unwarped_prior
    if src is None:
        return sample
    truth, valid = sample.truth, sample.truth_valid
    assert truth is not None and valid is not None and options is not None
    sample = sample._replace(unwarped_src=None, unwarped_prior=None)
    unknown = tissue_mask(src).flatten(1).any(1).nonzero()[:, 0]
    if not len(unknown):
        return sample
    if prior is not None:
        prior = prior[unknown]
    before = Sample(src[unknown], sample.tgt[unknown], prior, sample.pair)
    natural, torn = torch.zeros_like(truth), torch.zeros_like(valid)
    known = torch.zeros_like(truth)
    with torch.no_grad():
        found = predict(before, ()).field
        shown = warp(tissue_mask(before.src).float(), found)
        shown = shown * tissue_mask(before.tgt)
        natural[unknown] = smooth_field(found, shown, options.knot_px)
        off = (found - natural[unknown]).norm(dim=1, keepdim=True)
        torn[unknown] = off > _TORN * options.knot_px
        if prior is not None:
            shown = warp(tissue_mask(before.src).float(), prior) > 0.999
            shows = (shown & tissue_mask(before.tgt)).flatten(1).any(1)
            known[unknown] = torch.where(shows.view(-1, 1, 1, 1), prior, 0.0)
    return sample._replace(
        truth=compose(natural, truth),
        truth_valid=(warp(valid.float(), natural) > 0.999) & ~torn,
        truth_due=warp(valid.float(), known) > 0.999,
        truth_lost=compose(known, truth),
    )
