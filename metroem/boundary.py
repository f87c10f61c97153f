"""What corgie and code written for the original hand to a module."""

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from metroem.finetuner import plain_batch
from metroem.finetuning import Defects
from metroem.nets.options import AlignerOptions
from metroem.normalize import normalize_given


class Given(NamedTuple):
    """One call of a module, as plain tensors."""

    options: AlignerOptions
    images: list[Tensor]  # src and tgt, (B, 1, H, W) float32
    prior: Tensor | None  # (B, 2, H, W), pixels
    defects: Defects  # of src and tgt, (B, 1, H, W) bool


def read_given(
    options: AlignerOptions,
    images: tuple[Tensor, Tensor],
    prior: Tensor | None,
    given: dict[str, Any],
) -> Given:
    """The arguments of `metroem.aligner.Aligner.forward`, in the forms it works on.

    Args:
        options: the module's own.
        images: src and tgt.
        prior: field, or None.
        given: keyword arguments.
    """
    options = options.updated(given)
    is_default = given.get("finetune_sm") is None and not options.finetune_knots
    if given.get("final_stage") and is_default:
        options = replace(options, finetune_sm=10 * options.finetune_sm)
    plain = [plain_batch(image) for image in images]
    return Given(
        options,
        normalize_given(plain, options.normalize),
        None if prior is None else plain_batch(prior).float(),
        (_mask(given.get("src_defects")), _mask(given.get("tgt_defects"))),
    )


def _mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else plain_batch(mask) != 0
