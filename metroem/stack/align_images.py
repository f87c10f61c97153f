"""Align one image file to another, and say how sure that is.

1. Where the two lie far apart, src is placed first: a similarity is matched, see
   `metroem.stack.match_sections`. The pyramid then finds what is left. Where they lie
   near each other, src is placed only if the pyramid fails without it, since it would
   read an image that was interpolated.
   If the contrast of one is inverted, the networks see the negative of src.
2. Src is pulled once, through placement and field together.
3. The result is verified: the edges of aligned src and tgt must agree better than
   chance lets any map of unrelated images do. Else nothing is written. The field of
   unrelated images, which follows whatever is alike, does not pass: of 8 such pairs
   none did, and of 21 pairs of neighbours all, with 15 to 52 standard deviations where
   6.5 are needed (fly and mouse, three microscopes, 2026-11). The mean confidence of
   these was 0.01 to 0.03, and 0.1 to 0.9.

Arrays are (x, y), as in volumes; see `metroem.io.image_files`.
"""

import logging
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from metroem import __version__
from metroem.data.sample import Sample, with_defects
from metroem.errors import DatasetError, UsageError
from metroem.evaluation.report.page import Origin, report_page
from metroem.evaluation.report.pair_pictures import draw_pair
from metroem.evaluation.scores import (
    CHUNK_PX,
    AlignedPair,
    SetResult,
    Spot,
    Where,
    score_aligned,
)
from metroem.geometry import affine
from metroem.geometry.field import pixel_positions
from metroem.geometry.grid import Grid
from metroem.imaging.masks import pull_tissue, tissue_mask
from metroem.imaging.normalize import normalize, round_greys
from metroem.io.files import atomic_write, try_writing
from metroem.io.image_files import open_stack, swap_axes
from metroem.pyramid import Pyramid
from metroem.stack.match_sections import Match, Section, match, tissue_box
from metroem.stack.relax import compose_affine
from metroem.stack.requests import AlignImagesRequest
from metroem.utils.distributed import choose_device
from metroem.utils.memory import enough_memory

logger = logging.getLogger(__name__)

# Src is placed if some pixel of tgt has to be moved by more than this, px of the last
# stage.
_FAR_PX = 24.0
# The match of the aligned pair may move no pixel by more, or the two lie elsewhere.
_SAME_PX = 8.0
_MIN_CONFIDENCE = 0.05  # the mean over the common tissue
_PNG_TYPES = (np.uint8, np.uint16)
_SURE = 0.5  # confidence of a pixel that is counted as sure


class AlignedImages(NamedTuple):
    """A pair of images, aligned.

    Attributes:
        placement: (2, 3) pull matrix, from tgt to src: where src was placed first.
        is_negative: whether the contrast of one of the two is inverted.
        placed: (1, 1, X, Y) what the networks saw: src after placement, or its
            negative, 0 = no data.
        image: (X, Y) aligned src, float32, 0 = no data.
        field: (2, X, Y), pull, px, channel 0 along cols (y): image(p) = src(p + field).
        placed_field: the same, from tgt to placed src.
        confidence: (X, Y), see `Pyramid.align`.
        score: by how many standard deviations the edges of the two agree better than
            by chance.
    """

    placement: np.ndarray
    is_negative: bool
    placed: Tensor
    image: Tensor
    field: np.ndarray
    placed_field: np.ndarray
    confidence: np.ndarray
    score: float

    @property
    def is_placed(self) -> bool:
        """Whether src was placed before the pyramid aligned it."""
        return not np.array_equal(self.placement, affine.identity())


def align_images(request: AlignImagesRequest) -> None:
    """Align an image to another one, and write it, its field and a report.

    Args:
        request: the flags.

    Raises:
        UsageError: a .png cannot hold the grey levels of src.
        DatasetError: an image cannot be read, has no tissue or no contrast, or the two
            have nothing in common that chance could not explain.
        PyramidError: the pyramid cannot be used.
        CheckpointError: it has no weights.
        StorageError: a file cannot be written.
        ResourceError: memory ran out.
    """
    request.check_paths()
    src, tgt = (
        _read(path, name) for path, name in ((request.src, "SRC"), (request.tgt, "TGT"))
    )
    if request.output.suffix.lower() == ".png" and src.dtype not in _PNG_TYPES:
        raise UsageError(
            f"--output {request.output}: a .png holds uint8 or uint16, and src is "
            f"{src.dtype}; name a .tif or .npy"
        )
    for path in request.written:
        try_writing(path.parent, str(path))
    device = choose_device("auto", ())
    logger.info(
        "src %s: %d x %d px, %s; tgt %s: %d x %d px; pyramid %s, device %s",
        *(request.src, *src.shape, src.dtype, request.tgt, *tgt.shape),
        *(request.pyramid_path or "that comes with metroem", device),
    )
    if request.pyramid_path is None:
        pyramid = Pyramid.pretrained(device=device)
    else:
        pyramid = Pyramid.load(request.pyramid_path, request.checkpoint_name, device)
    began = time.monotonic()
    with enough_memory("the pair", "align parts of the images"):
        found = align_pair(
            src, tgt, pyramid, mip=request.mip, finetune=not request.no_finetune
        )
        if found is None:
            raise DatasetError(
                f"{request.src} on {request.tgt}: what the two have in common may be "
                "chance: do they overlap, and are their pixels of the same size? "
                "Nothing was written"
            )
        _log_result(src, tgt, found)
        # The image last: where it exists, all is done.
        if request.report is not None:
            _write_report(request, pyramid, tgt, found)
        if request.field is not None:
            # Rows of an image run along y, so the channels change places.
            _write_array(request.field, swap_axes(found.field[::-1]))
        _write_image(request.output, found.image, src.dtype)
    logger.info("%.0f s; wrote %s", time.monotonic() - began, request.output)
    for path in request.written[1:]:
        logger.info("wrote %s", path)


