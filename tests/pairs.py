"""Small image sets and pyramids that tests make."""

from pathlib import Path

import torch
import torch.nn.functional as F

from metroem.geometry.field import warp
from metroem.geometry.grid import Grid
from metroem.imaging.normalize import coarsen_image, normalize
from metroem.io.h5 import ImageSetMeta, Pair, PairLocation, write_image_set
from metroem.specs.filenames import ImageSetName

SHIFT_PX = 3.0


def texture(rows: int, cols: int, seed: int) -> torch.Tensor:
    """(1, 1, rows, cols) grey levels 1..255, smooth over some pixels."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(1, 1, rows // 4, cols // 4, generator=generator)
    image = F.interpolate(noise, size=(rows, cols), mode="bicubic").clamp(0, 1)
    return 1 + 254 * image


def white_noise(rows: int, cols: int, seed: int) -> torch.Tensor:
    """(1, 1, rows, cols): normal, independent from one 2 x 2 px to the next, none 0."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 1, rows // 2, cols // 2, generator=generator)
    return coarse.repeat_interleave(2, -2).repeat_interleave(2, -1) + 1e-3


def shifted_pair(rows: int, cols: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw src and tgt (1, 1, rows, cols): tgt(p) = src(p + (0, SHIFT_PX))."""
    src = texture(rows, cols, seed)
    field = torch.zeros(1, 2, rows, cols)
    field[:, 0] = SHIFT_PX
    return src, warp(src, field, padding="border")


def write_pairs(
    folder: Path,
    *,
    mips: tuple[int, ...],
    num_pairs: int,
    shape: tuple[int, int],
    corner: tuple[int, int] = (0, 0),
) -> None:
    """Image sets of z 1 of shifted pairs; `shape` is (H, W) at mip 0."""
    raw = [shifted_pair(*shape, seed=index) for index in range(num_pairs)]
    for mip in mips:
        pairs = [
            Pair(*(normalize(coarsen_image(i, mip))[0, 0].numpy() for i in pair))
            for pair in raw
        ]
        rows, cols = pairs[0].src.shape
        meta = ImageSetMeta(
            frames=[
                PairLocation(Grid(mip, *corner, rows, cols), (1 + i, i))
                for i in range(num_pairs)
            ],
            source="made by a test",
            command="",
            request={},
            normalization={"kind": "tissue"},
        )
        write_image_set(folder / ImageSetName(*corner, 1, mip).filename, pairs, meta)
