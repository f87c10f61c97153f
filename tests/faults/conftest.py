"""Make folders in which commands are disturbed; print a table of faults at the end.

python -m pytest tests/faults -m ""
"""

import pytest

from tests.faults.places import TRIED, Place, make_place


@pytest.fixture(scope="session")
def place(zygote, tmp_path_factory) -> Place:
    """Inputs of all commands, and their results without any fault."""
    return make_place(zygote, tmp_path_factory.mktemp("faults"))


def pytest_terminal_summary(terminalreporter):
    """Print one line per fault and command."""
    if not TRIED:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':<28}{'command':<18}{'tried':>6} survived")
    for (fault, command), (tried, survived) in sorted(TRIED.items()):
        line = f"{fault:<28}{command:<18}{tried:>6} {survived:>8}"
        terminalreporter.write_line(line)
    sums = [sum(counts) for counts in zip(*TRIED.values(), strict=True)]
    terminalreporter.write_line(f"{'in all':<46}{sums[0]:>6} {sums[1]:>8}")
