"""The arithmetic of the time left, and of the pace that a budget needs."""

import math

import pytest

from metroem.specs.augmentations import KnownWarp
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase
from metroem.training.time_left import (
    LEAST_STEPS,
    PhaseWork,
    StageWork,
    TimeLeft,
    phase_work,
)

# Stage 0: 100 updates of 10 px, 40 of 20 px. Stage 1: 60 updates of 30 px.
FIRST = PhaseWork(num_steps=100, step_px=10.0, report_every=50, report_px=4.0)
SECOND = PhaseWork(num_steps=40, step_px=20.0, report_every=40, report_px=4.0)
FINE = PhaseWork(num_steps=60, step_px=30.0, report_every=60, report_px=8.0)
WORKS = (
    StageWork(0, (FIRST, SECOND), num_fields=5, field_px=6.0),
    StageWork(1, (FINE,), num_fields=5, field_px=24.0),
)


def measured(seconds=1.0, steps=3):
    """Work of which some updates of stage 0 were measured."""
    left = TimeLeft(WORKS)
    left.begin_stage(0)
    for _ in range(steps):
        left.add_step(0, seconds)
    return left


def test_the_work_of_a_phase_counts_passes_through_networks():
    warp = KnownWarp(same=0.25)
    phase = Phase(
        lr=1e-3,
        num_epochs=6,
        smoothness=0,
        print_every=2,
        crop_size=50,
        losses=(LossSpec(type="known_warp"),),
        augmentations=(warp,),
    )
    work = phase_work(
        phase,
        num_steps=7,
        pairs_of_update=4,
        patch=(40, 90),
        held_out=8,
        network_size=2.0,
        earlier_px=0.5,
    )
    # Crops of 40 x 50 px. Three quarters of the samples need a pseudo-label, which
    # takes a pass in each direction.
    step_px = 4 * 40 * 50 * (2 * (3 + 0.75 * 2) + 0.5)
    assert work == PhaseWork(42, step_px, 14, 8 * 40 * 90 * (2 * 3 + 0.5))


def test_nothing_is_known_before_an_update_was_measured():
    assert not TimeLeft(WORKS).is_known
    assert measured(steps=1).is_known


def test_unmeasured_work_takes_as_long_per_pixel_as_the_measured_updates():
    left = measured(seconds=2.0)  # 0.2 s a pixel
    reports = 0.2 * (4 + 4 + 8)
    fields = 0.2 * 5 * (6 + 24)
    assert left.fixed_s() == pytest.approx(reports + fields)
    # One more validation at the middle of the first phase.
    first = 0.2 * (100 * 10 + 4 + 40 * 20)
    assert left.training_s() == pytest.approx({0: first, 1: 0.2 * 60 * 30})
    whole = first + 0.2 * 60 * 30 + reports + fields
    assert left.left_s() == pytest.approx(whole)


def test_a_resumed_run_has_only_the_rest_left():
    left = measured(seconds=2.0)
    left.move(0, 1, 30.0)  # 10 updates of the second phase are left
    assert left.training_s()[0] == pytest.approx(0.2 * 10 * 20)
    left.move(0, 2, 0.0)
    left.end_fields(0)
    assert left.training_s()[0] == 0
    assert left.fixed_s() == pytest.approx(0.2 * (8 + 5 * 24))


def test_what_was_measured_replaces_what_was_guessed():
    left = measured(seconds=2.0)
    left.add_report(0, 7.0)  # instead of 0.8
    left.add_field(0, 3.0)  # of one pair, so 0.5 s a pixel
    reports = 7 / 4 * (4 + 4 + 8)  # also those of stage 1, by their pixels
    assert left.fixed_s() == pytest.approx(reports + 0.5 * 5 * (6 + 24))
    left.begin_stage(1)
    left.add_step(1, 15.0)  # 0.5 s a pixel
    assert left.training_s()[1] == pytest.approx(0.5 * 60 * 30)
    assert left.training_s()[0] == pytest.approx(0.2 * (1000 + 800) + 7)


