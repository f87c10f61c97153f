"""Test commands that are killed repeatedly at random moments."""

import random
import signal

import pytest

from tests.faults.places import check_whole, contents, counted, left_over

# How often each is killed: 23 times in all.
KILLS = {
    "download_image": 4,
    "download_field": 4,
    "make-dataset": 4,
    "training": 4,
    "generation": 4,
    "evaluate": 3,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_killed_at_random_again_and_again_a_run_ends_with_the_same_bytes(
    zygote, place, name
):
    calm, chance, kills = place.calm[name], random.Random(name), 0
    folder, seconds = place.fresh(name), calm.seconds
    while kills < KILLS[name]:
        after = chance.random() * seconds
        done = zygote.run(folder, calm.command, signal=signal.SIGKILL, after=after)
        check_whole(folder)
        if done["status"] == 0:  # what was left was done before the kill
            assert contents(folder) == calm.contents
            folder, seconds = place.fresh(name), min(seconds, done["seconds"])
            continue
        assert done["status"] == -signal.SIGKILL, done["output"]
        kills += 1
    with counted("SIGKILL", name, KILLS[name]):
        done = zygote.run(folder, calm.command)
        assert done["status"] == 0, done["output"]
        assert contents(folder) == calm.contents
        assert left_over(folder) == []
