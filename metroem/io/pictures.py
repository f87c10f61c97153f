"""Draw pictures of a pair and its field."""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image

from metroem.errors import FieldError
from metroem.io.files import atomic_write, make_folder

GAP_PX = 8
_WHEEL = np.array([colorsys.hsv_to_rgb(hue / 360, 1.0, 1.0) for hue in range(360)])


def save_pair_picture(
    path: Path,
    src: np.ndarray,
    warped_src: np.ndarray,
    tgt: np.ndarray,
    field: np.ndarray,
    *,
    full_scale_px: float | None = None,
) -> None:
    """Save one picture: the pair before alignment, after it, and the field.

    The overlays show src in red and tgt in cyan, so that aligned tissue is grey. In the
    picture of the field, hue is direction and saturation is length. All parts are
    transposed (rows of an array run along x), so that they look as in neuroglancer.

    Args:
        path: PNG file to write; its folder is made.
        src: (H, W), grey levels, 0 = no data.
        warped_src: (H, W), src warped by the field.
        tgt: (H, W).
        field: (2, H, W), px, channel 0 along cols, channel 1 along rows.
        full_scale_px: length drawn in full colour; the field's longest if None.

    Raises:
        FieldError: the shapes do not belong together.
    """
    shapes = [array.shape for array in (src, warped_src, tgt, field[0])]
    if field.ndim != 3 or field.shape[0] != 2 or len(set(shapes)) > 1:
        raise FieldError(
            f"a picture takes images (H, W) and a field (2, H, W), got {shapes} "
            f"and {field.shape}"
        )
    panels = [
        overlay(src, tgt),
        overlay(warped_src, tgt),
        color_field(field, full_scale_px),
    ]
    gap = np.full((GAP_PX, panels[0].shape[1], 3), 255, np.uint8)
    upright = np.concatenate([panels[0], gap, panels[1], gap, panels[2]])
    make_folder(path.parent)
    with atomic_write(path) as partial:
        kind = Image.registered_extensions()[path.suffix.lower()]
        Image.fromarray(upright.transpose(1, 0, 2).copy()).save(partial, kind)


def overlay(src: np.ndarray, tgt: np.ndarray) -> np.ndarray:
    """Overlay src in red and tgt in cyan, each stretched: (H, W, 3) uint8."""
    red, cyan = stretched(src), stretched(tgt)
    return np.stack([red, cyan, cyan], axis=-1)


def color_field(field: np.ndarray, full_scale_px: float | None = None) -> np.ndarray:
    """Colour a field: hue shows the direction, saturation the length.

    Args:
        field: (2, H, W), px.
        full_scale_px: length drawn in full colour; the longest if None.

    Returns:
        (H, W, 3) uint8; white where the field is 0.
    """
    length = np.hypot(field[0], field[1])
    full = full_scale_px or max(float(length.max()), 1e-6)
    hue = np.degrees(np.arctan2(field[1], field[0])).astype(int) % 360
    strength = np.clip(length / full, 0, 1)[..., None]
    color = 1 + strength * (_WHEEL[hue] - 1)
    return np.round(255 * color).astype(np.uint8)


def stretched(image: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """Stretch grey levels for a screen: tissue to 1..255; 0 stays 0.

    Args:
        image: (H, W), grey levels, 0 = no data.
        like: image whose tissue sets the range, from its 1st to its 99th percentile,
            so that two pictures can be compared; `image` itself if None.

    Returns:
        (H, W) uint8.
    """
    image = np.asarray(image, np.float32)
    reference = image if like is None else np.asarray(like, np.float32)
    tissue = reference[reference != 0]
    if not tissue.size:
        return np.zeros(image.shape, np.uint8)
    low, high = np.percentile(tissue, [1, 99])
    grey = 1 + 254 * np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return np.where(image != 0, np.round(grey), 0).astype(np.uint8)
