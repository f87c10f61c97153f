"""Where commands are run and disturbed; the faults tried, as a table at the end.

python -m pytest tests/faults -m ""
"""

import pytest

from tests.faults.places import TRIED, Place, make_place


@pytest.fixture(scope="session")
def place(zygote, tmp_path_factory) -> Place:
    """What all commands start from, and what they make of it undisturbed."""
    return make_place(zygote, tmp_path_factory.mktemp("faults"))


def pytest_terminal_summary(terminalreporter):
    """One line a fault and command."""
    if not TRIED:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':<28}{'command':<18}{'tried':>6} survived")
    for (fault, command), (tried, survived) in sorted(TRIED.items()):
        line = f"{fault:<28}{command:<18}{tried:>6} {survived:>8}"
        terminalreporter.write_line(line)
    sums = [sum(counts) for counts in zip(*TRIED.values(), strict=True)]
    terminalreporter.write_line(f"{'in all':<46}{sums[0]:>6} {sums[1]:>8}")
