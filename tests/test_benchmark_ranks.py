"""The benchmarks of several ranks run, on little, and their runs agree."""

from pathlib import Path

import pytest

from tests.benchmark_runs import figures

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.slow


@pytest.mark.long
def test_two_ranks_write_the_fields_of_one_also_after_a_kill(zygote):
    small = ("--rounds", "7", "--pairs", "5", "--side_px", "64")
    found = figures(zygote, "field_generation.py", *small)
    assert len(found["sha256"]) == 1 and 3 <= found["kept_at_kill"] <= 5


@pytest.mark.long
def test_a_node_that_is_killed_and_started_again_ends_with_the_same(
    monkeypatch, zygote
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from two_nodes import why_not

    if missing := why_not():
        pytest.skip(missing)
    small = ("--epochs", "3", "--pairs", "8", "--side_px", "64")
    found = figures(zygote, "two_nodes.py", *small)
    assert found["killed_at_epoch"] < 3
    assert found["last_weights_apart"]["largest"] < 1e-5
    assert found["best_weights_apart"]["largest"] < 1e-5
    assert found["fields_of_one_process_apart_px"] == 0


def test_a_pair_has_a_cost_at_each_side(zygote):
    found = figures(
        zygote, "pair_cost.py", "--sides_px", "64", "96", "--fields_px", "128"
    )
    assert found["96 px"]["field_s"] > 0 and found["64 px"]["step_s"] > 0
    assert found["gradient_bytes"] > 4e5 and found["join_s"] < found["pack_s"]
