"""The memory benchmark runs, on little."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def test_training_memory_compares_training_with_its_network():
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "training_memory.py")),
            *("--side", "256", "--steps", "4", "--templates", "correlation"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])["correlation"]
    assert 1 < found["training_per_network"] < 10
    # What checkpointing saves is as small as the noise of a process here; what is kept
    # for the backward pass is counted in tests/training/test_optimising.py.
    assert found["network_mib_checkpointed"] > 0
    assert 0.5 < found["late_per_early"] < 2
