"""Warp, compose, invert and resample displacement fields.

A field is (B, 2, H, W), pull, pixels of its own mip: channel 0 is the
displacement along cols (W), channel 1 along rows (H). With w for warp:

    w(image, d)(p)        = image(p + d(p))
    compose(f, g)(p)      = f(p) + g(p + f(p))
    w(image, compose(f, g)) = w(w(image, g), f)

Outside its grid a field repeats its border, and an image is 0 ("no data"). Coordinates
are those of pixel centres (torch: align_corners=False).
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from metroem.errors import FieldError
from metroem.geometry.grid import Grid

# Distance from the centre in units of half an image: more than a pixel outside any
# image.
_OUTSIDE = 4.0

# An inverse field is found when a further iteration moves no pixel by more, px.
_INVERTED_PX = 1e-3


def check_field(field: Tensor) -> None:
    """Raise FieldError unless `field` is a (B, 2, H, W) floating tensor."""
    if field.ndim != 4 or field.shape[1] != 2 or not field.is_floating_point():
        raise FieldError(
            f"a field is a floating (B, 2, H, W) tensor, got {field.dtype} "
            f"{tuple(field.shape)}"
        )


def warp(
    image: Tensor, field: Tensor, *, padding: str = "zeros", mode: str = "bilinear"
) -> Tensor:
    """Pull an image (or any map) through a field.

    Args:
        image: (B, C, H, W), any floating dtype; B may be 1 for all.
        field: (B, 2, H, W), pixels of the image.
        padding: values outside the image: "zeros" or "border".
        mode: "bilinear", or "bicubic", which blurs less and may overshoot.

    Returns:
        (B, C, H, W) in the dtype of `image`: image(p + field(p)).

    Raises:
        FieldError: `field` is not a field, or its (H, W) is not the image's.

    Source: the sampler of Jaderberg et al. 2015 (arXiv:1506.02025).
    """
    check_field(field)
    if image.shape[-2:] != field.shape[-2:]:
        raise FieldError(
            f"image of {tuple(image.shape[-2:])} and field of "
            f"{tuple(field.shape[-2:])} px differ in size"
        )
    positions = pixel_positions(field) + field
    return sample(image, field, positions, padding=padding, mode=mode)


def sample(
    image: Tensor,
    like: Tensor,
    positions: Tensor,
    *,
    padding: str = "zeros",
    mode: str = "bilinear",
) -> Tensor:
    """Read a map at positions in its own pixels.

    Args:
        image: (B, C, H, W) floating; B may be 1 for all.
        like: tensor with the batch size of the result.
        positions: (B, 2, h, w), channel 0 col, channel 1 row; B may be 1.
        padding: "zeros" or "border".
        mode: "bilinear" or "bicubic".

    Returns:
        (B, C, h, w) in the dtype of `image`.
    """
    rows, cols = image.shape[-2:]
    # float32 throughout: in bf16 a position beyond 256 px is off by a pixel. The tensor
    # is filled on its device: one of Python's numbers would make the host wait for a
    # GPU.
    size = torch.full((2,), float(cols), dtype=torch.float32, device=image.device)
    size[1].fill_(rows)
    grid = (2 * positions.float().permute(0, 2, 3, 1) + 1) / size - 1
    # Positions far outside all read the same. They are clamped, because torch 2.13 on a
    # CPU crashes in the backward pass if positions are not finite or overflow an int.
    grid = grid.nan_to_num(nan=_OUTSIDE).clamp(-_OUTSIDE, _OUTSIDE)
    batch = like.shape[0]
    sampled = F.grid_sample(
        image.float().expand(batch, -1, -1, -1),
        grid.expand(batch, -1, -1, -1),
        mode=mode,
        padding_mode=padding,
        align_corners=False,
    )
    return sampled.to(image.dtype)


def pixel_positions(field: Tensor) -> Tensor:
    """Make (1, 2, H, W) float32: col and row of each pixel of a (B, C, H, W) map."""
    rows, cols = field.shape[-2:]
    row, col = torch.meshgrid(
        torch.arange(rows, device=field.device, dtype=torch.float32),
        torch.arange(cols, device=field.device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.stack([col, row])[None]


def compose(f: Tensor, g: Tensor) -> Tensor:
    """Compose fields, to warp by `g` first, then by `f`: f(p) + g(p + f(p)).

    Args:
        f: (B, 2, H, W), pixels.
        g: (B, 2, H, W), pixels of the same mip.

    Returns:
        (B, 2, H, W).

    Raises:
        FieldError: one of them is not a field, or their sizes differ.
    """
    check_field(g)
    return f + warp(g, f, padding="border")


def invert(field: Tensor, *, iterations: int = 30) -> Tensor:
    """Find the field h with compose(h, field) = 0, by fixed-point iteration.

    Converges where the field's derivatives stay below 1 in absolute value (smooth
    fields without folds). Each iteration then multiplies the error by that value.

    Args:
        field: (B, 2, H, W), pixels.
        iterations: steps of h <- -field(p + h).

    Returns:
        (B, 2, H, W): h, with field(p + h(p)) = -h(p).

    Source: Chen et al. 2008, doi:10.1118/1.2816107.
    """
    inverse = -field
    moves = field.new_ones(len(field), 1, 1, 1, dtype=torch.bool)
    for _ in range(iterations):
        following = -warp(field, inverse, padding="border")
        apart = (following - inverse).abs().amax((1, 2, 3), keepdim=True)
        # Each sample stops by itself, so that it does not depend on its batch.
        inverse = torch.where(moves, following, inverse)
        moves = moves & (apart > _INVERTED_PX)
        if not bool(moves.any()):
            break
    return inverse


def upsample_field(field: Tensor, levels: int) -> Tensor:
    """Resample a field to a finer mip, keeping the physical displacement.

    Each level doubles the grid and doubles every vector: the same physical
    displacement spans twice as many of the finer pixels.

    Args:
        field: (B, 2, H, W), pixels of its own mip; finite everywhere.
        levels: how many mips finer, >= 0.

    Returns:
        (B, 2, H * 2**levels, W * 2**levels), pixels of the finer mip; `field`
        itself when `levels` is 0.

    Raises:
        FieldError: `field` is not a field, or `levels` is negative.

    Source: pixel-centre grid of Jaderberg et al. 2015 (arXiv:1506.02025), in torch
    align_corners=False.
    """
    check_field(field)
    if levels < 0:
        raise FieldError(f"cannot upsample by {levels} levels")
    if levels == 0:
        return field
    scale = 2**levels
    return scale * F.interpolate(
        field, scale_factor=scale, mode="bilinear", align_corners=False
    )


def downsample_field(field: Tensor, levels: int) -> Tensor:
    """Average a field to a coarser mip, keeping the physical displacement.

    Args:
        field: (B, 2, H, W), pixels of its own mip; finite everywhere.
        levels: how many mips coarser, >= 0; at odd borders, existing pixels are
            averaged.

    Returns:
        (B, 2, ceil(H / 2**levels), ceil(W / 2**levels)), pixels of that mip.

    Raises:
        FieldError: `field` is not a field, or `levels` is negative.
    """
    check_field(field)
    if levels < 0:
        raise FieldError(f"cannot downsample by {levels} levels")
    for _ in range(levels):
        field = F.avg_pool2d(field, 2, ceil_mode=True, count_include_pad=False) / 2
    return field


def resample_field(field: Tensor, source: Grid, target: Grid) -> Tensor:
    """Resample a field to another grid: other mip, corner or size.

    Both grids state their location in the volume. Where `target` reaches beyond
    `source`, the field repeats its border.

    Args:
        field: (B, 2, H, W), pixels of source.mip; finite everywhere.
        source: grid of `field`.
        target: grid of the result.

    Returns:
        (B, 2, target.rows, target.cols), pixels of target.mip.

    Raises:
        FieldError: `field` does not have the shape of `source`.
    """
    check_field(field)
    if tuple(field.shape[-2:]) != source.shape:
        raise FieldError(
            f"field of {tuple(field.shape[-2:])} px, its grid says {source.shape}"
        )
    if source == target:
        return field
    if target.mip > source.mip:
        levels = target.mip - source.mip
        field = downsample_field(field, levels)
        source = Grid(target.mip, source.x, source.y, *field.shape[-2:])
    scale = 2.0 ** (source.mip - target.mip)
    corner = torch.tensor(
        [target.y - source.y, target.x - source.x], device=field.device
    )
    pixels = pixel_positions(field.new_empty(1, 1, *target.shape))
    mip0 = (pixels + 0.5) * 2**target.mip + corner.view(1, 2, 1, 1)
    positions = mip0 / 2**source.mip - 0.5
    return scale * sample(field, field, positions, padding="border")


def fill_not_finite(field: Tensor) -> Tensor:
    """Replace the NaN and infinite vectors of a field by the nearest finite ones.

    Args:
        field: (B, 2, H, W).

    Returns:
        (B, 2, H, W), all 0 for a sample without finite vectors.
    """
    broken = ~torch.isfinite(field).all(1)
    if not bool(broken.any()):
        return field
    filled = torch.zeros_like(field)
    for index in (~broken).flatten(1).any(1).nonzero().flatten().tolist():
        nearest = ndimage.distance_transform_edt(
            broken[index].cpu().numpy(), return_distances=False, return_indices=True
        )
        rows, cols = torch.from_numpy(np.asarray(nearest, np.int64)).to(field.device)
        filled[index] = field[index][:, rows, cols]
    return filled


def jacobian_determinant(field: Tensor) -> Tensor:
    """Compute the determinant of d(p + field(p)) / dp by central differences.

    Args:
        field: (B, 2, H, W), pixels; H and W >= 3.

    Returns:
        (B, 1, H - 2, W - 2); 1 where nothing is stretched, <= 0 at a fold.
    """
    check_field(field)
    along_cols = (field[..., 1:-1, 2:] - field[..., 1:-1, :-2]) / 2
    along_rows = (field[..., 2:, 1:-1] - field[..., :-2, 1:-1]) / 2
    determinant = (1 + along_cols[:, 0]) * (1 + along_rows[:, 1]) - (
        along_cols[:, 1] * along_rows[:, 0]
    )
    return determinant[:, None]
