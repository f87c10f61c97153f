"""Clocks that jump while a command runs."""

import signal

import pytest

from tests.faults.places import agree, counted


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["clock_jumps_back", "clock_jumps_ahead"])
@pytest.mark.parametrize("name", ["training", "download_image"])
def test_a_clock_that_jumps_changes_nothing(zygote, place, name, hook):
    folder, calm = place.fresh(name), place.calm[name]
    command, limit = calm.command, ("--max_minutes", "5")
    command = [*command, *limit] if name == "training" else command
    with counted(hook.replace("_", " "), name):
        done = zygote.run(
            folder, command, hook=hook, signal=signal.SIGKILL, after=0.6 * calm.seconds
        )
        assert done["status"] == -signal.SIGKILL
        done = zygote.run(folder, command, hook=hook)
        assert done["status"] == 0, done["output"]
        assert "stopped" not in done["output"]
        assert agree(folder, calm)


@pytest.mark.slow
def test_time_is_up_by_time_that_passed(zygote, place):
    folder, calm = place.fresh("training"), place.calm["training"]
    command = [*calm.command, "--max_minutes", "0.0001"]
    with counted("clock jumps back", "--max_minutes"):
        done = zygote.run(folder, command, hook="clock_jumps_back")
        assert done["status"] == 0 and "stopped; the same command" in done["output"]
