"""What the page shows of one pair, small enough to be part of the page.

Everything is upright: transposed (rows of an array run along x), so that it looks as
in neuroglancer.
"""

import base64
import io
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from metroem.data.sample import Sample
from metroem.evaluation.scores import correlation, defects_on_tgt, valid_overlap
from metroem.geometry.field import jacobian_determinant, warp
from metroem.imaging.masks import dilate
from metroem.io.pictures import color_field, overlay, stretched

PICTURE_PX = 1024  # longest side; larger images are averaged to it
FIELD_PX = 256
THUMB_PX = 96
ARROWS = 24  # along the longest side
WHEEL_PX = 48
# Of sections, which are noise to a codec: at 50 a picture of 1024 px takes 0.2 MB and
# is off by 7 of 255 grey levels (FIB-SEM, 2026-11), and method 2 is twice as fast as 4.
_QUALITY, _METHOD, _COLOR_QUALITY = 50, 2, 80
# What the masks hold, in the order of their codes from 1 on; a later one hides an
# earlier one. Red, green, blue, alpha.
MASKS = {
    "not compared": (110, 125, 150, 110),
    "defect": (255, 165, 0, 130),
    "fold": (255, 0, 80, 255),
}
_FOLD_GROWN_PX = 1  # else one of a pixel is not seen


class Drawn(NamedTuple):
    """One pair for the page."""

    pictures: dict[str, Any]  # to be decoded when the pair is looked at
    thumb: str  # data URI
    stage_cpc: tuple[float, ...]  # mean CPC after each stage


def draw_pair(sample: Sample, fields: list[Tensor]) -> Drawn:
    """Draw one pair.

    Args:
        sample: of batch size 1, its defects known.
        fields: one a stage, (1, 2, H, W) each, px of the sample's mip.

    Returns:
        Pictures as data URIs; `correlation` before and after as nested lists, NaN in
        chunks that do not count; arrows as means of the field over squares.
    """
    field = fields[-1]
    none = torch.zeros_like(field)
    due, valid = (valid_overlap(sample, fs) for fs in ([none], [none, field]))
    src, tgt, warped = (
        image[0, 0].numpy()
        for image in (sample.src, sample.tgt, warp(sample.src, field))
    )
    factor = -(-max(src.shape) // PICTURE_PX)
    greys = {
        "before": stretched(src),
        "after": stretched(warped, like=src),
        "tgt": stretched(tgt),
    }
    pictures: dict[str, Any] = {
        name: _uri(_reduced(grey, factor), _QUALITY) for name, grey in greys.items()
    }
    pictures["factor"] = factor
    pictures["masks"] = _draw_masks(sample, field, valid, factor)
    pictures["correlation"] = {
        name: _upright(correlation(sample, f, due)[0, 0].numpy()).tolist()
        for name, f in (("before", none), ("after", field))
    }
    thumb = _reduced(overlay(warped, tgt), -(-max(src.shape) // THUMB_PX))
    of_stages = (correlation(sample, f, due) for f in fields)
    return Drawn(
        pictures | _draw_field(field),
        _uri(thumb, _COLOR_QUALITY),
        tuple(float(values.nanmean()) for values in of_stages),
    )


def draw_wheel() -> str:
    """The colours of all directions, a data URI: the middle is no displacement."""
    along = np.linspace(-1, 1, WHEEL_PX, dtype=np.float32)
    field = np.stack(np.meshgrid(along, along))
    colors = color_field(field, 1.0)
    colors[np.hypot(*field) > 1] = 255
    alpha = np.where(np.hypot(*field) > 1, 0, 255).astype(np.uint8)
    return _uri(Image.fromarray(_upright(np.dstack([colors, alpha]))), None)


def _draw_field(field: Tensor) -> dict[str, Any]:
    """The field as colours, and as one arrow a square."""
    full_px = max(float(np.percentile(field[0].norm(dim=0).numpy(), 99)), 1e-6)
    step = -(-max(field.shape[-2:]) // FIELD_PX)
    colors = color_field(_pooled(field, step), full_px)
    square = -(-max(field.shape[-2:]) // ARROWS)
    arrows = _pooled(field, square)
    return {
        "field": _uri(Image.fromarray(_upright(colors)), _COLOR_QUALITY),
        "fieldFactor": step,
        "fullPx": full_px,
        # Channel 0 is along cols, which run along the volume's y.
        "arrows": {
            "square": square,
            "x": _upright(arrows[1]).tolist(),
            "y": _upright(arrows[0]).tolist(),
        },
    }


def _draw_masks(sample: Sample, field: Tensor, valid: Tensor, factor: int) -> str:
    folds = F.pad(jacobian_determinant(field) <= 0, (1, 1, 1, 1))
    layers = (~valid, defects_on_tgt(sample, field), dilate(folds, _FOLD_GROWN_PX))
    codes = torch.zeros(valid.shape)
    for code, layer in enumerate(layers, start=1):
        codes[layer] = code
    codes = F.max_pool2d(codes, factor, ceil_mode=True)[0, 0].numpy().astype(np.uint8)
    image = Image.fromarray(_upright(codes))
    image.putpalette(
        [0, 0, 0, *(part for color in MASKS.values() for part in color[:3])]
    )
    alpha = bytes([0, *(color[3] for color in MASKS.values())])
    return _uri(image, None, transparency=alpha)


def _pooled(field: Tensor, step: int) -> np.ndarray:
    """(2, ceil(H / step), ceil(W / step)), means over squares."""
    return F.avg_pool2d(field, step, ceil_mode=True)[0].numpy()


def _reduced(picture: np.ndarray, factor: int) -> Image.Image:
    return Image.fromarray(_upright(picture)).reduce(factor)


def _upright(array: np.ndarray) -> np.ndarray:
    """(H, W, ...) -> (W, H, ...), contiguous as Pillow wants it."""
    return np.ascontiguousarray(array.swapaxes(0, 1))


def _uri(image: Image.Image, quality: int | None, **png: Any) -> str:
    """A data URI: WebP at a quality, PNG without one."""
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, "PNG", optimize=True, **png)
    else:
        image.save(buffer, "WEBP", quality=quality, method=_METHOD)
    kind = "png" if quality is None else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
