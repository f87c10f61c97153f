"""The benchmark of large sections runs, on little."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_large_section_measures_tiles_and_the_whole():
    sizes = ["--sizes", "192", "544", "--made_px", "192", "--tile", "512", "256"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "large_section.py"), *sizes],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["192"]["apart_max_px"] == 0  # not cut at all
    assert found["544"]["tiled"]["bytes_per_px"] > 0
    assert found["544"]["apart_max_px"] < 1e-3  # but for rounding
