"""The memory benchmark runs, on little."""

from pathlib import Path

import pytest

from tests.benchmark_runs import figures

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_training_memory_compares_training_with_its_network(zygote):
    small = ("--side", "256", "--steps", "4", "--templates", "correlation")
    found = figures(zygote, "training_memory.py", *small)["correlation"]
    assert 1 < found["training_per_network"] < 10
    # What checkpointing saves is as small as the noise of a process here; what is kept
    # for the backward pass is counted in tests/training/test_optimising.py.
    assert found["network_mib_checkpointed"] > 0
    assert 0.5 < found["late_per_early"] < 2
