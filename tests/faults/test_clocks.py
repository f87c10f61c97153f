"""Test clocks that jump while a command runs."""

import signal

import pytest

from tests.faults.places import agree, counted, interrupted


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["clock_jumps_back", "clock_jumps_ahead"])
@pytest.mark.parametrize("name", ["training", "download_image"])
def test_a_clock_that_jumps_changes_nothing(zygote, place, name, hook):
    calm = place.calm[name]
    limit = ["--max_minutes", "5"] if name == "training" else []
    command = [*calm.command, *limit]
    with counted(hook.replace("_", " "), name):
        folder, done = interrupted(
            zygote, place, name, signal.SIGKILL, 0.5, command=command, hook=hook
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