def align_pair(
    src: np.ndarray,
    tgt: np.ndarray,
    pyramid: Pyramid,
    *,
    mip: int = 0,
    finetune: bool = True,
) -> AlignedImages | None:
    """Align an image to another one that may lie anywhere.

    Args:
        src: (X, Y) grey levels of any type, 0 = no data: the moving image.
        tgt: (x, y), with pixels of the same size: the fixed image.
        pyramid: its stages.
        mip: mip of the images.
        finetune: let each stage improve its field on the pair itself.

    Returns:
        The pair, of the size of tgt; None if what the two have in common may be chance.

    Raises:
        UsageError, PyramidError: as `Pyramid.align`.
    """
    rows, cols = (max(pair) for pair in zip(src.shape, tgt.shape, strict=True))
    canvas = Grid(0, 0, 0, rows, cols)
    image, fixed = (_on_canvas(one, canvas) for one in (src, tgt))
    matched = match(Section(src), Section(tgt))
    placements = [affine.identity()]
    if matched is not None:
        far_px = _FAR_PX * 2.0 ** (pyramid.mips[-1] - mip)
        is_far = _longest_px(matched, tgt) > far_px
        placements = [matched.matrix] if is_far else [*placements, matched.matrix]
    is_negative = matched is not None and matched.sign < 0
    inside = tuple(slice(size) for size in tgt.shape)
    for placement in placements:
        placed = _pull(image, affine.as_field(placement, canvas))
        if is_negative:
            placed = _negative(placed)
        field, confidence = pyramid.align(
            placed[0, 0], fixed[0, 0], mip, finetune, confidence=True
        )
        whole = compose_affine(torch.from_numpy(field)[None], placement, canvas)
        aligned = _pull(image, whole)[0, 0][inside]
        agreed = match(Section(aligned.numpy()), Section(tgt), guess=affine.identity())
        common = tissue_mask(aligned).numpy() & (tgt != 0)
        if (
            agreed is not None
            and _longest_px(agreed, tgt) <= _SAME_PX
            and confidence[inside][common].mean() >= _MIN_CONFIDENCE
        ):
            return AlignedImages(
                placement,
                is_negative,
                placed,
                aligned,
                whole[0].numpy()[(slice(None), *inside)],
                field,
                confidence[inside],
                agreed.score,
            )
    return None


def _read(path: Path, name: str) -> np.ndarray:
    """Read the one image of a file, (x, y); signed grey levels as float32.

    Values that are not finite become 0.

    Raises:
        DatasetError: it cannot be read, has several images, no tissue or no contrast.
    """
    stack = open_stack(str(path), name)
    if stack.broken:
        raise DatasetError(f"{name} {path.parent}/{next(iter(stack.broken.values()))}")
    if len(stack.sections) != 1:
        raise DatasetError(
            f"{name} {path}: has {len(stack.sections)} sections; expected one image. "
            "For stacks see metroem import and metroem align-stack"
        )
    ((z, section),) = stack.sections.items()
    image = stack.read(range(z, z + 1), range(section.shape[0]))[0]
    if image.dtype.kind == "i":
        image = image.astype(np.float32)
    if image.dtype.kind == "f":
        image = np.where(np.isfinite(image), image, 0)
    grey = image[image != 0]
    if not grey.size:
        raise DatasetError(
            f"{name} {path}: has no tissue: all pixels are 0, which means no data"
        )
    if grey.min() == grey.max():
        raise DatasetError(
            f"{name} {path}: has no contrast: all pixels with data are {grey[0]}"
        )
    return image


def _on_canvas(image: np.ndarray, canvas: Grid) -> Tensor:
    """Put an image into the corner of a canvas without data, (1, 1, X, Y) float32."""
    tensor = torch.from_numpy(image.astype(np.float32))[None, None]
    rows, cols = image.shape
    return F.pad(tensor, (0, canvas.cols - cols, 0, canvas.rows - rows))


def _pull(image: Tensor, field: Tensor) -> Tensor:
    return pull_tissue(image, pixel_positions(field) + field)


