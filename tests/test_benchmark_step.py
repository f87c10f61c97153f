"""The benchmarks of training run, on little, and say what they measured."""

from pathlib import Path

import pytest

from tests.benchmark_runs import figures

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow
needs_original = pytest.mark.skipif(
    not (ROOT / ".venv-original" / "bin" / "python").is_file(),
    reason="no environment of the original; make it with: make original",
)


def test_train_step_compares_each_kind_with_the_bare_network(zygote):
    found = figures(
        zygote,
        "train_step.py",
        *("--size", "96", "--rounds", "7", "--template", "correlation"),
    )
    of_bare = found["correlation"]["of_bare"]
    assert of_bare["bare"] == 1 and len(of_bare) == 4


@needs_original
def test_a_step_of_ours_minimises_what_the_original_does(zygote):
    found = figures(
        zygote,
        "train_step_against_original.py",
        *("--size", "256", "--rounds", "7", "--loss", "metric"),
    )
    losses = found["losses"]
    # Of fields that are still small: the operators and the samplers differ.
    original = losses["metric: original"]
    assert losses["metric: ours"] == pytest.approx(original, rel=1e-3)
    assert found["metric: original / ours"] > 0


@needs_original
def test_time_to_quality_follows_both(zygote):
    found = figures(
        zygote,
        "time_to_quality.py",
        *("--size", "96", "--sections", "14", "--original_seconds", "1"),
        *("--train_flags", "--max_epochs", "1", "--batch_size", "25"),
    )
    assert found["epe_none"] > 1
    assert found["ours"]["curve"] and found["original"]["curve"]
