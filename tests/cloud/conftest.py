"""Print a table at the end: how runs against a failing server ended.

python -m pytest tests/cloud/test_patterns.py -m ""
"""

from tests.cloud.flaky import ENDED, MET

_HOW = ("complete", "failed, named", "other")


def pytest_terminal_summary(terminalreporter):
    """Print one line per command that was run, and the faults that occurred."""
    if not ENDED:
        return
    terminalreporter.section("network")
    for what in [*sorted({what for what, _ in ENDED}), "in all"]:
        ends = [
            sum(n for (w, e), n in ENDED.items() if e == how and what in (w, "in all"))
            for how in _HOW
        ]
        terminalreporter.write_line(
            f"{what:>24}: {sum(ends):4d} patterns, {ends[0]:4d} complete and equal, "
            f"{ends[1]:4d} failed with a name, {ends[2]} otherwise"
        )
    met = ", ".join(f"{kind} {times}" for kind, times in sorted(MET.items()))
    terminalreporter.write_line(f"faults met: {met}")
