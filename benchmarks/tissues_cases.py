"""Pairs of six kinds of real tissue, and of artificial tissue, with what is known.

Each pair gives up to four cases. w is a known smooth warp: up to 24 px, with a
turn, a change of scale and a shift.

    neighbours   the two sections as they are. The true field is 0 where the imaging
                 itself aligns them (FIB-SEM, artificial tissue), else it is unknown
    warped       src warped by w, with noise and another contrast. True field: the
                 inverse of w, where that of the neighbours is 0. For all tissues: the
                 error of the known warp, below
    itself       tgt warped by w, with other noise and contrast, on tgt. True field:
                 the inverse of w
    twice        one section imaged twice, with its own noise each time. True field: 0

Error of the known warp: with f the method's own field of the neighbours, its field of
the warped pair should be

    compose(f, invert(w))

The distance from that counts what a method loses of a warp that is surely there. How
tissue moves from section to section does not count.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metroem.geometry.field import compose, invert, warp
from metroem.imaging.masks import dilate
from metroem.synthetic.distortion import Distortion, random_field
from metroem.synthetic.tissue import TissueRecipe, make_tissue

SIDE_PX = 512
BORDER_PX = 16  # of the overlap, not measured
NEAR_PX = 40  # of a fold: figures "near"
_WARP = Distortion(
    peak_px=(12.0, 24.0), knot_px=96.0, shift_px=6.0, degrees=1.5, stretch=0.01
)
_NOISE, _CONTRAST, _BRIGHTNESS = 0.04, (0.75, 1.25), 0.05


class Pair(NamedTuple):
    """Two sections of a stack, and the corners (row, col) of their windows."""

    src: int
    tgt: int
    src_corner: tuple[int, int] = (0, 0)
    tgt_corner: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Tissue:
    """A stack of sections.

    Attributes:
        title: tissue and microscope, with nm along rows and cols, and between sections.
        file: .npy, uint8 [section, rows, cols]; None: artificial.
        source: where it comes from, and its licence.
        pairs: the pairs that are measured.
        is_exact: whether the imaging itself aligns neighbours.
        twice: .npy of sections imaged again, and the section of `file` of its first.
        fold: section of `file` that holds the mask of a fold in src.
        train: sections to train on, first and one past the last: none is measured.
    """

    name: str
    title: str
    file: str | None
    source: str
    pairs: tuple[Pair, ...]
    is_exact: bool = False
    twice: tuple[str, int] | None = None
    fold: int | None = None
    train: tuple[int, int] | None = None


def _neighbours(*sections: int, corner: tuple[int, int] = (0, 0)) -> tuple[Pair, ...]:
    return tuple(Pair(z, z - 1, corner, corner) for z in sections)


TISSUES = (
    Tissue(
        "fib25",
        "FIB-SEM, fly medulla, 10 x 40 nm",
        "fib25_a.npy",
        "FlyEM, Janelia (neuroproof_examples), CC BY 3.0",
        _neighbours(52, 60, 56, 64),
        is_exact=True,
        train=(0, 45),
    ),
    Tissue(
        "atum",
        "ATUM-SEM, mouse cortex, 24 x 30 nm",
        "atum_cortex_a.npy",
        "Kasthuri et al. 2015, Open Connectome terms",
        _neighbours(10, 30, 20, 38, corner=(0, 100)),
        train=(46, 90),
    ),
    Tissue(
        "vnc",
        "ssTEM, fly larva nerve cord, 4.6 x 50 nm",
        "vnc_stack1.npy",
        "Gerhard et al., figshare 856713, CC BY-NC-SA 3.0",
        _neighbours(16, 18, corner=(256, 256)) + _neighbours(17, 19),
        train=(0, 14),
    ),
    Tissue(
        "sbem",
        "block-face SEM, mouse brain",
        "sbem_a.npy",
        "CDeep3M (CRBS), UCSD terms: research",
        _neighbours(12, 18, corner=(256, 256)) + _neighbours(15, 19),
        twice=("sbem_a_noisy_10_14.npy", 10),
        train=(0, 9),
    ),
    Tissue(
        "array",
        "array tomography (light), mouse cortex",
        "array_tomography.npy",
        "billkarsh/Alignment_Tutorial, Janelia BSD-like 1.1",
        # Windows that show about the same place of sections that lie apart.
        (
            Pair(1, 0, (100, 544), (344, 344)),
            Pair(2, 1, (266, 387), (344, 344)),
            Pair(1, 0, (200, 644), (444, 444)),
            Pair(2, 1, (366, 387), (444, 344)),
        ),
    ),
    Tissue(
        "zebrafish",
        "zebrafish brain with a real fold, 128 x 30 nm",
        "zebrafish_fold.npy",
        "TongXin-CASIA/Damaged_Section, no licence stated",
        tuple(
            Pair(1, 0, corner, corner)
            for corner in ((1088, 448), (1152, 1024), (1152, 192), (1152, 1536))
        ),
        fold=2,
    ),
    Tissue(
        "made",
        "artificial tissue, 11 x 40 nm",
        None,
        "`metroem.synthetic.tissue`, seed 7",
        _neighbours(17, 19, 16, 18),
        is_exact=True,
        train=(0, 14),
    ),
)


class Case(NamedTuple):
    """A pair that a method aligns, and what is known of it.

    Attributes:
        kind: see the module.
        src: (H, W) float32, 0 to 1, 0 = no data.
        tgt: (H, W), the same.
        truth: (1, 2, H, W) the true field, pull, px; None: not known.
        warp: (1, 2, H, W), w; None: not warped.
        near: (H, W) bool: close to a fold of src, on its grid; None: no fold.
    """

    tissue: str
    pair: int
    kind: str
    src: np.ndarray
    tgt: np.ndarray
    truth: Tensor | None
    warp: Tensor | None = None
    near: np.ndarray | None = None

    @property
    def key(self) -> str:
        """Name of the case in the file of results."""
        return f"{self.tissue} {self.pair} {self.kind}"

    def valid(self) -> Tensor:
        """Pixels of tgt that count, (1, 1, H, W) bool: tissue in both under w."""
        truth = self.truth
        if truth is None and self.warp is not None:
            truth = invert(self.warp)
        src, tgt = (torch.from_numpy(image)[None, None] for image in self[3:5])
        has_src = (src > 0).float()
        if truth is not None:
            has_src = warp(has_src, truth)
        valid = (has_src > 0.99) & (tgt > 0)
        # Shrunk by the border: all pixels around have to be valid.
        blank = torch.nn.functional.pad((~valid).float(), (BORDER_PX,) * 4, value=1.0)
        return torch.nn.functional.max_pool2d(blank, 2 * BORDER_PX + 1, 1) == 0


def cases_of(tissue: Tissue, folder: Path) -> Iterator[Case]:
    """Make the cases of a tissue; the same every time.

    Args:
        tissue: one of `TISSUES`.
        folder: of the .npy files.

    Raises:
        FileNotFoundError: its file is not there.
    """
    sections = read_sections(tissue, folder)
    for index, pair in enumerate(tissue.pairs):
        # Equal for all tissues, so that they differ in tissue alone.
        rng = np.random.default_rng(index)
        src = _window(sections[pair.src], pair.src_corner)
        tgt = _window(sections[pair.tgt], pair.tgt_corner)
        zero = torch.zeros(1, 2, *tgt.shape)
        w = random_field(rng, (tgt.shape[0], tgt.shape[1]), _WARP)
        inverse = invert(w)
        near = None
        if tissue.fold is not None:
            mask = _window(sections[tissue.fold], pair.src_corner) > 0
            near = dilate(torch.from_numpy(mask)[None, None], NEAR_PX)[0, 0].numpy()
        true = zero if tissue.is_exact else None
        name = tissue.name
        yield Case(name, index, "neighbours", src, tgt, true, None, near)
        moved = inverse if tissue.is_exact else None
        yield Case(
            *(name, index, "warped", _image(src, w, rng), tgt, moved, w),
            near=None if near is None else _pull(near.astype(np.float32), w) > 0.5,
        )
        yield Case(name, index, "itself", _image(tgt, w, rng), tgt, inverse, w)
        if tissue.twice is not None and (folder / tissue.twice[0]).is_file():
            again = _without_zero(np.load(folder / tissue.twice[0]))
            if 2 * index >= len(again):
                continue
            z = tissue.twice[1] + 2 * index
            one = _window(again[2 * index], pair.src_corner)
            yield Case(
                name, index, "twice", one, _window(sections[z], pair.src_corner), zero
            )


@cache
def read_sections(tissue: Tissue, folder: Path) -> np.ndarray:
    """Read or make the sections of a tissue, (n, H, W) uint8."""
    if tissue.file is None:
        return make_tissue(TissueRecipe(20, SIDE_PX, SIDE_PX, seed=7))
    sections = np.load(folder / tissue.file, mmap_mode="r")
    # Only these have pixels without data; in the others 0 is a grey level.
    return (
        sections if tissue.name in ("zebrafish", "array") else _without_zero(sections)
    )


def _without_zero(sections: np.ndarray) -> np.ndarray:
    return np.maximum(sections, 1)


def _window(section: np.ndarray, corner: tuple[int, int]) -> np.ndarray:
    """Cut a window of at most SIDE_PX a side, a multiple of 16, float32, 0 to 1."""
    ends = [
        first + min(SIDE_PX, size - first) // 16 * 16
        for first, size in zip(corner, section.shape, strict=True)
    ]
    window = section[corner[0] : ends[0], corner[1] : ends[1]]
    return window.astype(np.float32) / 255


def _image(section: np.ndarray, w: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Warp a section, and image it with its own noise and contrast."""
    warped = _pull(section, w)
    data = _pull((section > 0).astype(np.float32), w) > 0.99
    mean = warped[data].mean()
    grey = mean + (warped - mean) * rng.uniform(*_CONTRAST)
    grey += rng.uniform(-1, 1) * _BRIGHTNESS
    grey += rng.normal(0, _NOISE, grey.shape)
    return np.where(data, np.clip(grey, 1 / 255, 1), 0).astype(np.float32)


def _pull(image: np.ndarray, w: Tensor) -> np.ndarray:
    return warp(torch.from_numpy(image)[None, None], w)[0, 0].numpy()


def known_warp_error(own: Tensor, found: Tensor, w: Tensor, where: Tensor) -> Tensor:
    """Compute the error of the known warp at each pixel that counts, px.

    Args:
        own: (1, 2, H, W) the method's field of the neighbours.
        found: (1, 2, H, W) its field of the same pair with src warped by w.
        w: (1, 2, H, W).
        where: (1, 1, H, W) bool, the pixels that count.
    """
    wanted = compose(own, invert(w))
    return (found - wanted).norm(dim=1, keepdim=True)[where]
