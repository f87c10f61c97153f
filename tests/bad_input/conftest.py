"""What each reader was given and how it ended, as a table at the end of a run.

python -m pytest tests/bad_input -m ""
"""

import resource
from collections import Counter

import pytest

from tests.bad_input.inputs import TRIED

MOST_GIB = 1.0


@pytest.fixture(autouse=True, scope="module")
def memory_is_bounded():
    """No input takes more than 1 GiB beyond what the process had before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown / 2**20 < MOST_GIB


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What was printed may name files that are no UTF-8, which xdist cannot send."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode())
        for name, text in report.sections
    ]
    return report


def pytest_terminal_summary(terminalreporter):
    """One line a reader, and the sum."""
    if not TRIED:
        return
    readers: dict[str, Counter] = {}
    for (reader, ended), times in TRIED.items():
        readers.setdefault(reader, Counter())[ended] += times
    terminalreporter.section("bad input")
    for reader, ends in sorted(readers.items()):
        terminalreporter.write_line(
            f"{reader:>24}: {ends.total():6d} tried, {ends['read']:6d} read, "
            f"{ends['refused']:6d} refused, {ends['other']} otherwise"
        )
    terminalreporter.write_line(f"{'in all':>24}: {sum(TRIED.values()):6d} tried")
