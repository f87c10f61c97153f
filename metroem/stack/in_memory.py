"""Align a whole stack of arrays in memory, for notebooks and small stacks."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.errors import UsageError
from metroem.geometry import affine
from metroem.geometry.field import pixel_positions, upsample_field
from metroem.geometry.grid import Grid
from metroem.imaging.masks import pull_tissue
from metroem.imaging.normalize import coarsen_image, normalize
from metroem.pyramid import Pyramid
from metroem.stack.pairs import (
    CELL_LEVELS,
    SectionWindow,
    align_windows,
    make_window,
    stage_grids,
    to_cells,
)
from metroem.stack.place import place_sections, tissue_outline
from metroem.stack.relax import PairFields, RelaxOptions, compose_affine, relax
from metroem.utils.progress import progress

logger = logging.getLogger(__name__)


def align_stack(
    sections: Sequence[np.ndarray],
    pyramid: Pyramid | str | Path,
    *,
    neighbours: int = 3,
    model: str = "similarity",
    flip: bool = False,
    fix: int | None = None,
    options: RelaxOptions | None = None,
) -> np.ndarray:
    """Align all sections of a stack at once.

    Sections are placed, aligned in pairs and relaxed. Sections that match nothing are
    named in the log, and keep the place of their neighbours.

    Args:
        sections: (H, W) uint8 each, all of one shape, 0 = no data.
        pyramid: a loaded pyramid, or its directory.
        neighbours: how many sections before it each section is aligned with.
        model: map of a section to its place: "rigid", "similarity" or "affine".
        flip: allow mirrored sections.
        fix: index of the section that stays where it is; None: the middle one.
        options: see `RelaxOptions`; the defaults if None.

    Returns:
        (n, 2, H, W) float32: fields, pull, pixels, channel 0 along cols:
        aligned_z(p) = sections[z](p + fields[z](p)).

    Raises:
        UsageError: fewer than two sections, sections of several shapes or types or not
            2-d, or no such section as `fix`.
        PyramidError: `pyramid` is not a pyramid.
        CheckpointError: it has no weights.
    """
    sections = [np.asarray(section) for section in sections]
    shapes = {section.shape for section in sections}
    types = {section.dtype for section in sections}
    is_one_kind = len(shapes) == 1 and types == {np.dtype(np.uint8)}
    if len(sections) < 2 or not is_one_kind or len(sections[0].shape) != 2:
        raise UsageError(
            f"{len(sections)} sections of shapes {sorted(shapes)} and types "
            f"{sorted(map(str, types))}: expected two or more, uint8, [rows, cols] of "
            "one shape"
        )
    if fix is not None and not 0 <= fix < len(sections):
        raise UsageError(f"fix {fix}: expected 0 to {len(sections) - 1}")
    if neighbours < 1:
        raise UsageError(f"neighbours {neighbours}: expected 1 or more")
    if not isinstance(pyramid, Pyramid):
        pyramid = Pyramid.load(pyramid)
    matrices, lines = place_sections(sections, model=model, flip=flip, fix=fix)
    for line in lines:
        logger.info("%s", line)
    frame = Grid(0, 0, 0, *sections[0].shape)
    area = _tissue_area(sections, matrices, frame, pyramid.mips)
    pairs = _align_pairs(sections, matrices, pyramid, area, neighbours)
    displacements = relax(pairs, options or RelaxOptions())
    levels = pyramid.mips[-1] + CELL_LEVELS
    fields = np.empty((len(sections), 2, *frame.shape), np.float32)
    for z, matrix in enumerate(matrices):
        fine = upsample_field(displacements[z : z + 1], levels)
        fine = fine[..., : area.rows, : area.cols]
        fine = _extend(fine, area, frame)
        fields[z] = compose_affine(fine, matrix, frame)[0].numpy()
    return fields


def _tissue_area(
    sections: Sequence[np.ndarray],
    matrices: Sequence[np.ndarray],
    frame: Grid,
    mips: Sequence[int],
) -> Grid:
    """Find the part of the frame that holds placed tissue, on whole blocks of px."""
    corners = []
    for section, matrix in zip(sections, matrices, strict=True):
        outline = tissue_outline(section)
        if outline is not None:
            to_frame = affine.invert(matrix)
            corners.append(affine.apply(to_frame, outline.astype(float)))
    if not corners:
        return frame
    found = np.concatenate(corners)
    block = 16 << max(mips)
    low = np.maximum(found.min(0), 0).astype(int) // block * block
    high = np.minimum(np.ceil(found.max(0)).astype(int) + 1, (frame.cols, frame.rows))
    if (high <= low).any():
        return frame
    return frame.crop(*low[::-1].tolist(), *(high - low)[::-1].tolist())


def _align_pairs(
    sections: Sequence[np.ndarray],
    matrices: Sequence[np.ndarray],
    pyramid: Pyramid,
    area: Grid,
    neighbours: int,
) -> PairFields:
    """Find the fields of all pairs on the area."""
    grids = stage_grids(area, area, pyramid.mips, 0)
    cells = area.at_mip(pyramid.mips[-1] + CELL_LEVELS).shape
    num = len(sections)
    reach = range(1, min(neighbours, num - 1) + 1)
    fields = {k: torch.zeros(num, 2, *cells) for k in reach}
    correlations = {k: torch.zeros(num, 1, *cells) for k in reach}
    defects = torch.zeros(num, 1, *cells)
    everywhere = torch.ones(1, 1, *area.shape)
    windows: list[SectionWindow] = []
    items = zip(sections, matrices, strict=True)
    for z, (section, matrix) in enumerate(
        progress(items, "pairs, sections", total=num)
    ):
        windows.append(_section_window(section, matrix, area, pyramid.mips))
        size = 2**CELL_LEVELS
        defects[z] = F.max_pool2d(windows[-1].defects.float(), size, ceil_mode=True)[0]
        for k in reach:
            if k <= z:
                pair = windows[-1], windows[-1 - k]
                found = align_windows(
                    *(pyramid, *pair, grids), everywhere if k == 1 else None
                )
                fields[k][z : z + 1], correlations[k][z : z + 1] = to_cells(*found)
        windows = windows[-neighbours:]
    return PairFields(fields, correlations, defects)


def _section_window(
    section: np.ndarray, matrix: np.ndarray, area: Grid, mips: Sequence[int]
) -> SectionWindow:
    """Place a section, and make the images of the stages."""
    image = torch.from_numpy(section.astype(np.float32))[None, None]
    field = affine.as_field(matrix, area)
    corner = torch.tensor([area.y, area.x], dtype=torch.float32).view(1, 2, 1, 1)
    positions = pixel_positions(field) + field + corner
    placed = pull_tissue(image, positions)
    return make_window([normalize(coarsen_image(placed, mip)) for mip in mips])


def _extend(field: Tensor, area: Grid, frame: Grid) -> Tensor:
    """Extend a field from an area to the frame; it repeats its border."""
    top, left = area.x - frame.x, area.y - frame.y
    pad = (
        left,
        frame.cols - left - area.cols,
        top,
        frame.rows - top - area.rows,
    )
    return F.pad(field, pad, mode="replicate")