def _negative(image: Tensor) -> Tensor:
    """Invert the contrast of tissue, within the range of its grey levels."""
    grey = image[tissue_mask(image)]
    low, high = float(grey.min()), float(grey.max())
    return torch.where(tissue_mask(image), low + high - image, 0.0)


def _longest_px(found: Match, tgt: np.ndarray) -> float:
    """Find by how far a match moves a corner of the tissue of tgt, at most."""
    top, bottom, left, right = tissue_box(tgt) or (0, 1, 0, 1)
    corners = np.array([(c, r) for c in (left, right) for r in (top, bottom)], float)
    moved = affine.apply(found.matrix, corners) - corners
    return float(np.hypot(*moved.T).max())


def _log_result(src: np.ndarray, tgt: np.ndarray, found: AlignedImages) -> None:
    """Say how far src was moved, and how sure that is."""
    if found.is_placed:
        logger.info("src was placed first: %s", _in_words(found.placement, tgt))
    if found.is_negative:
        logger.info("contrast is inverted: the negative of src was aligned")
    common = tissue_mask(found.image).numpy() & (tgt != 0)
    length = np.hypot(*found.placed_field)[: tgt.shape[0], : tgt.shape[1]][common]
    logger.info(
        "%sfield: %.1f px on average, %.1f at most; common tissue: %.0f %% of tgt's",
        "then the " if found.is_placed else "",
        *(length.mean(), length.max(), 100 * common.sum() / (tgt != 0).sum()),
    )
    sure = found.confidence[common]
    logger.info(
        "sure: edges agree by %.0f standard deviations more than chance; confidence "
        "%.2f on average, above %.1f on %.0f %% of the common tissue",
        *(found.score, sure.mean(), _SURE, 100 * (sure > _SURE).mean()),
    )


def _in_words(placement: np.ndarray, tgt: np.ndarray) -> str:
    """Describe how src was moved: turn, scale, and shift in the middle of tgt."""
    middle = (np.array(tgt.shape[::-1], float) - 1)[None] / 2
    along_y, along_x = (middle - affine.apply(placement, middle))[0]
    # Pulling by an angle turns src by its opposite. Arrays are (x, y), y runs down.
    angle = -np.degrees(np.arctan2(placement[0, 1], placement[0, 0]))
    turn = "clockwise" if angle >= 0 else "counterclockwise"
    across, along = (
        "right" if along_x >= 0 else "left",
        "down" if along_y >= 0 else "up",
    )
    return (
        f"turned by {abs(angle):.1f} degrees {turn}, made "
        f"{1 / affine.scale(placement):.3f} times as large, moved by "
        f"{abs(along_x):.0f} px to the {across} and {abs(along_y):.0f} px {along} in "
        "the middle of tgt"
    )


def _write_image(path: Path, image: Tensor, dtype: np.dtype) -> None:
    """Write an image, (x, y), in the type of src; rows of the file run along y."""
    rounded = swap_axes(round_greys(image, dtype))
    if path.suffix.lower() == ".npy":
        _write_array(path, rounded)
        return
    with atomic_write(path) as partial:
        if path.suffix.lower() == ".png":
            Image.fromarray(rounded).save(partial, "PNG")
        else:
            tifffile.imwrite(partial, rounded)


def _write_array(path: Path, array: np.ndarray) -> None:
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.save(file, array)


def _write_report(
    request: AlignImagesRequest, pyramid: Pyramid, tgt: np.ndarray, found: AlignedImages
) -> None:
    """Write the report page: that of `metroem evaluate`, with one pair."""
    assert request.report is not None
    placed = found.placed
    fixed = _on_canvas(tgt, Grid(0, 0, 0, *placed.shape[-2:]))
    images = [normalize(image) for image in (placed, fixed)]
    sample = with_defects(Sample(images[0], images[1], None, ()))
    forward = torch.from_numpy(found.placed_field)[None]
    backward = pyramid.align(
        fixed[0, 0], placed[0, 0], request.mip, not request.no_finetune
    )
    score, worst = score_aligned(sample, forward, torch.from_numpy(backward)[None])
    file = f"{request.src.name} on {request.tgt.name}"
    spot = worst and Spot(worst.figure, worst.row, worst.col)
    pair = AlignedPair(Where(file, 0, 1, 0, spot), score)
    origin = Origin(file, str(request.src), (0, 0), None)
    about = vars(request) | {
        "dataset_path": file,
        "chunk_px": CHUNK_PX,
        "coverage": {"done": 1, "asked": 1, "in_data_set": 1, "was_stopped": False},
        "stages": [f"mip {pyramid.mips[-1]}"],
        "curves": [],
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "is_of_files": True,
        "placed": _in_words(found.placement, tgt) if found.is_placed else "",
    }
    with report_page(request.report) as page:
        page.add(origin, pair, draw_pair(sample, [forward]))
        rows, cols = placed.shape[-2:]
        page.finish(about, [SetResult(file, 0, rows, cols, score, (pair,))])
