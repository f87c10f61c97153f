"""Draw the pictures of one pair, small enough to be part of the page.

Pictures are transposed, since rows of an array run along x. So they look as in
neuroglancer.
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
from metroem.evaluation.scores import (
    CHUNK_PX,
    correlation,
    defects_on_tgt,
    valid_overlap,
)
from metroem.geometry.field import jacobian_determinant, warp
from metroem.imaging.masks import dilate
from metroem.io.pictures import color_field, overlay, stretched

PICTURE_PX = 1024  # longest side; larger images are averaged to it
FIELD_PX = 256
THUMB_PX = 96
ARROWS = 24  # along the longest side
WHEEL_PX = 48
# WebP of sections, which compress like noise: at quality 50 a picture of 1024 px takes
# 0.2 MB and is off by 7 of 255 grey levels (FIB-SEM, 2026-11). Method 2 is twice as
# fast as 4.
_QUALITY, _METHOD, _COLOR_QUALITY = 50, 2, 80
# Names and colours of the masks, in the order of their codes from 1. A later mask hides
# an earlier one. Red, green, blue, alpha.
MASKS = {
    "not compared": (110, 125, 150, 110),
    "defect": (255, 165, 0, 70),
    "fold": (255, 0, 80, 255),
}
# So that masks differ without colours, too: defects are striped, folds have a rim. Both
# have codes after those of `MASKS`.
_STRIPE, _RIM = (255, 165, 0, 230), (255, 255, 255, 255)
_STRIPE_PX, _STRIPE_EVERY_PX = 3, 9
_FOLD_DILATION_PX = 1  # a fold of one pixel would be hard to see
# Chunks of a pair that may be among the worst of all pairs.
NUM_CROPS = 12
_CROP_PX = 2 * CHUNK_PX  # a chunk and its surroundings


class Crop(NamedTuple):
    """One of the worst chunks of a pair, small: src red, tgt cyan, after alignment."""

    cpc: float
    x: int  # the middle of the chunk: px of the pair, x to the right
    y: int
    picture: str  # data URI
    # The chunk in the picture: left, top, right, bottom, as fractions of its sides.
    box: tuple[float, float, float, float]


class Drawn(NamedTuple):
    """The pictures of one pair."""

    pictures: dict[str, Any]  # decoded when the pair is opened
    thumb: str  # data URI
    stage_cpc: tuple[float, ...]  # mean CPC after each stage
    crops: tuple[Crop, ...]  # lowest CPC first, at most `NUM_CROPS`


def draw_pair(sample: Sample, fields: list[Tensor]) -> Drawn:
    """Draw one pair.

    Args:
        sample: of batch size 1, its defects known.
        fields: one per stage, (1, 2, H, W) each, px of the sample's mip.

    Returns:
        Pictures as data URIs. Nested lists of `correlation` before and after, NaN in
        chunks that do not count. Arrows: means of the field over squares.
    """
    field = fields[-1]
    zero_field = torch.zeros_like(field)
    overlap, valid = (
        valid_overlap(sample, fs) for fs in ([zero_field], [zero_field, field])
    )
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
        name: _uri(_shrink(grey, factor), _QUALITY) for name, grey in greys.items()
    }
    pictures["factor"] = factor
    pictures["masks"] = _draw_masks(sample, field, valid, factor)
    before = correlation(sample, zero_field, overlap)
    by_stage = [correlation(sample, f, overlap) for f in fields]
    pictures["correlation"] = {
        name: _transpose(cpc[0, 0].numpy()).tolist()
        for name, cpc in (("before", before), ("after", by_stage[-1]))
    }
    both = overlay(warped, tgt)
    thumb = _shrink(both, -(-max(src.shape) // THUMB_PX))
    return Drawn(
        pictures | _draw_field(field),
        _uri(thumb, _COLOR_QUALITY),
        tuple(float(cpc.nanmean()) for cpc in by_stage),
        _draw_crops(both, by_stage[-1][0, 0].numpy()),
    )


def draw_wheel() -> str:
    """Draw the colours of all directions, as a data URI; the middle is 0 px."""
    along = np.linspace(-1, 1, WHEEL_PX, dtype=np.float32)
    field = np.stack(np.meshgrid(along, along))
    colors = color_field(field, 1.0)
    colors[np.hypot(*field) > 1] = 255
    alpha = np.where(np.hypot(*field) > 1, 0, 255).astype(np.uint8)
    return _uri(Image.fromarray(_transpose(np.dstack([colors, alpha]))), None)


def _draw_field(field: Tensor) -> dict[str, Any]:
    """Draw the field as colours, and as one arrow per square."""
    full_px = max(float(np.percentile(field[0].norm(dim=0).numpy(), 99)), 1e-6)
    step = -(-max(field.shape[-2:]) // FIELD_PX)
    colors = color_field(_block_average(field, step), full_px)
    square = -(-max(field.shape[-2:]) // ARROWS)
    arrows = _block_average(field, square)
    return {
        "field": _uri(Image.fromarray(_transpose(colors)), _COLOR_QUALITY),
        "fieldFactor": step,
        "fullPx": full_px,
        # Channel 0 is along cols, which run along the volume's y.
        "arrows": {
            "square": square,
            "x": _transpose(arrows[1]).tolist(),
            "y": _transpose(arrows[0]).tolist(),
        },
    }


def _draw_crops(both: np.ndarray, cpc: np.ndarray) -> tuple[Crop, ...]:
    """Draw the chunks of the lowest correlation, NaN left out.

    Args:
        both: (H, W, 3), src in red and tgt in cyan.
        cpc: (rows, cols) of chunks.
    """
    crops = []
    for at in np.argsort(cpc, axis=None, kind="stable")[:NUM_CROPS]:
        row, col = divmod(int(at), cpc.shape[1])
        if np.isnan(cpc[row, col]):
            break
        starts, sides, box = [], [], []
        for size, index in zip(both.shape, (row, col), strict=False):
            side = min(_CROP_PX, size)
            start = CHUNK_PX * index + (CHUNK_PX - side) // 2
            start = min(max(start, 0), size - side)
            starts.append(start)
            sides.append(side)
            box.append((CHUNK_PX * index - start) / side)
        rows, cols = (slice(s, s + n) for s, n in zip(starts, sides, strict=True))
        ends = (at + CHUNK_PX / n for at, n in zip(box, sides, strict=True))
        crops.append(
            Crop(
                float(cpc[row, col]),
                CHUNK_PX * row + CHUNK_PX // 2,
                CHUNK_PX * col + CHUNK_PX // 2,
                _uri(Image.fromarray(_transpose(both[rows, cols])), _COLOR_QUALITY),
                (*box, *ends),
            )
        )
    return tuple(crops)


def _draw_masks(sample: Sample, field: Tensor, valid: Tensor, factor: int) -> str:
    folds = F.pad(jacobian_determinant(field) <= 0, (1, 1, 1, 1))
    layers = (~valid, defects_on_tgt(sample, field), dilate(folds, _FOLD_DILATION_PX))
    codes = torch.zeros(valid.shape)
    for code, layer in enumerate(layers, start=1):
        codes[layer] = code
    codes = F.max_pool2d(codes, factor, ceil_mode=True)
    is_fold = codes == len(MASKS)
    rim = (dilate(is_fold, 1) & ~is_fold)[0, 0].numpy()
    codes = codes[0, 0].numpy().astype(np.uint8)
    rows, cols = np.indices(codes.shape)
    is_stripe = (rows + cols) % _STRIPE_EVERY_PX < _STRIPE_PX
    is_defect = codes == list(MASKS).index("defect") + 1
    codes[is_defect & is_stripe] = len(MASKS) + 1
    codes[rim] = len(MASKS) + 2
    colors = [(0, 0, 0, 0), *MASKS.values(), _STRIPE, _RIM]
    image = Image.fromarray(_transpose(codes))
    image.putpalette([part for color in colors for part in color[:3]])
    alpha = bytes(color[3] for color in colors)
    return _uri(image, None, transparency=alpha)


def _block_average(field: Tensor, step: int) -> np.ndarray:
    """Average over squares -> (2, ceil(H / step), ceil(W / step))."""
    return F.avg_pool2d(field, step, ceil_mode=True)[0].numpy()


def _shrink(picture: np.ndarray, factor: int) -> Image.Image:
    return Image.fromarray(_transpose(picture)).reduce(factor)


def _transpose(array: np.ndarray) -> np.ndarray:
    """Transpose (H, W, ...) -> (W, H, ...), contiguous, as Pillow needs it."""
    return np.ascontiguousarray(array.swapaxes(0, 1))


def _uri(image: Image.Image, quality: int | None, **png: Any) -> str:
    """Encode as a data URI: WebP if a quality is given, else PNG."""
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, "PNG", optimize=True, **png)
    else:
        image.save(buffer, "WEBP", quality=quality, method=_METHOD)
    kind = "png" if quality is None else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
