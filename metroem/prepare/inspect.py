"""Inspect a data set: list its image and field sets, and check each of them."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metroem.data.dataset import check_sides, prior_path
from metroem.errors import DatasetError
from metroem.geometry.grid import in_nm, same_resolution
from metroem.imaging.normalize import DARKEST, GreyStatistics, looks_normalized
from metroem.io.cloud_paths import check_dataset
from metroem.io.h5 import FieldSet, ImageSet, verify
from metroem.io.moved import command_to_move, moved_apart, unlike_offsets
from metroem.io.origins import why_stale
from metroem.prepare.requests import InspectRequest
from metroem.specs.filenames import FieldSetName, ImageSetName
from metroem.specs.modules import find_modules
from metroem.specs.schedule import load_schedule

logger = logging.getLogger(__name__)


class _TissueStatistics(NamedTuple):
    """Statistics of the images of a set."""

    blank: float  # fraction of pixels
    mean: float  # over tissue, grey levels
    std: float  # over tissue, grey levels
    blank_pairs: int  # pairs with a side that is all blank
    defects: float | None  # fraction of pixels masked as defects; None: no mask


@dataclass
class _Contents:
    """The sets of all folders, and the problems found so far."""

    images: list[ImageSet] = field(default_factory=list)
    fields: list[FieldSet] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def inspect_dataset(request: InspectRequest) -> None:
    """List the sets of a data set, and check all of them.

    These are checked:

    - names, shapes and checksums;
    - values: finite, not all blank and, for images, normalised;
    - the mips of one location: they show the same area and sections;
    - fields: they lie on their images and were made from them;
    - files left by a stopped run;
    - with a pyramid: each stage finds its images and prior fields.

    Raises:
        DatasetError: something is wrong; the message lists all problems.
        PyramidError: the pyramid cannot be used.
    """
    folders = [request.dataset_path, *filter(None, [request.fields_path])]
    contents = _Contents()
    for folder in folders:
        _open(folder, contents)
    for images in contents.images:
        contents.problems += _report_images(images)
    for fields in contents.fields:
        contents.problems += _report_fields(fields)
    contents.problems += _check_locations(contents.images)
    contents.problems += _check_fields_lie_on_images(contents, request.dataset_path)
    for folder in folders:
        contents.problems += _find_unfinished(folder)
    if request.pyramid_path is not None:
        contents.problems += _check_pyramid(request, contents.images)
    if not contents.images:
        contents.problems.append(
            "no image set; make some with download_image.py --dst_folder "
            f"{request.dataset_path}"
        )
    if contents.problems:
        listed = "\n  ".join(contents.problems)
        raise DatasetError(
            f"{request.dataset_path}: {len(contents.problems)} problems\n  {listed}"
        )
    logger.info(
        "%s: %d image sets, %d field sets, all in order",
        request.dataset_path,
        len(contents.images),
        len(contents.fields),
    )


def _open(folder: Path, contents: _Contents) -> None:
    """Open every set; a broken one becomes a problem and does not stop the rest."""
    check_dataset(folder)
    for path in sorted(folder.glob("*.h5")):
        if path.name.startswith("."):
            continue
        try:
            if ImageSetName.parse(path.name):
                contents.images.append(ImageSet(path))
            elif FieldSetName.parse(path.name):
                contents.fields.append(FieldSet(path))
            else:
                contents.problems.append(
                    f"{path.name}: its name is neither an image set's (x0_y0_z10_"
                    "MIP2.h5) nor a field set's (field_0_x0_y0_z10_MIP2_name.h5)"
                )
        except DatasetError as error:
            contents.problems.append(str(error))


def _report_images(images: ImageSet) -> list[str]:
    """Log a line about an image set; return its problems."""
    name = images.path.name
    problems = []
    try:
        problems += verify(images.path)
        tissue = _measure(images)
    except DatasetError as error:
        return problems + [str(error)]
    kind = (images.normalization or {}).get("kind", "method not stated")
    logger.info(
        "%s, %s: blank %.1f%%, tissue mean %.3g, std %.3g; %s%s",
        _headline(images),
        "as stored" if kind == "raw" else f"normalised ({kind})",
        *(100 * tissue.blank, tissue.mean, tissue.std),
        "" if tissue.defects is None else f"defects {tissue.defects:.2%}; ",
        f"{tissue.blank_pairs} pairs with a blank side" if tissue.blank_pairs else "ok",
    )
    if not np.isfinite(tissue.mean) and tissue.blank < 1:
        problems.append(f"{name}: NaN or infinite grey levels")
    elif (smallest := min(images.shape)) < (least := _least_px()):
        problems.append(
            f"{name}: patches {smallest} px wide; training by default needs at least "
            f"{least} px a side: download larger ones (download_image.py --patch_size)"
        )
    elif tissue.blank_pairs == images.num_pairs:
        problems.append(f"{name}: every pair has a side that is all blank")
    elif not images.has_reference and not looks_normalized(
        GreyStatistics(tissue.mean, tissue.std)
    ):
        problems.append(
            f"{name}: not normalised: tissue has mean {tissue.mean:.3g} and std "
            f"{tissue.std:.3g}, expected 0 and 1; download it with --normalize"
        )
    return problems


def _least_px() -> int:
    """Smallest patch side, px, that the default schedule of train.py can use."""
    stages = load_schedule("scratch", None).phases.values()
    return max(phase.least_px for phases in stages for phase in phases)


def _measure(images: ImageSet) -> _TissueStatistics:
    """Read all images of a set and compute their statistics."""
    count = total = squares = 0.0
    blank_pairs = 0
    defects = []
    for index in range(images.num_pairs):
        tissue = images.read_stored(index).astype(np.float64)
        tissue[tissue < DARKEST] = 0
        masks = images.read_defects(index)
        if masks is not None:
            defects.append(np.mean(masks))
        blank_pairs += not all(side.any() for side in tissue)
        count += np.count_nonzero(tissue)
        total += tissue.sum()
        squares += (tissue**2).sum()
    num_pixels = 2 * images.num_pairs * images.shape[0] * images.shape[1]
    mean = total / count if count else 0.0
    variance = squares / count - mean**2 if count else 0.0
    return _TissueStatistics(
        1 - count / num_pixels,
        mean,
        float(np.sqrt(max(variance, 0))),
        blank_pairs,
        float(np.mean(defects)) if defects else None,
    )


def _report_fields(fields: FieldSet) -> list[str]:
    """Log a line about a field set; return its problems."""
    try:
        problems = verify(fields.path)
    except DatasetError as error:
        return [str(error)]
    squares = largest = 0.0
    for index in range(fields.num_pairs):
        for side in range(fields.num_sides):
            try:
                lengths = np.hypot(*fields.read(index, side).astype(np.float64))
            except DatasetError as error:
                return problems + [str(error)]
            squares += (lengths**2).mean() / (fields.num_pairs * fields.num_sides)
            largest = max(largest, float(lengths.max()))
            if not np.isfinite(lengths).all():
                problems.append(f"{fields.path.name}: NaN in the field of pair {index}")
                largest = np.inf
    logger.info(
        "%s: rms %.3g px, at most %.3g px%s",
        *(_headline(fields), np.sqrt(squares), largest),
        ", for src and tgt" if fields.num_sides == 2 else "",
    )
    return problems


def _headline(pairs: ImageSet | FieldSet) -> str:
    """Describe a set: its name, number of pairs, size, location and sections."""
    z = [pairs.sections(index)[0] for index in range(pairs.num_pairs)]
    grid = pairs.grid(0)
    return (
        f"{pairs.path.name}: {pairs.num_pairs} pairs of {pairs.shape[0]}x"
        f"{pairs.shape[1]} px at mip {pairs.mip}, x {grid.x}, y {grid.y}, src "
        f"{min(z)}...{max(z)}"
        f"{' (original format)' if pairs.is_original else ''}"
    )


def _check_locations(images: list[ImageSet]) -> list[str]:
    """Check that the sets of one location hold the same pairs over the same area."""
    by_location: dict[str, list[ImageSet]] = {}
    for one in images:
        by_location.setdefault(one.name.place, []).append(one)
    return [
        f"{location}: {why}"
        for location, sets in by_location.items()
        for other in sets
        for why in _location_differences(max(sets, key=lambda one: one.mip), other)
    ]


def _location_differences(coarse: ImageSet, fine: ImageSet) -> Iterator[str]:
    """Describe how the first pair that differs between two mips does so."""
    yield from _resolution_difference(coarse, fine)
    if coarse.num_pairs != fine.num_pairs:
        yield (
            f"{coarse.num_pairs} pairs at mip {coarse.mip}, {fine.num_pairs} at mip "
            f"{fine.mip}"
        )
        return
    for index in range(fine.num_pairs):
        if coarse.sections(index) != fine.sections(index):
            yield (
                f"pair {index} is sections {coarse.sections(index)} at mip "
                f"{coarse.mip}, {fine.sections(index)} at mip {fine.mip}"
            )
            return
        a, b = coarse.grid(index), fine.grid(index)
        if not (a.covers(b) or b.covers(a)):
            yield f"pair {index} lies elsewhere at mip {fine.mip} ({b}) than {a}"
            return
    if apart := moved_apart(coarse, fine):
        yield f"mip {fine.mip}: {apart}"


def _resolution_difference(
    one: ImageSet | FieldSet, other: ImageSet | FieldSet
) -> Iterator[str]:
    """Say so if two sets have mip-0 pixels of different sizes."""
    if not same_resolution(one.resolution, other.resolution):
        yield (
            f"mip-0 pixels of {in_nm(one.resolution)} at mip {one.mip}, of "
            f"{in_nm(other.resolution)} in {other.path.name}; mips and coordinates of "
            "the two must mean the same"
        )


def _check_fields_lie_on_images(contents: _Contents, dataset: Path) -> list[str]:
    """Check that each field set has images, lies on them and was made from them."""
    images = {(one.name.place, one.mip): one for one in contents.images}
    problems = []
    for fields in contents.fields:
        name = fields.path.name
        try:
            stale = why_stale(fields, dataset)
        except DatasetError as error:
            stale = str(error)
        if stale:
            problems.append(f"{name}: {stale}")
        of = images.get((fields.name.place, fields.mip))
        if of is None:
            problems.append(
                f"{name}: there is no image set of its location at mip {fields.mip}"
            )
        elif fields.num_pairs != of.num_pairs:
            problems.append(
                f"{name}: {fields.num_pairs} pairs, its images have {of.num_pairs}"
            )
        else:
            problems += [f"{name}: {why}" for why in _mismatch(fields, of)]
        try:
            check_sides(fields, dataset)
        except DatasetError as error:
            problems.append(str(error))
    return problems


def _mismatch(fields: FieldSet, images: ImageSet) -> Iterator[str]:
    """Describe how the first field that does not lie on its images differs."""
    yield from _resolution_difference(fields, images)
    for index in range(fields.num_pairs):
        if fields.grid(index) != images.grid(index):
            yield (
                f"pair {index} lies on {fields.grid(index)}, its images on "
                f"{images.grid(index)}"
            )
            return
        if fields.sections(index) != images.sections(index):
            yield (
                f"pair {index} is sections {fields.sections(index)}, its images "
                f"{images.sections(index)}"
            )
            return
        for _, taken_out, moved in unlike_offsets(fields, images, index):
            yield (
                f"pair {index}: {taken_out} mip-0 px (x, y) were taken out of the "
                f"field, its images were moved by {moved}; download the images with "
                f"--field_dset: {command_to_move(images, fields.path)}"
            )
            return


def _find_unfinished(folder: Path) -> list[str]:
    """Name the files that a stopped run left."""
    left = [*folder.glob(".*.parts"), *folder.glob(".*.h5.tmp-*")]
    return [
        f"{path.name}: not finished; give the same command to resume it, or delete it"
        for path in sorted(left)
    ]


def _check_pyramid(request: InspectRequest, images: list[ImageSet]) -> list[str]:
    """Check that each stage finds images, and from stage 1 prior fields, at its mip.

    Once a stage has its prior fields, the earlier stages need no images.
    """
    assert request.pyramid_path is not None
    problems: list[str] = []
    without_images: list[str] = []
    for module in find_modules(request.pyramid_path):
        sets = [one for one in images if one.mip == module.in_mip]
        missing = []
        if module.stage > 0:
            paths = (
                prior_path(
                    one, module.stage, request.checkpoint_name, request.fields_path
                )
                for one in sets
            )
            missing = [path.name for path in paths if not path.is_file()]
        logger.info(
            "stage %d: %d image sets at mip %d%s",
            *(module.stage, len(sets), module.in_mip),
            f", {len(sets) - len(missing)} with prior fields" if module.stage else "",
        )
        if not sets:
            without_images.append(
                f"stage {module.stage} ({module.path.name}): no image set at mip "
                f"{module.in_mip}"
            )
            continue
        if missing:
            problems += without_images
            problems.append(
                f"stage {module.stage}: no prior fields {', '.join(missing)}; when the "
                f"stage before is trained, write-fields --checkpoint_name "
                f"{request.checkpoint_name} --stages {module.stage - 1} writes them"
            )
        without_images = []
    return problems + without_images
