"""The natural fields of pairs that are not aligned as they came.

What the network itself finds between the two sections of a pair, before the known
warp, is taken for their natural field, as far as it is smooth. Sections are cut and
dried as smooth sheets, but for tears, while what they show moves by itself from one
to the next: where neurites run obliquely by 1 to 2 px of 10 nm, here this way, there
that way. A network that is told to follow what it followed before never learns to
tell the two apart. Told the smooth part, it does: 1.25 px off between neighbours after
300 steps of 4 samples, 1.94 px without (made tissue, 2026-11).
"""

from collections.abc import Callable

import torch

from metroem.data.sample import Sample
from metroem.field import compose, warp
from metroem.masks import tissue_mask
from metroem.prediction import Prediction
from metroem.smoothing import smoothed
from metroem.specs.augmentations import KnownWarp

Predict = Callable[[Sample, tuple[int, ...]], Prediction]

# What is further than this from being smooth, of the distance of the knots of known
# warps, is torn there, or was not found: it says nothing.
_TORN = 1 / 4


def with_natural_field(
    sample: Sample, predict: Predict, options: KnownWarp | None
) -> Sample:
    """Complete the truth of samples whose pairs are not aligned as they came.

    What is smooth of what the network makes of the pair before the known warp is
    taken for its natural field; 0 is, for samples that show one section twice. A
    network that knows nothing yet would learn its own noise: it has to be trained on
    such samples first.

    The network chooses by what it finds where the truth is known. `truth_due` is what
    would be valid if it had found the prior field (or nothing, where that points out of
    the image), and `truth_lost` what would be true
    then: right for a network that finds nothing, and far from one that points out of
    the image.

    Args:
        sample: with `unwarped_src`, or left as it is.
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
        natural[unknown] = smoothed(found, shown, options.knot_px)
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
