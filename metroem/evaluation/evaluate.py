"""Measure how well a pyramid aligns a data set, and where it is worst."""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metroem import __version__
from metroem.data.dataset import PairRef, find_pairs, read_sample
from metroem.data.known_warp import warp_section
from metroem.data.photometric import augment_photometric
from metroem.data.sample import Sample, seeded_generator, with_defects
from metroem.errors import CheckpointError, DatasetError
from metroem.evaluation.report.curves import Curve, read_curves
from metroem.evaluation.report.page import ReportPage, report_page
from metroem.evaluation.requests import EvaluateRequest
from metroem.evaluation.scores import (
    BORDER_PX,
    CHUNK_PX,
    NO_WARP_SCORE,
    RING_FRACTION,
    RING_PX,
    AlignedPair,
    Chunk,
    SetResult,
    Spot,
    WarpedSection,
    Where,
    can_be_compared,
    mean_score,
    score_aligned,
    score_known,
    without_value,
)
from metroem.evaluation.tables import print_evaluation, write_json
from metroem.geometry.field import resample_field
from metroem.io.files import try_writing
from metroem.io.h5 import ImageSet, find_image_sets
from metroem.models.weights import check_weights, weight_names
from metroem.pyramid import Pyramid, StageInput
from metroem.specs.augmentations import KnownWarp, Photometric
from metroem.specs.modules import ModuleSpec, find_modules
from metroem.synthetic.distortion import GroundTruth
from metroem.training.checkpoint import RunFolder
from metroem.training.write_fields import target_sets
from metroem.utils import format_versions
from metroem.utils.distributed import choose_device
from metroem.utils.memory import enough_memory
from metroem.utils.progress import progress

logger = logging.getLogger(__name__)

# The known warps, and the new noise and contrast that each side gets.
_WARP, _IMAGING = KnownWarp(), Photometric()


class _Location(NamedTuple):
    """The image sets of one location, and its pairs that have tissue."""

    sets: tuple[ImageSet, ...]  # one per stage
    indices: tuple[int, ...]

    @property
    def finest(self) -> ImageSet:
        """The set of the last stage; all figures are in its pixels."""
        return self.sets[-1]


class _Run(NamedTuple):
    """The pyramid, the request and the page; they are the same for all locations."""

    pyramid: Pyramid
    request: EvaluateRequest
    page: ReportPage | None  # None without --report

    @property
    def finetune(self) -> bool:
        """Whether each stage improves its field on the pair itself."""
        return not self.request.no_finetune


def evaluate_dataset(request: EvaluateRequest) -> None:
    """Align every pair of a data set, then print and write the figures.

    Each stage reads the image sets of its own mip. Figures are in pixels of the
    last stage's mip. Grey levels are taken as they are in the files.

    Raises:
        PyramidError: the pyramid cannot be used.
        CheckpointError: some modules lack these weights. If no module has any, the
            figures are those of untrained networks; all are written before this error.
        DatasetError: a stage's mip has no images, images are too small to measure, or
            no pair can be compared.
        StorageError: a result file cannot be written.
    """
    modules = find_modules(request.pyramid_path)
    name = _checkpoint_name(modules, request)
    locations = _find_locations(request, modules)
    if request.json is not None:
        try_writing(request.json.parent)
    settings = {"chunk_px": CHUNK_PX, "border_px": BORDER_PX, "ring_px": RING_PX}
    about = vars(request) | settings
    device = choose_device("auto", ())
    pyramid = Pyramid.load(request.pyramid_path, name, device)
    curves = [] if request.report is None else _curves(request)
    with (
        nullcontext() if request.report is None else report_page(request.report) as page
    ):
        run = _Run(pyramid, request, page)
        with enough_memory("evaluation", "take smaller patches"):
            results = [_evaluate_location(run, location) for location in locations]
        if page is not None:
            page.finish(about | _page_facts(modules, curves), results)
    # Written first, since printing may fail.
    if request.json is not None:
        version = {"format_version": format_versions.FIGURES}
        write_json(request.json, version | about | {"sets": results})
    print_evaluation(results)
    for path in (request.json, request.report):
        if path is not None:
            logger.info("wrote %s", path)
    if all(len(r.pairs) == r.without_value for r in results):
        raise DatasetError(
            f"{request.dataset_path}: no pair can be compared: none has "
            f"{CHUNK_PX} px of tissue with contrast in both sections where they overlap"
        )
    if name is None:
        raise CheckpointError(
            f"{request.pyramid_path}: no module has weights: these figures are of "
            "UNTRAINED networks; train them first (train.py), or name other weights "
            "(--checkpoint_name)"
        )


def _curves(request: EvaluateRequest) -> list[Curve]:
    """Read the training curves; none if the pyramid was trained elsewhere."""
    metrics = RunFolder.of(request.pyramid_path, request.checkpoint_name).metrics
    if not metrics.is_file():
        logger.warning("%s: no such file, so the page has no curves", metrics)
        return []
    return read_curves(metrics)


def _page_facts(
    modules: Sequence[ModuleSpec], curves: Sequence[Curve]
) -> dict[str, Any]:
    stages = [f"stage {m.stage} (mip {m.in_mip})" for m in modules]
    made = time.strftime("%Y-%m-%d %H:%M")
    return {"stages": stages, "curves": curves, "made": made, "version": __version__}


