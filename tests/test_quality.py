"""The figures of benchmarks/quality.py against hand-made results."""

import json
import re
from pathlib import Path

import bench_adapter
import numpy as np
import pytest
import torch
from PIL import Image
from quality_cases import Solved, picked
from quality_page import Page, Pair, save_curves, save_pair, write_page
from quality_results import (
    FULL,
    METHODS,
    NETWORKS,
    NONE,
    STAGE0,
    Checks,
    Results,
    bar_of_distilling,
    bar_of_training,
    bars_of_cases,
)

from metroem.errors import DatasetError
from metroem.evaluation.report.curves import Curve
from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from tests.pairs import texture

ROOT = Path(__file__).parents[1]
META = {"stack_sha256": "5a", "seed": 0, "sections": 2, "shape": [40, 56], "limit": 1}
META |= {"cpu": "a CPU", "cores": 2, "threads": 1}
CHECKS = Checks({FULL: 0.01, NETWORKS: 0.02}, {FULL: 0.0, NETWORKS: 1.5})


def record(method, family, label, epe, **others):
    """What the bench writes for one case."""
    case = {"method": method, "family": family, "label": label, "z": 1}
    case |= {"case": f"{family}-{label}-z01-s0", "wall_s": 0.5, "fold_frac": 0.0}
    figures = {"epe_mean": epe, "epe_outliers": epe / 100, "cpc64": 0.75}
    if family == "C":
        figures["near_mean"] = 2 * epe
    if label == "12px":
        figures["cycle_p95"] = epe / 2
    return {**case, **figures, "cpc64_truth": 0.7, **others}


def records(method, *, a, b, c, unwarped=0.0):
    return [
        record(method, "B", "00px", unwarped),
        record(method, "A", "12px", a),
        record(method, "B", "12px", b - 0.5),
        record(method, "B", "30px", b + 0.5),
        record(method, "C", "fold", c),
    ]


def results(*methods):
    return Results(META, tuple(one for method in methods for one in method))


OURS = results(
    records(FULL, a=0.5, b=1.0, c=1.5, unwarped=0.25),
    records(NETWORKS, a=0.75, b=1.25, c=1.75, unwarped=0.5),
    records(STAGE0, a=1.0, b=1.5, c=12.0),
)
PEERS = results(
    records(NONE, a=10.0, b=11.0, c=12.5),
    records("flow", a=1.0, b=2.0, c=4.0, unwarped=1.5),
    records("spline", a=0.5, b=3.0, c=3.0),
)
BOTH = OURS.with_peers(PEERS)


@pytest.mark.parametrize(
    ("what", "limit", "found"),
    [
        ("EPE in A", 0.8 * 0.5, 0.5),  # spline is best
        ("mean EPE in B", 0.6 * 2.0, 1.0),  # flow is
        ("EPE in C", 0.6 * 3.0, 1.5),
        ("near defects", 0.6 * 6.0, 3.0),
        ("more than 8 px in B", 2.0, 1.0),  # percent
        ("cycle error", 0.75, 0.25),  # of B at 12 px alone
        ("CPC 64", 0.02, 0.05),
        ("folds", 0.0, 0.0),
        ("onto itself", 0.05, 0.01),
        ("worse than no alignment", 0.0, 0.0),
        ("finetuned: mean EPE in B", 2.0, 1.5),
    ],
)
def test_a_bar_is_what_the_best_peer_leaves_or_fixed(what, limit, found):
    bars = [bar for bar in bars_of_cases(BOTH, CHECKS) if what in bar.what]
    assert bars[0].limit == pytest.approx(limit)
    assert bars[0].found == pytest.approx(found)
    assert bars[0].is_met == (found <= limit)


def test_unwarped_pairs_count_only_where_they_are_asked_for():
    assert BOTH.mean(FULL, "epe_mean", "B") == pytest.approx(1.0)
    assert BOTH.mean(FULL, "epe_mean", "B", "00px") == 0.25
    assert BOTH.worse_than_none(FULL) == []


def test_pairs_that_come_out_worse_than_they_were_are_named():
    worse = results(records(FULL, a=10.5, b=1.0, c=float("nan")))
    found = worse.with_peers(PEERS).worse_than_none(FULL)
    assert found == ["A-12px-z01-s0", "C-fold-z01-s0"]


def test_peers_on_other_cases_or_another_stack_are_refused():
    lacking = Results(META, tuple(r for r in PEERS.records if r["family"] != "C"))
    with pytest.raises(DatasetError, match="C-fold-z01-s0"):
        OURS.with_peers(lacking)
    other = Results({**META, "stack_sha256": "6b"}, PEERS.records)
    with pytest.raises(DatasetError, match="6b"):
        OURS.with_peers(other)


@pytest.mark.parametrize(("method", "is_refused"), [("flow", False), (FULL, True)])
def test_a_peer_that_failed_is_left_out_but_ours_may_not_fail(
    tmp_path, method, is_refused
):
    content = {"meta": META, "records": [*BOTH.records], "skipped": {}}
    content["records"].append({"method": method, "error": "too small"})
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    if is_refused:
        with pytest.raises(DatasetError, match="too small"):
            Results.read(path)
        return
    found = Results.read(path)
    assert found.peers == ["spline"] and found.failed == ("flow",)


