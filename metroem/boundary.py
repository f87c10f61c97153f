"""What corgie, code written for the original and people in Python hand over."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metroem.errors import FieldError, UsageError
from metroem.finetuner import plain_batch
from metroem.finetuning import Defects
from metroem.nets.options import AlignerOptions
from metroem.normalize import finite_or_no_data, normalize_given


class Given(NamedTuple):
    """One call of a module, as plain tensors."""

    options: AlignerOptions
    images: list[Tensor]  # src and tgt, (B, 1, H, W) float32
    prior: Tensor | None  # (B, 2, H, W), pixels
    defects: Defects  # of src and tgt, (B, 1, H, W) bool


def read_given(
    options: AlignerOptions,
    images: tuple[Any, Any],
    prior: Any,
    given: dict[str, Any],
) -> Given:
    """The arguments of `metroem.aligner.Aligner.forward`, in the forms it works on.

    Args:
        options: the module's own.
        images: src and tgt.
        prior: field, or None.
        given: keyword arguments.

    Raises:
        UsageError: images, or masks, that are none or differ in shape.
        FieldError: a prior that is no field of the images.
    """
    options = options.updated(given)
    is_default = given.get("finetune_sm") is None and not options.finetune_knots
    if given.get("final_stage") and is_default:
        options = replace(options, finetune_sm=10 * options.finetune_sm)
    src, tgt = (
        read_image(image, name)
        for image, name in zip(images, ("src_img", "tgt_img"), strict=True)
    )
    if src.shape != tgt.shape:
        raise UsageError(
            f"src_img {tuple(src.shape)} and tgt_img {tuple(tgt.shape)}: expected "
            "images of the same shape"
        )
    return Given(
        options,
        normalize_given([src, tgt], options.normalize),
        None if prior is None else _prior(prior, src),
        tuple(  # type: ignore[arg-type]
            _mask(given.get(name), name, src) for name in ("src_defects", "tgt_defects")
        ),
    )


def read_image(image: Any, name: str) -> Tensor:
    """An image as (B, 1, H, W), what is not finite 0 ("no data").

    Args:
        image: (H, W) to (B, 1, H, W), of any kind of numbers and any layout; a tensor,
            an array, or what numpy makes one of.
        name: for messages.

    Raises:
        UsageError: no image.
    """
    if not isinstance(image, Tensor):
        image = torch.from_numpy(as_array(image, name))
    if image.dtype == torch.bool or image.is_complex():
        raise UsageError(_not_grey_levels(name, image.dtype))
    batch = plain_batch(image)
    if batch.ndim != 4 or batch.shape[1] != 1 or 0 in batch.shape:
        raise UsageError(
            f"{name} {tuple(image.shape)}: expected an image of one channel, (H, W) to "
            "(B, 1, H, W), with pixels"
        )
    if batch.dtype in (torch.uint16, torch.uint32, torch.uint64):
        batch = batch.long()  # torch cannot do much with those
    return finite_or_no_data(batch)


def as_array(image: Any, name: str) -> np.ndarray:
    """What somebody takes for an image as an array that torch takes.

    Args:
        image: array, masked array (masked: 0, "no data"), tensor, PIL image, or list;
            any byte order and layout.
        name: for messages.

    Returns:
        Contiguous, writable, in native byte order; uint8, int8, int16, int32 (of
        uint16), int64, float32 or float64.

    Raises:
        UsageError: no grey levels.
    """
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image
    elif isinstance(image, np.ma.MaskedArray):
        image = image.filled(0)
    elif getattr(image, "mode", None) in ("P", "PA"):
        raise UsageError(
            f"{name}: a PIL image of mode {image.mode} holds numbers of colours, not "
            "grey levels; give image.convert('L')"
        )
    try:
        values = np.asarray(image)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: cannot be made an array ({error})") from error
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind not in "uif":
        raise UsageError(_not_grey_levels(name, values.dtype))
    if kind == "f":
        dtype = np.float32 if size <= 4 else np.float64
    elif size == 1:
        dtype = values.dtype
    elif size == 2:
        dtype = np.int32 if kind == "u" else np.int16
    else:
        dtype = np.int64
    return np.require(values, dtype, ["C", "W"])


def _not_grey_levels(name: str, dtype: Any) -> str:
    return (
        f"{name}: is {dtype}, which are no grey levels; expected whole numbers or "
        "floats, 0 = no data"
    )


def _prior(prior: Any, image: Tensor) -> Tensor:
    if not isinstance(prior, Tensor):
        prior = torch.from_numpy(as_array(prior, "src_agg_field")).to(image.device)
    field, (batch, _, *size) = plain_batch(prior).float(), image.shape
    if field.shape != (batch, 2, *size):
        raise FieldError(
            f"src_agg_field {tuple(prior.shape)}: expected the field of images of "
            f"{tuple(image.shape)}, {(batch, 2, *size)}"
        )
    return field


def _mask(mask: Any, name: str, image: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        mask = torch.from_numpy(np.array(mask) != 0).to(image.device)
    marked = plain_batch(mask) != 0
    if marked.ndim != 4 or marked.shape[-2:] != image.shape[-2:]:
        raise UsageError(
            f"{name} {tuple(mask.shape)}: expected a mask of images of "
            f"{tuple(image.shape)}"
        )
    return marked
