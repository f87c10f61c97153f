"""Measure how well a pyramid aligns a data set, and where it is worst."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import takewhile
from typing import Any, NamedTuple

import torch

from metroem import __version__
from metroem.errors import CheckpointError, DatasetError
from metroem.evaluation.measure import Measured, Measurer
from metroem.evaluation.plan import (
    TRAINED_ON,
    Location,
    Task,
    find_locations,
    find_roles,
    list_tasks,
    select_pairs,
)
from metroem.evaluation.predictions import (
    fields_bytes,
    open_predictions,
    prediction_key,
)
from metroem.evaluation.report.curves import Curve, read_curves
from metroem.evaluation.report.page import ReportPage, pair_origin, report_page
from metroem.evaluation.requests import EvaluateRequest
from metroem.evaluation.scores import (
    BORDER_PX,
    CHUNK_PX,
    RING_PX,
    AlignedPair,
    Group,
    SetResult,
    WarpedSection,
    mean_score,
    without_value,
)
from metroem.evaluation.tables import print_evaluation, write_json
from metroem.evaluation.workers import choose_workers, run_tasks
from metroem.io.files import remove_partial_files, try_writing
from metroem.io.resume import ResumeStore
from metroem.models.weights import check_weights, weight_names
from metroem.specs.modules import ModuleSpec, find_modules, select_stages
from metroem.training.checkpoint import RunFolder
from metroem.utils import format_versions
from metroem.utils.distributed import choose_device
from metroem.utils.memory import enough_memory
from metroem.utils.progress import progress
from metroem.utils.stop_request import StopRequest

logger = logging.getLogger(__name__)

# Flags that change no figure, so that files do not depend on them.
_NOT_WRITTEN = ("workers", "predictions")


class Coverage(NamedTuple):
    """How many pairs were evaluated."""

    done: int
    asked: int  # `done` is less after a signal
    in_data_set: int  # `asked` is less with --max_pairs
    was_stopped: bool  # before all that was asked was done; sections count, too


class _Plan(NamedTuple):
    """All that is evaluated, and with what."""

    modules: list[ModuleSpec]
    checkpoint_name: str | None  # None: no module has weights
    locations: list[Location]
    tasks: list[Task]
    keys: list[str]  # of the fields of each task
    num_in_data_set: int
    device: torch.device
    num_workers: int


def evaluate_dataset(request: EvaluateRequest) -> None:
    """Align every pair of a data set, then print and write the figures.

    Each stage reads the image sets of its own mip. Figures are in pixels of the last
    stage's mip. Grey levels are taken as they are in the files. The fields of each pair
    are kept, and taken by the next run with the same weights and images.

    Raises:
        PyramidError: the pyramid cannot be used, or lacks a stage of --stages.
        CheckpointError: some modules lack these weights. If no module has any, the
            figures are those of untrained networks; all are written before this error.
        DatasetError: a stage's mip has no images, images are too small to measure, or
            no pair can be compared.
        StorageError: a result file cannot be written, or another run is evaluating the
            same.
        ResourceError: memory ran out, or a process of --workers died.
        SystemExit: with 130 or 143 after a signal; files of the pairs done so far are
            written before.
    """
    plan = _make_plan(request)
    if request.json is not None:
        try_writing(request.json.parent)
    curves = [] if request.report is None else _curves(request)
    kept = open_predictions(request, plan.modules, plan.checkpoint_name, plan.keys)
    with kept as store, StopRequest(None) as stop:
        _log_plan(request, plan, store)
        if request.report is not None and request.report.parent.is_dir():
            remove_partial_files(request.report)
        with (
            nullcontext()
            if request.report is None
            else report_page(request.report) as page
        ):
            with enough_memory("evaluation", "take smaller patches, fewer --workers"):
                done = _run(request, plan, store, page, stop)
            num_done = sum(not task.is_known for task, _ in done)
            num_asked = sum(not task.is_known for task in plan.tasks)
            coverage = Coverage(
                num_done, num_asked, plan.num_in_data_set, len(done) < len(plan.tasks)
            )
            if not done:
                logger.info("stopped before the first pair was done")
                sys.exit(stop.code)
            results = _results(plan.locations, done)
            settings = {"chunk_px": CHUNK_PX, "border_px": BORDER_PX}
            about = vars(request) | settings | {"ring_px": RING_PX}
            about = {k: v for k, v in about.items() if k not in _NOT_WRITTEN}
            about["coverage"] = coverage
            if page is not None:
                page.finish(about | _page_facts(plan.modules, curves), results)
        # Written first, since printing may fail.
        if request.json is not None:
            version = {"format_version": format_versions.FIGURES}
            write_json(request.json, version | about | {"sets": results})
    print_evaluation(results)
    for path in (request.json, request.report):
        if path is not None:
            logger.info("wrote %s", path)
    _warn_of_trained_pairs(results)
    if coverage.was_stopped:
        logger.info(
            "stopped: %d of %d pairs; the same command resumes from here",
            *(coverage.done, coverage.asked),
        )
        sys.exit(stop.code)
    _check_results(request, plan, results)


def _make_plan(request: EvaluateRequest) -> _Plan:
    modules = find_modules(request.pyramid_path)
    modules = select_stages(modules, request.stages, "--stages")
    name = _checkpoint_name(modules, request)
    locations = find_locations(request, modules)
    num_in_data_set = sum(len(location.indices) for location in locations)
    if request.max_pairs is not None:
        locations = select_pairs(locations, request.max_pairs)
    roles = find_roles(request, modules, locations)
    tasks = list_tasks(locations, roles, known_warps=request.known_warps)
    keys = [prediction_key(locations[task.location], task) for task in tasks]
    device = choose_device("auto", ())
    num_workers = choose_workers(request.workers, device, len(tasks))
    return _Plan(
        modules, name, locations, tasks, keys, num_in_data_set, device, num_workers
    )


def _log_plan(request: EvaluateRequest, plan: _Plan, store: ResumeStore) -> None:
    """Say what is going to be done, with what, and what is kept."""
    num_known = sum(task.is_known for task in plan.tasks)
    num_pairs = len(plan.tasks) - num_known
    pairs = f"{num_pairs} pairs"
    if num_pairs < plan.num_in_data_set:
        pairs = f"{num_pairs} of {plan.num_in_data_set} pairs"
    known = f", {num_known} warped sections" if num_known else ""
    stages = ", ".join(f"{m.stage} (mip {m.in_mip})" for m in plan.modules)
    processes = (
        "1 process" if plan.num_workers == 1 else f"{plan.num_workers} processes"
    )
    logger.info(
        "%s of %d image sets%s; stages %s; device %s, %s of one thread",
        *(pairs, len(plan.locations), known, stages, plan.device, processes),
    )
    num_bytes = sum(
        fields_bytes(plan.locations[task.location], task) for task in plan.tasks
    )
    num_kept = sum(store.has(key) for key in plan.keys)
    logger.info(
        "fields take %.0f MB in %s: %d of %d are there already",
        *(num_bytes / 1e6, store.folder, num_kept, len(plan.keys)),
    )


def _run(
    request: EvaluateRequest,
    plan: _Plan,
    store: ResumeStore,
    page: ReportPage | None,
    stop: StopRequest,
) -> list[tuple[Task, Measured]]:
    """Do the tasks and add them to the page, in order; after a signal, some of them."""
    measurer = Measurer(
        pyramid_path=request.pyramid_path,
        checkpoint_name=plan.checkpoint_name,
        num_stages=len(plan.modules),
        device=plan.device,
        finetune=not request.no_finetune,
        locations=plan.locations,
        store=store,
        draws=page is not None,
    )
    # Kept fields are measured fast, so they get a progress of their own: else it would
    # promise the same speed for the rest.
    num_kept = sum(1 for _ in takewhile(store.has, plan.keys))
    parts = (
        ("pairs and sections measured again", plan.tasks[:num_kept]),
        ("pairs and sections aligned", plan.tasks[num_kept:]),
    )
    done = []
    for what, tasks in parts:
        if not tasks or stop.code:
            continue
        results = run_tasks(measurer, tasks, plan.num_workers, stop)
        for task, measured in progress(results, what, total=len(tasks)):
            if page is not None and measured.drawn is not None:
                images = plan.locations[task.location].finest
                origin = pair_origin(images, measured.figures.where.pair)
                page.add(origin, measured.figures, measured.drawn)
            done.append((task, measured._replace(drawn=None)))
    return done


def _results(
    locations: Sequence[Location], done: Sequence[tuple[Task, Measured]]
) -> list[SetResult]:
    """Average the figures of each image set that has any."""
    results = []
    for number, location in enumerate(locations):
        figures = [one.figures for task, one in done if task.location == number]
        pairs = tuple(one for one in figures if isinstance(one, AlignedPair))
        known = tuple(one for one in figures if isinstance(one, WarpedSection))
        if not pairs:
            continue
        images = location.finest
        mean = mean_score([pair.score for pair in pairs])
        result = SetResult(images.path.name, images.mip, *images.shape, mean, pairs)
        if known:
            result = result._replace(
                mean_known=mean_score([section.score for section in known]),
                known=known,
                known_without_value=without_value(known),
            )
        results.append(
            result._replace(
                without_value=without_value(pairs), groups=_group_by_role(pairs)
            )
        )
    return results


def _group_by_role(pairs: Sequence[AlignedPair]) -> Mapping[str, Group]:
    """Average the figures of the pairs of each role; nothing if all have one role."""
    by_role: dict[str, list[AlignedPair]] = {}
    for pair in pairs:
        by_role.setdefault(pair.role, []).append(pair)
    if len(by_role) == 1:
        return {}
    return {
        role: Group(
            len(group) - without_value(group), mean_score([p.score for p in group])
        )
        for role, group in sorted(by_role.items())
    }


def _warn_of_trained_pairs(results: Sequence[SetResult]) -> None:
    """Say that figures flatter where the networks have seen the pairs."""
    pairs = [pair for result in results for pair in result.pairs]
    num_trained = sum(pair.role == TRAINED_ON for pair in pairs)
    if num_trained == len(pairs):
        logger.warning("these pairs were trained on: figures flatter")
    elif num_trained:
        logger.warning(
            "%d of %d pairs were trained on: their figures flatter; the others are "
            "averaged separately",
            *(num_trained, len(pairs)),
        )


def _check_results(
    request: EvaluateRequest, plan: _Plan, results: Sequence[SetResult]
) -> None:
    """Refuse figures that say nothing of a trained pyramid."""
    if all(len(r.pairs) == r.without_value for r in results):
        raise DatasetError(
            f"{request.dataset_path}: no pair can be compared: none has "
            f"{CHUNK_PX} px of tissue with contrast in both sections where they overlap"
        )
    if plan.checkpoint_name is None:
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
