"""Complete a warped sample: make its prior field and its ground truth.

Prior fields. The fields that a stage writes belong to the pairs before any known warp.
A warped sample needs a prior field of its own, with the errors that the earlier stages
really make. `EarlierStages` makes it with their networks.

Pseudo-labels. The natural field of a pair leads from tgt to src before the known warp.
Often it is unknown. Then the smooth part of the network's own field is used for it, in
the mean of both directions:

    there = smooth(network(src, tgt))     both before the warp
    back = smooth(network(tgt, src))
    natural = (there + invert(back)) / 2
    truth = compose(natural, truth of the known warp)

With labels from one direction a network drifts: nothing holds an error that it makes
alike in both. It cancels in the mean. A training that begins from weights takes the
network as it was at the start (`metroem.training.model`).

The network sees the pair before any change of noise, contrast or damage, mirrored or
turned at random, and its field is turned back. A network's errors differ between
orientations, so what it learns in the end is their mean over all of them.

Sections are deformed smoothly, except at tears. But the structures in them also move
from one section to the next: where neurites run obliquely, by 1 to 2 px of 10 nm, in
directions that change from location to location. A network whose label is its own
whole field never learns to ignore that motion. With the smooth part as its label it
does: after 300 steps of 4 samples its error between neighbours is 1.25 px, otherwise
1.94 px (synthetic tissue, 2026-11).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metroem.aligner import Aligner
from metroem.data.augment import flip, transpose
from metroem.data.sample import Sample
from metroem.geometry.field import compose, invert, upsample_field, warp
from metroem.geometry.regularize import smooth_field
from metroem.imaging.masks import tissue_mask
from metroem.imaging.normalize import coarsen_image, normalize
from metroem.models.load import load_module
from metroem.models.types import Prediction
from metroem.models.weights import checkpoint_path
from metroem.specs.augmentations import KnownWarp
from metroem.specs.modules import ModuleSpec

Predict = Callable[[Sample, tuple[int, ...]], Prediction]

NUM_ORIENTATIONS = 8

# A fraction of `KnownWarp.knot_px`. A pixel whose field differs from the smooth part by
# more is torn or wrong, and has no label.
_TORN = 1 / 4


class EarlierStages:
    """Makes prior fields with the trained networks of the earlier stages.

    Attributes:
        mip: of the stage whose samples get prior fields.
        aligners: mip and network of each earlier stage, coarse first. Empty if one of
            them has no weights, for example because downloaded fields replace it.
        labeller: the network that makes pseudo-labels; None: the trained one does.
    """

    def __init__(
        self,
        mip: int,
        modules: Sequence[ModuleSpec],
        checkpoint_name: str,
        device: torch.device,
        labeller: Predict | None = None,
    ) -> None:
        """Load the networks.

        Args:
            mip: of the stage whose samples get prior fields.
            modules: the earlier stages.
            checkpoint_name: of their weights.
            device: of the samples.
            labeller: see the attribute.

        Raises:
            CheckpointError: weights do not fit their network.
        """
        self.mip = mip
        self.labeller = labeller
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
        """Replace the prior field of a warped sample by the earlier stages' field.

        Args:
            sample: returned unchanged if it has no truth, since then no known warp
                has changed it; also if `aligners` is empty.
        """
        if not self.aligners or sample.truth is None:
            return sample
        field, field_mip = None, self.mip
        with torch.no_grad():
            for mip, aligner in self.aligners:
                src, tgt = (
                    _coarsen(image, mip - self.mip)
                    for image in (sample.src, sample.tgt)
                )
                if field is not None:
                    field = _upsample(field, field_mip - mip, src)
                field = aligner.predict(src, tgt, field, levels=()).field
                field_mip = mip
            assert field is not None
            return sample._replace(
                prior_field=_upsample(field, field_mip - self.mip, sample.src)
            )


def _coarsen(images: Tensor, levels: int) -> Tensor:
    """Downsample images to a coarser stage, and normalise each of them again."""
    coarse = coarsen_image(images, levels)
    return torch.cat([normalize(image) for image in coarse.split(1)])


def _upsample(field: Tensor, levels: int, like: Tensor) -> Tensor:
    """Upsample a field, and crop it to the size of a map."""
    rows, cols = like.shape[-2:]
    return upsample_field(field, levels)[..., :rows, :cols].contiguous()


def _predict_turned(sample: Sample, predict: Predict, orientation: int) -> Tensor:
    """Predict the field of a sample in another orientation, and turn it back."""
    if orientation & 1:
        sample = flip(sample, -2)
    if orientation & 2:
        sample = flip(sample, -1)
    if orientation & 4:
        sample = transpose(sample)
    # As a prior field it turns with its pair.
    turned = sample._replace(prior_field=predict(sample, ()).field)
    if orientation & 4:
        turned = transpose(turned)
    if orientation & 2:
        turned = flip(turned, -1)
    if orientation & 1:
        turned = flip(turned, -2)
    assert turned.prior_field is not None
    return turned.prior_field


def add_pseudo_label(
    sample: Sample,
    predict: Predict,
    options: KnownWarp | None,
    orientation: int = 0,
) -> Sample:
    """Complete the ground truth of samples whose true field is unknown.

    The natural field of a pair is the smooth part of the network's field before the
    known warp, in the mean of both directions. For samples that show one section twice
    it is 0. Train a new network on such samples first: otherwise it learns its own
    noise.

    The network's field decides where the truth is known. A score must not depend on
    that, so two more maps are set. `scored` is where the truth would be known if the
    natural field were the prior field. `fallback_truth` is the truth in that case.
    If the prior field brings no tissue of src onto tissue of tgt, 0 replaces it.

    Args:
        sample: returned unchanged if it has no `unwarped_src`.
        predict: the network; its gradients are not recorded.
        options: of the known warps; their `knot_px` sets the smoothing.
        orientation: in which the network sees the pair, 0 to 7: 1 mirrors rows, 2
            cols, 4 swaps rows and cols, and their sums do several.
    """
    src, tgt, prior = sample.unwarped_src, sample.unwarped_tgt, sample.unwarped_prior
    if src is None:
        return sample
    truth, valid = sample.truth, sample.truth_valid
    assert tgt is not None and truth is not None
    assert valid is not None and options is not None
    sample = sample._replace(unwarped_src=None, unwarped_tgt=None, unwarped_prior=None)
    # Samples whose natural field is unknown; the others have a blank `unwarped_src`.
    unknown = tissue_mask(src).flatten(1).any(1).nonzero()[:, 0]
    if not len(unknown):
        return sample
    if prior is not None:
        prior = prior[unknown]
    before = Sample(src[unknown], tgt[unknown], prior, sample.pair)
    natural, torn = torch.zeros_like(truth), torch.zeros_like(valid)
    fallback = torch.zeros_like(truth)
    with torch.no_grad():
        both = Sample(
            torch.cat((before.src, before.tgt)),
            torch.cat((before.tgt, before.src)),
            None if prior is None else torch.cat((prior, invert(prior))),
            sample.pair,
        )
        fields = _predict_turned(both, predict, orientation)
        shown = warp(tissue_mask(both.src).float(), fields) * tissue_mask(both.tgt)
        there, back = smooth_field(fields, shown, options.knot_px).chunk(2)
        natural[unknown] = (there + invert(back)) / 2
        field = fields[: len(there)]
        deviation = (field - natural[unknown]).norm(dim=1, keepdim=True)
        torn[unknown] = deviation > _TORN * options.knot_px
        if prior is not None:
            shown = warp(tissue_mask(before.src).float(), prior) > 0.999
            shows = (shown & tissue_mask(before.tgt)).flatten(1).any(1)
            fallback[unknown] = torch.where(shows.view(-1, 1, 1, 1), prior, 0.0)
    return sample._replace(
        truth=compose(natural, truth),
        truth_valid=(warp(valid.float(), natural) > 0.999) & ~torn,
        scored=warp(valid.float(), fallback) > 0.999,
        fallback_truth=compose(fallback, truth),
    )
