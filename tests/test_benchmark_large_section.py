"""The benchmark of large sections runs, on little."""

from pathlib import Path

import pytest

from tests.benchmark_runs import figures

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.long
def test_large_section_measures_tiles_and_the_whole(zygote):
    sizes = ["--sizes", "192", "544", "--made_px", "192", "--tile", "512", "256"]
    found = figures(zygote, "large_section.py", *sizes)
    assert found["192"]["apart_max_px"] == 0  # not cut at all
    assert found["544"]["tiled"]["bytes_per_px"] > 0
    assert found["544"]["apart_max_px"] < 1e-3  # but for rounding
