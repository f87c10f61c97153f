"""Find the pairs of a stage, hold some out for validation, and read one."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.data.sample import Sample
from metroem.errors import DatasetError
from metroem.geometry.field import warp
from metroem.geometry.grid import Grid
from metroem.imaging.masks import warp_mask
from metroem.imaging.normalize import looks_normalized, tissue_statistics
from metroem.io.h5 import FieldSet, ImageSet, find_image_sets
from metroem.io.moved import command_to_move, unlike_offsets
from metroem.io.origins import how_to_make_again, why_stale
from metroem.specs.filenames import FieldSetName

logger = logging.getLogger(__name__)

# Sections left unused on each side of those held out.
GAP_SECTIONS = 1


class PairRef(NamedTuple):
    """One pair of an image set, and the prior fields that belong to it."""

    images: ImageSet
    prior: FieldSet | None
    index: int

    @property
    def name(self) -> str:
        """Name the pair, for example "x0_y0_z10_MIP2.h5 pair 3 (z 13 on 12)"."""
        src, tgt = self.images.sections(self.index)
        return f"{self.images.path.name} pair {self.index} (z {src} on {tgt})"

    @property
    def grid(self) -> Grid:
        """Where the pair lies."""
        return self.images.grid(self.index)

    @property
    def moves_tgt(self) -> bool:
        """Whether tgt has a field too, which warps tgt when the pair is read."""
        return self.prior is not None and self.prior.num_sides == 2


class Split(NamedTuple):
    """Pairs to train on, and pairs held out; no section is in both."""

    training: list[PairRef]
    validation: list[PairRef]


def image_sets_at(folder: Path, mip: int, *, verifies: bool = False) -> list[ImageSet]:
    """Find the image sets of one mip, sorted by name.

    Args:
        folder: of the sets.
        mip: of their images.
        verifies: whether they check each pair's checksum before its first read.

    Raises:
        DatasetError: there is none; the message lists the mips that exist.
    """
    sets = find_image_sets(folder, verifies=verifies)
    at_mip = [images for images in sets if images.mip == mip]
    if not at_mip:
        raise DatasetError(
            f"{folder}: no image set at mip {mip}, only at "
            f"{sorted({images.mip for images in sets})}; get one with "
            f"download_image.py --mip {mip} --dst_folder {folder}"
        )
    return at_mip


def prior_path(
    images: ImageSet, stage: int, checkpoint_name: str, fields_path: Path | None = None
) -> Path:
    """Path of the prior fields of a stage, which the previous stage wrote.

    Args:
        images: the stage's images.
        stage: >= 1.
        checkpoint_name: tag of the fields.
        fields_path: folder of field sets. A set that is not in it is looked for beside
            the images, where downloaded fields may lie.
    """
    name = FieldSetName(stage - 1, images.name.place, images.mip, checkpoint_name)
    beside = images.path.with_name(name.filename)
    path = beside if fields_path is None else fields_path / name.filename
    return path if path.is_file() or not beside.is_file() else beside


def find_pairs(
    folder: Path,
    mip: int,
    *,
    stage: int,
    checkpoint_name: str,
    fields_path: Path | None = None,
    verifies: bool = False,
) -> list[PairRef]:
    """Find all pairs of one stage that have tissue on both sides.

    Args:
        folder: of the image sets.
        mip: of the stage's images.
        stage: 0 needs no prior fields; any other needs fields of the previous stage.
        checkpoint_name: tag of the prior fields.
        fields_path: folder of the prior fields, see `prior_path`.
        verifies: whether checksums are checked, see `image_sets_at`.

    Raises:
        DatasetError: no image set has that mip, images are not normalised, every pair
            is blank, or prior fields cannot be used, see `open_prior`.
    """
    pairs = []
    for images in image_sets_at(folder, mip, verifies=verifies):
        prior = None
        if stage > 0:
            prior = open_prior(images, stage, checkpoint_name, fields_path)
        refs = [PairRef(images, prior, i) for i in range(images.num_pairs)]
        filled = [ref for ref in refs if images.has_tissue(ref.index)]
        if len(filled) < len(refs):
            logger.warning(
                "%s: %d of %d pairs have a blank side and are left out",
                images.path,
                len(refs) - len(filled),
                len(refs),
            )
        if filled:
            _check_normalized(filled[0])
        pairs += filled
    if not pairs:
        raise DatasetError(f"{folder}: every pair at mip {mip} has a blank side")
    return pairs


def open_prior(
    images: ImageSet, stage: int, checkpoint_name: str, fields_path: Path | None = None
) -> FieldSet:
    """Open the prior fields of a stage's pairs, and check that they belong to them.

    Args:
        images: the stage's images; if they check checksums, so do the fields.
        stage: >= 1; the fields are of the previous stage.
        checkpoint_name: tag of the fields.
        fields_path: folder of the fields, see `prior_path`.

    Raises:
        DatasetError: the fields are missing, or were made from other data than the
            folder holds now. Or they differ from the images in location, number of
            pairs or removed translation. Or they lack the fields of tgt that the
            fields before them have.
    """
    path = prior_path(images, stage, checkpoint_name, fields_path)
    if not path.is_file():
        raise DatasetError(
            f"{path}: no such field set; a stage after the first needs the fields "
            "of the one before: run that stage (--generate_field_stages), or get "
            "them with download_field.py --suffix <checkpoint_name>"
        )
    fields = FieldSet(path, verifies=images.verifies)
    if why := why_stale(fields, images.path.parent):
        raise DatasetError(f"{path}: {why}")
    if fields.num_pairs != images.num_pairs:
        raise DatasetError(
            f"{path}: fields of {fields.num_pairs} pairs, but {images.path} has "
            f"{images.num_pairs}; {how_to_make_again(fields, images.path.parent)}"
        )
    fields.check_resolution(images)
    for index in range(images.num_pairs):
        if fields.grid(index) != images.grid(index):
            raise DatasetError(
                f"{path}: pair {index} lies on {fields.grid(index)}, its images on "
                f"{images.grid(index)}; "
                f"{how_to_make_again(fields, images.path.parent)}"
            )
        for side, taken_out, moved in unlike_offsets(fields, images, index):
            raise DatasetError(
                f"{path}: the translation {taken_out} was taken out of pair {index}, "
                f"side {side}, but its images were moved by {moved}; download them "
                f"with --field_dset: {command_to_move(images, path)}"
            )
    check_sides(fields, images.path.parent)
    return fields


def check_sides(fields: FieldSet, folder: Path) -> None:
    """Refuse fields of src only if the previous stage had fields of tgt too.

    Version 1.0.0 wrote such fields: it read tgt warped, and left out the field that
    warped it.

    Args:
        fields: of any stage.
        folder: another folder in which the previous stage's fields may lie.

    Raises:
        DatasetError: the fields of tgt are missing.
    """
    name = fields.name
    previous = (name.stage - 1, name.place, name.tag)
    for parent in {fields.path.parent, folder}:
        for path in parent.glob(f"field_{name.stage - 1}_*.h5"):
            other = FieldSetName.parse(path.name)
            if other is None or (other.stage, other.place, other.tag) != previous:
                continue
            if fields.num_sides < FieldSet(path).num_sides:
                raise DatasetError(
                    f"{fields.path}: has no fields of tgt, while {path.name}, which it "
                    "was made from, has: an earlier version left them out; write it "
                    f"again with write-fields --checkpoint_name {name.tag} --stages "
                    f"{name.stage}"
                )


def _check_normalized(ref: PairRef) -> None:
    if ref.images.has_reference:
        return
    found = tissue_statistics(torch.from_numpy(ref.images.read(ref.index).src))
    if found is not None and not looks_normalized(found):
        raise DatasetError(
            f"{ref.images.path}: the images are not normalised: the tissue of pair "
            f"{ref.index} has mean {found.mean:.3g} and std {found.std:.3g}, expected "
            "0 and 1; download them with --normalize"
        )


def split_pairs(pairs: Sequence[PairRef], num_validation: int) -> Split:
    """Hold out the last pairs, and drop the pairs that are too close to them.

    Pairs are ordered by the name of their set, then by index. A pair is too close if
    one of its sections lies within `GAP_SECTIONS` of a held-out section, over the same
    area. It is not trained on.

    Args:
        pairs: of all sets.
        num_validation: pairs to hold out; 0 holds out none.

    Raises:
        DatasetError: no pair is left to train on.
    """
    ordered = sorted(pairs, key=lambda ref: (ref.images.path.name, ref.index))
    held_out = ordered[len(ordered) - num_validation :] if num_validation else []
    training = [
        ref for ref in ordered if not any(_too_close(ref, other) for other in held_out)
    ]
    if not training or num_validation > len(ordered):
        raise DatasetError(
            f"--val_pairs {num_validation} of {len(ordered)} pairs leaves none to "
            f"train on (pairs within {GAP_SECTIONS} section of those held out are "
            "not used); give fewer, or download more sections"
        )
    return Split(training, held_out)


def _too_close(ref: PairRef, held_out: PairRef) -> bool:
    a, b = ref.grid, held_out.grid
    disjoint = a.end[0] <= b.x or b.end[0] <= a.x or a.end[1] <= b.y or b.end[1] <= a.y
    sections_apart = min(
        abs(z - other)
        for z in ref.images.sections(ref.index)
        for other in held_out.images.sections(held_out.index)
    )
    return not disjoint and sections_apart <= GAP_SECTIONS


def read_sample(ref: PairRef, crop: Grid) -> Sample:
    """Read the crop of a pair with its prior field and its defects.

    A downloaded field set has a field of tgt too, and so have the field sets that
    stages make from it. That field warps the tgt image here: src is aligned to a tgt
    that is already aligned.

    Args:
        ref: the pair.
        crop: its window, at the mip of the pair and inside its grid.

    Returns:
        A sample of batch size 1.
    """
    if ref.moves_tgt:
        field = read_prior(ref, 1, crop)
        area = source_window(ref.grid, crop, field)
        sample = _warp_tgt(_read_images(ref, area), field, *window_of(crop, area))
    else:
        sample = _read_images(ref, crop)
    if ref.prior is None:
        return sample
    return sample._replace(prior_field=read_prior(ref, 0, crop))


def read_prior(ref: PairRef, side: int, crop: Grid) -> Tensor:
    """Read the prior field of src (0) or tgt (1) in a window: (1, 2, H, W), px."""
    assert ref.prior is not None
    window = window_of(crop, ref.grid)
    return torch.from_numpy(ref.prior.read(ref.index, side, *window))[None]


def source_window(grid: Grid, crop: Grid, field: Tensor) -> Grid:
    """The window of a patch that contains all pixels that a field of a crop reads.

    Args:
        grid: of the patch.
        crop: inside the grid.
        field: (1, 2, H, W) of the crop, pixels.
    """
    # One more pixel, for the interpolation between pixels.
    longest = field.nan_to_num().abs().amax((0, 2, 3)).tolist()
    more_cols, more_rows = (int(length) + 1 for length in longest)
    rows, cols = window_of(crop, grid)
    first = max(rows.start - more_rows, 0), max(cols.start - more_cols, 0)
    end = min(rows.stop + more_rows, grid.rows), min(cols.stop + more_cols, grid.cols)
    return grid.crop(*first, end[0] - first[0], end[1] - first[1])


def window_of(crop: Grid, grid: Grid) -> tuple[slice, slice]:
    """Rows and cols of a crop within its grid."""
    row, col = (crop.x - grid.x) >> crop.mip, (crop.y - grid.y) >> crop.mip
    return slice(row, row + crop.rows), slice(col, col + crop.cols)


def _as_batch(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image)[None, None]


def _read_images(ref: PairRef, crop: Grid) -> Sample:
    window = window_of(crop, ref.grid)
    src, tgt = map(_as_batch, ref.images.read(ref.index, *window))
    masks = ref.images.read_defects(ref.index, *window)
    defects = (None, None) if masks is None else tuple(map(_as_batch, masks))
    return Sample(src, tgt, None, (ref.name,), *defects)


def _warp_tgt(sample: Sample, field: Tensor, rows: slice, cols: slice) -> Sample:
    """Warp tgt by the field of a window, and cut the sample to that window."""
    height, width = sample.tgt.shape[-2:]
    margins = (cols.start, width - cols.stop, rows.start, height - rows.stop)
    field = F.pad(field, margins)  # its values outside the window are cut off below
    defects = sample.tgt_defects
    sample = sample._replace(
        tgt=_warp_tissue(sample.tgt, field),
        tgt_defects=None if defects is None else warp_mask(defects, field),
    )
    return sample.window(rows, cols)


def _warp_tissue(image: Tensor, field: Tensor) -> Tensor:
    blank = warp((image == 0).float(), field, padding="border") > 0.5
    return torch.where(blank, 0.0, warp(image, field))