def test_distilling_is_measured_by_the_steps_to_an_equal_error():
    without = {0: 2.0, 1: 1.5, 5: 1.02, 9: 1.0}
    found = bar_of_distilling(without, {0: 1.2, 1: 1.03, 5: 1.0, 9: 1.0})
    assert found.found == pytest.approx(1 / 5) and found.is_met
    assert not bar_of_distilling(without, {0: 2.0, 9: 1.1}).is_met
    # Where finetuning gains nothing there is nothing to save.
    assert bar_of_distilling({0: 1.0, 9: 1.0}, without).is_met is None


def test_training_is_measured_in_minutes():
    assert bar_of_training(1800.0).is_met
    assert not bar_of_training(1801.0).is_met
    assert bar_of_training(None).is_met is None


def test_the_best_median_and_worst_pair_are_shown():
    chosen = picked(BOTH, "B")
    labels = {which: record["label"] for which, record in chosen.items()}
    assert labels == {"best": "12px", "median": "30px", "worst": "30px"}


def test_the_page_shows_figures_and_pictures_and_where_the_log_is(tmp_path):
    path = tmp_path / "quality.md"
    pairs = {"A": [Pair("best", "A-12px", 0.5, "quality/A_best.png")]}
    bars = bars_of_cases(BOTH, CHECKS)
    page = Page("python it", bars, BOTH, None, "quality/curves.png", pairs, ["Note."])

    write_page(path, page)

    text = path.read_text()
    assert (
        "| mean EPE in B, px | 0.6 of flow | 1.20 | 1.00 | 1.25 | 0.50 | yes |" in text
    )
    assert "MetroEM 0.25" in text and "flow 1.50" in text  # the unwarped pairs
    assert "](quality/A_best.png)" in text
    (log,) = re.findall(r"\]\((.*log\.md)\)", text)
    assert (ROOT / "benchmarks" / log).is_file()


def test_a_picture_of_a_pair_is_small_even_if_the_sections_are_noise(tmp_path):
    src, tgt, warped = np.random.default_rng(0).random((3, 520, 500), np.float32)
    truth = np.stack(np.meshgrid(*(np.linspace(-9, 9, side) for side in (500, 520))))
    field, valid = 0.9 * truth, np.ones((520, 500), bool)

    save_pair(tmp_path / "p.png", Solved({}, src, tgt, warped, field, truth, valid))

    assert (tmp_path / "p.png").stat().st_size < 300_000


def test_curves_are_drawn_side_by_side(tmp_path):
    values = {"training": (3.0, 1.5), "validation": (2.0, 1.0)}
    curves = [Curve(stage, "loss", (1.0, 2.0), (0, 1), values) for stage in (0, 1)]
    save_curves(tmp_path / "curves.png", curves)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width == 2 * 420


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    path = tmp_path_factory.mktemp("quality") / "pyramid"
    torch.manual_seed(7)
    for module in init_pyramid(path, [1, 0]):
        aligner = load_module(module, checkpoint_name=None).aligner
        aligner.save_checkpoint(module / "model")
    threads = torch.get_num_threads()
    yield str(path)
    torch.set_num_threads(threads)


@pytest.fixture
def pair():
    return [texture(64, 80, seed)[0, 0].numpy() for seed in (1, 2)]


def test_the_adapter_gives_the_fields_of_the_pyramid(pyramid, pair):
    alone = bench_adapter.load(pyramid).fields(*pair, finetune=False)
    found = [bench_adapter.first_stage, bench_adapter.networks]
    for method, wanted in zip(found, alone, strict=True):
        np.testing.assert_array_equal(method(*pair, pyramid), wanted)


def test_the_adapter_limits_the_finetuning_and_gives_it_back(pyramid, pair):
    options = [aligner.options for aligner in bench_adapter.load(pyramid).aligners]
    none, little, full = (
        bench_adapter.finetuned_for(*pair, pyramid, steps) for steps in (0, 1, 300)
    )
    np.testing.assert_array_equal(none, bench_adapter.networks(*pair, pyramid))
    np.testing.assert_array_equal(full, bench_adapter.align(*pair, pyramid))
    assert not np.array_equal(little, none) and not np.array_equal(little, full)
    after = [aligner.options for aligner in bench_adapter.load(pyramid).aligners]
    assert after == options


def test_the_adapter_finetunes_fresh_weights_that_are_always_the_same(pyramid, pair):
    found = bench_adapter.untrained(*pair, pyramid)
    bench_adapter.fresh.cache_clear()
    np.testing.assert_array_equal(found, bench_adapter.untrained(*pair, pyramid))
    assert not np.array_equal(found, bench_adapter.align(*pair, pyramid))


def test_every_method_is_a_function_of_the_adapter():
    for function, _ in METHODS.values():
        assert callable(getattr(bench_adapter, function))