def test_stages_that_were_not_measured_are_corrected_by_their_fields():
    left = measured(seconds=2.0)  # 0.2 s a pixel
    left.add_field(0, 6.0)  # 1 s a pixel
    left.add_field(1, 12.0)  # 0.5 s a pixel: larger images cost less a pixel
    assert left.training_s()[1] == pytest.approx(0.2 * 0.5 * 60 * 30)
    reports = 0.2 * (4 + 4 + 0.5 * 8)
    assert left.fixed_s() == pytest.approx(reports + 5 * (6 + 12))


def test_a_slower_machine_makes_measured_fields_slower_too():
    left = measured(steps=20)
    left.add_field(0, 3.0)
    before = left.fixed_s()
    for _ in range(400):  # the mean over recent updates has forgotten the first ones
        left.add_step(0, 2.0)
    assert left.slowdown == pytest.approx(2.0, rel=1e-6)
    reports = 0.1 * (4 + 4 + 8)
    assert left.fixed_s() == pytest.approx(2 * before, rel=1e-6)
    assert before == pytest.approx(reports + 0.5 * 5 * (6 + 24))
    left.begin_stage(1)  # keeps that speed
    assert left.fixed_s() == pytest.approx(2 * before, rel=1e-6)


def test_the_pace_is_the_scheduled_time_over_the_free_time():
    left = measured()
    needed, fixed = sum(left.training_s().values()), left.fixed_s()
    assert left.pace(fixed + needed / 1.5) == pytest.approx(1.5)
    assert left.left_s(1.5) == pytest.approx(fixed + needed / 1.5)
    assert left.pace(fixed + 2 * needed) == 1  # never slower than the schedule


def test_a_short_stage_keeps_its_least_updates_and_the_others_pay():
    left = measured()
    training, fixed = left.training_s(), left.fixed_s()
    # Stage 1 of 60 updates goes at most at pace 3, stage 0 of 140 at most at 7.
    assert [work.largest_pace for work in WORKS] == [140 / 20, 60 / 20]
    free = training[0] / 5 + training[1] / 3
    assert left.pace(fixed + free) == pytest.approx(5)
    assert left.left_s(5) == pytest.approx(fixed + free)
    assert left.steps_left(1, 5) == (LEAST_STEPS, 60)
    assert left.steps_left(0, 5) == (28, 140)


def test_no_pace_keeps_a_budget_below_the_least_time():
    left = measured()
    training = left.training_s()
    least = left.fixed_s() + training[0] / 7 + training[1] / 3
    assert left.least_s() == pytest.approx(least)
    assert left.pace(least * 1.001) < math.inf
    assert left.pace(least * 0.999) == math.inf
    assert left.pace(-1.0) == math.inf


def test_a_stage_that_has_no_more_updates_than_the_least_runs_whole():
    tiny = PhaseWork(num_steps=6, step_px=10.0, report_every=6, report_px=1.0)
    assert StageWork(0, (tiny,)).largest_pace == 1


@pytest.mark.parametrize("slow", [1.0, 2.5])
def test_updates_that_become_slower_midway_still_end_in_time(slow):
    phase = PhaseWork(num_steps=300, step_px=10.0, report_every=300, report_px=4.0)
    left = TimeLeft((StageWork(0, (phase,), num_fields=5, field_px=6.0),))
    left.begin_stage(0)
    left.add_field(0, 0.8)  # 0.8 s each
    budget, time, position, at = 120.0, 0.0, 0.0, [0.0]
    while position < phase.num_steps:
        seconds = 1.0 if time < 40 else slow
        at.append(position)
        time += seconds
        left.move(0, 0, position)
        left.add_step(0, seconds)
        position += left.pace(budget - time)
    fields = 5 * 0.8 * slow
    report = phase.report_px / phase.step_px * slow
    # Within an update or two: the slowdown is a mean over recent updates.
    assert budget - 3 * slow < time + fields + report < budget + 2 * slow
    # The last update is close to the end of the schedule.
    assert at[-1] > 0.9 * phase.num_steps
