"""Benchmarks run as people run them, on little."""

import json
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(zygote, script, *arguments):
    """Run a script of `benchmarks/` to its end, whatever that is."""
    return zygote.run(BENCHMARKS.parent, [BENCHMARKS / script, *arguments])


def figures(zygote, script, *arguments):
    """The JSON of a benchmark's last line on stdout."""
    done = run(zygote, script, *arguments)
    assert done["status"] == 0, done["output"][-4000:]
    return json.loads(done["printed"].splitlines()[-1])
