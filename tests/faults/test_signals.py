"""Test SIGTERM and Ctrl-C at random moments: the exit code, and remaining files."""

import random
import signal

import pytest

from tests.faults.places import check_whole, contents, counted, interrupted, left_over

ENDS = {signal.SIGTERM: 143, signal.SIGINT: 130}
COMMANDS = ["download_image", "download_field", "make-dataset", "training"]
COMMANDS += ["generation", "evaluate"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", ENDS)
def test_a_signal_ends_a_command_in_order_and_the_same_command_goes_on(
    zygote, place, name, number
):
    calm, chance = place.calm[name], random.Random(f"{name} {number}")
    # From when it has begun until it is nearly done.
    share = chance.uniform(0.2, 0.7)
    folder, done = interrupted(zygote, place, name, number, share)
    with counted(signal.Signals(number).name, name):
        assert done["status"] == ENDS[number], done["output"]
        assert "Traceback" not in done["output"]
        assert "Exception ignored" not in done["output"]
        check_whole(folder)
        if name == "training" and "epoch" in done["output"]:
            assert "the same command resumes from here" in done["output"]
            assert (folder / "one/.train/ck/stage_0.state.pt").is_file()
        left = left_over(folder)
        assert not any(".tmp" in path or path.endswith(".lock") for path in left)
    done = zygote.run(folder, calm.command)
    assert done["status"] == 0, done["output"]
    assert contents(folder) == calm.contents
    assert left_over(folder) == []