def _checkpoint_name(
    modules: Sequence[ModuleSpec], request: EvaluateRequest
) -> str | None:
    """Choose the weights; None for a pyramid that is not trained yet."""
    name = request.checkpoint_name
    if name == EvaluateRequest.checkpoint_name and not weight_names(modules):
        logger.warning("%s: no module has weights: UNTRAINED", request.pyramid_path)
        return None
    check_weights(modules, name, f"--checkpoint_name {name}")
    return name


def _find_locations(
    request: EvaluateRequest, modules: Sequence[ModuleSpec]
) -> list[_Location]:
    """Find locations with images at every stage's mip, and their pairs with tissue."""
    folder, mips = request.dataset_path, [module.in_mip for module in modules]
    there = sorted({images.mip for images in find_image_sets(folder)})
    for module in modules:
        if module.in_mip not in there:
            raise DatasetError(
                f"{folder}: stage {module.stage} ({module.name}) reads mip "
                f"{module.in_mip}, but image sets exist only at mips {there}; "
                "evaluation runs every stage, also one whose fields were downloaded: "
                f"get the images with download_image.py --mip {module.in_mip}"
            )
    pairs: dict[Path, list[PairRef]] = {}
    refs = find_pairs(
        folder, mips[-1], stage=0, checkpoint_name="", verifies=request.verify
    )
    for ref in refs:
        pairs.setdefault(ref.images.path, []).append(ref)
    finest = [refs[0].images for refs in pairs.values()]
    for images in finest:
        if min(images.shape) < CHUNK_PX + BORDER_PX:
            raise DatasetError(
                f"{images.path}: images of {images.shape[0]} x {images.shape[1]} px; "
                f"at least {CHUNK_PX + BORDER_PX} px are needed to measure chunks of "
                f"{CHUNK_PX} px off a border of {BORDER_PX} px"
            )
    by_stage = [target_sets(folder, finest, mip) for mip in mips]
    return [
        _Location(sets, tuple(ref.index for ref in pairs[sets[-1].path]))
        for sets in zip(*by_stage, strict=True)
    ]


def _evaluate_location(run: _Run, location: _Location) -> SetResult:
    """Evaluate all pairs of one location."""
    images = location.finest
    what = f"{images.path.name}, pairs aligned"
    pairs = tuple(
        _evaluate_pair(run, location, index)
        for index in progress(location.indices, what, total=len(location.indices))
    )
    mean = mean_score([pair.score for pair in pairs])
    result = SetResult(images.path.name, images.mip, *images.shape, mean, pairs)
    result = result._replace(without_value=without_value(pairs))
    if not run.request.known_warps:
        return result
    what = f"{images.path.name}, sections warped"
    known = tuple(
        _evaluate_warped(run, images, index)
        for index in progress(location.indices, what, total=len(location.indices))
    )
    mean_known = mean_score([section.score for section in known])
    return result._replace(
        mean_known=mean_known, known=known, known_without_value=without_value(known)
    )


def _evaluate_pair(run: _Run, location: _Location, index: int) -> AlignedPair:
    """Align a pair both ways, score it, and draw it if there is a page."""
    inputs = []
    for images in location.sets:
        grid = images.grid(index)
        sample = read_sample(PairRef(images, None, index), grid)
        inputs.append(StageInput(sample, grid))
    forward, backward = run.pyramid.run_both_ways(inputs, run.finetune)
    sample = with_defects(inputs[-1].sample)
    score, worst = score_aligned(sample, forward[-1].cpu(), backward[-1].cpu())
    where = _where(location.finest, index, location.finest.sections(index), worst)
    pair = AlignedPair(where, score)
    if run.page is not None:
        fields = [
            resample_field(field.cpu(), stage.grid, inputs[-1].grid)
            for field, stage in zip(forward, inputs, strict=True)
        ]
        run.page.add(location.finest, pair, sample, fields)
    return pair


def _evaluate_warped(run: _Run, images: ImageSet, index: int) -> WarpedSection:
    """Align a tgt section with itself: warped by a known field, and unchanged.

    With the known field, both sides get new noise and contrast. Coarser stages see the
    section averaged to their mips, not the image sets of those mips.
    """
    section = torch.from_numpy(images.read(index).tgt)[None, None]
    name, z = images.name, images.sections(index)[1]
    generator = seeded_generator(name.x, name.y, z, images.mip)
    warped = warp_section(section, _WARP, generator)
    src = augment_photometric(warped.image, _IMAGING, generator)
    tgt = augment_photometric(section, _IMAGING, generator)
    field, identity = (
        torch.from_numpy(
            run.pyramid.fields(
                a[0, 0].numpy(), b[0, 0].numpy(), images.mip, run.finetune
            )[-1]
        )[None]
        for a, b in ((src, tgt), (section, section))
    )
    truth = GroundTruth(warped.field, warped.valid)
    score, worst = NO_WARP_SCORE, None
    on_itself = Sample(section, section, None, ())
    if can_be_compared(on_itself, min_fraction=RING_FRACTION):  # EPE is per pixel
        score, worst = score_known(field, truth, warped.near, identity)
    return WarpedSection(_where(images, index, (z, z), worst), score)


def _where(
    images: ImageSet, index: int, sections: tuple[int, int], worst: Chunk | None
) -> Where:
    """Name the pair, and place its worst chunk in the volume, where tgt was read."""
    spot = None
    if worst is not None:
        x, y, *_ = images.box(index, 1)
        scale = 2**images.mip
        spot = Spot(worst.figure, x + worst.row * scale, y + worst.col * scale)
    return Where(images.path.name, index, *sections, spot)
