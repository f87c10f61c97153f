"""Estimate how long a training still takes, and how fast it must go to end in time.

Work is counted in pixels that pass once through a network:

    update      its batches' pixels x (3, since the backward pass costs twice a forward
                pass, + 2 for pseudo-labels, + the networks of earlier stages)
    validation  the held-out pairs' pixels, without the backward pass
    fields      all pairs' pixels x `FIELDS_COST`, for the finetuner

Each is multiplied by the size of the stage's network. One network costs about the same
at every pixel, so the measured seconds per unit of work hold for phases and stages that
were not measured yet. Small images cost more a pixel: if a field of both stages was
measured, their ratio corrects the guess. A stage's own rate replaces it once known.

A run with a budget has less time than its schedule asks for. Each update then counts
as more than one update of the schedule:

    pace = seconds that the schedule's remaining updates take
         / seconds that are left after validations and fields

A phase ends when its updates, so counted, are as many as the schedule has. The
learning rate follows that count, so it always reaches its end. Pace and rates are found
again after each update, so that a machine that becomes slower still ends in time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from metroem.specs.schedule import Phase

# Passes through a network that take as long as finetuning a pair's field. Measured were
# 12 to 18 (two busy cores, pairs of 256 and 1024 px, 2026-11).
FIELDS_COST = 15
# The speed is a mean over about so many of the last updates. Fewer would be noisy, more
# would follow a machine that becomes slower too late. It is compared with the first.
RECENT_STEPS, NUM_FIRST = 8, 20
# A stage of fewer updates is of no use.
LEAST_STEPS = 20


@dataclass(frozen=True)
class PhaseWork:
    """The work of one phase.

    Attributes:
        num_steps: updates that the schedule has.
        step_px: work of one update, pixels.
        report_every: updates from one validation to the next.
        report_px: work of one validation, pixels.
    """

    num_steps: int
    step_px: float
    report_every: int
    report_px: float


@dataclass(frozen=True)
class StageWork:
    """The work of one stage.

    Attributes:
        stage: its number.
        phases: empty if the stage is not trained.
        num_fields: pairs whose fields are written, per rank.
        field_px: work of one of them, pixels.
    """

    stage: int
    phases: tuple[PhaseWork, ...]
    num_fields: float = 0.0
    field_px: float = 0.0

    @property
    def largest_pace(self) -> float:
        """The pace at which the stage makes `LEAST_STEPS` updates."""
        return max(1.0, sum(phase.num_steps for phase in self.phases) / LEAST_STEPS)


def phase_work(
    phase: Phase,
    *,
    num_steps: int,
    pairs_of_update: float,
    patch: tuple[int, int],
    held_out: float,
    network_size: float,
    earlier_px: float,
) -> PhaseWork:
    """Count the work of a phase.

    Args:
        phase: of the schedule.
        num_steps: updates of one epoch.
        pairs_of_update: pairs of one update, over all its batches; per rank.
        patch: (rows, cols) of the images; crops are not larger.
        held_out: samples of a validation; per rank.
        network_size: of the stage's network; any unit, the same for all stages.
        earlier_px: what the earlier stages' networks add for a prior field, per pixel.
    """
    rows, cols = patch
    crop = min(phase.crop_size, rows) * min(phase.crop_size, cols)
    warp = phase.known_warp
    # The network makes the pseudo-labels of samples that show two sections, in both
    # directions.
    labels = 0.0 if warp is None or warp.aligned else 2.0
    same = 0.0 if warp is None else warp.same
    forward = network_size * (1 + labels)
    return PhaseWork(
        num_steps=phase.num_epochs * num_steps,
        step_px=pairs_of_update
        * crop
        * (network_size * (3 + labels * (1 - same)) + earlier_px),
        report_every=phase.print_every * num_steps,
        report_px=held_out * rows * cols * (forward + earlier_px),
    )


class TimeLeft:
    """Knows the work that is left, and how long work takes.

    It measures nothing itself: callers tell it the seconds.
    """

    def __init__(self, stages: Sequence[StageWork]) -> None:
        self._stages = {work.stage: work for work in stages}
        self._phase = dict.fromkeys(self._stages, 0)
        self._position = dict.fromkeys(self._stages, 0.0)
        self._num_fields = {work.stage: work.num_fields for work in stages}
        # Seconds per pixel: of a kind of work, by stage, the latest stage last.
        self._report_rates: dict[int, float] = {}
        self._field_rates: dict[int, float] = {}
        self._step_rates: dict[int, float] = {}
        self._first_rate = 0.0  # mean of the first updates of the current stage
        self._num_steps = 0  # measured in the current stage

    def move(self, stage: int, phase: int, position: float) -> None:
        """Say where the training of a stage stands.

        Args:
            stage: its number.
            phase: index; the number of phases when the stage is trained.
            position: updates of the phase's schedule that count as done.
        """
        self._phase[stage], self._position[stage] = phase, position

    def begin_stage(self, stage: int) -> None:
        """Begin to measure a stage; rates of other stages keep today's speed."""
        slowdown = self.slowdown
        for rates in (self._report_rates, self._field_rates):
            for other in rates:
                rates[other] *= slowdown
        self._num_steps, self._first_rate = 0, 0.0

    def add_step(self, stage: int, seconds: float) -> None:
        """Add the duration of one update of a stage's current phase."""
        sample = seconds / self._stages[stage].phases[self._phase[stage]].step_px
        self._num_steps += 1
        mean = self._step_rates.pop(stage, sample)  # the latest stage comes last
        if self._num_steps == 1:
            mean = sample
        weight = max(1 / self._num_steps, 1 / RECENT_STEPS)
        self._step_rates[stage] = mean + weight * (sample - mean)
        if self._num_steps <= NUM_FIRST:
            self._first_rate += (sample - self._first_rate) / self._num_steps

    def add_report(self, stage: int, seconds: float) -> None:
        """Add the duration of one validation of a stage's current phase."""
        work = self._stages[stage].phases[self._phase[stage]].report_px
        if work > 0:
            self._report_rates[stage] = seconds / work / self.slowdown

    def add_field(self, stage: int, seconds: float) -> None:
        """Add the duration of one pair's field."""
        work = self._stages[stage].field_px
        if work > 0:
            self._field_rates[stage] = seconds / work / self.slowdown

    def end_fields(self, stage: int) -> None:
        """Say that the fields of a stage are written."""
        self._num_fields[stage] = 0

    @property
    def is_known(self) -> bool:
        """Whether any update was measured, so that there is an estimate."""
        return bool(self._step_rates)

    @property
    def slowdown(self) -> float:
        """How much longer an update takes now than at the start of the stage."""
        if self._num_steps == 0:
            return 1.0
        return next(reversed(self._step_rates.values())) / self._first_rate

    def fixed_s(self) -> float:
        """Seconds of work that no pace shortens: fields, a validation per phase."""
        return sum(
            sum(self._report_s(work, phase) for phase in self._phases_left(work))
            + self._fields_s(work)
            for work in self._stages.values()
        )

    def training_s(self) -> dict[int, float]:
        """Seconds of the remaining updates of the schedule, by stage.

        Validations between the first and the last update of a phase are included.
        """
        found = {}
        for number, work in self._stages.items():
            seconds = 0.0
            for index, phase in enumerate(self._phases_left(work)):
                left = float(phase.num_steps)
                if index == 0:
                    left = max(0.0, left - self._position[number])
                rate = self._rate(self._step_rates, number)
                reports = max(0.0, left - phase.report_every) / phase.report_every
                seconds += left * phase.step_px * rate
                seconds += reports * self._report_s(work, phase)
            found[number] = seconds
        return found

    def left_s(self, pace: float = 1.0) -> float:
        """Seconds until all is done, if updates count as `pace` ones, or fewer."""
        return self.fixed_s() + sum(
            seconds / min(pace, self._stages[stage].largest_pace)
            for stage, seconds in self.training_s().items()
        )

    def least_s(self) -> float:
        """Seconds until all is done with `LEAST_STEPS` updates a stage."""
        return self.left_s(math.inf)

    def pace(self, seconds_left: float) -> float:
        """Find how many updates of the schedule one update must count as.

        Stages that would make fewer than `LEAST_STEPS` updates go slower, and all
        others faster.

        Args:
            seconds_left: until all must be done.

        Returns:
            1 if the time suffices for the schedule; infinite if no pace is fast enough.
        """
        free = seconds_left - self.fixed_s()
        training = self.training_s()
        needed = sum(training.values())
        by_limit = sorted(training, key=lambda stage: self._stages[stage].largest_pace)
        for stage in by_limit:
            limit = self._stages[stage].largest_pace
            pace = needed / free if free > 0 else math.inf
            if pace <= limit:
                return max(1.0, pace)
            needed -= training[stage]
            free -= training[stage] / limit
        return math.inf

    def steps_left(self, stage: int, pace: float) -> tuple[int, int]:
        """Updates that a stage still makes at a pace, and those of its schedule."""
        work = self._stages[stage]
        steps = sum(phase.num_steps for phase in self._phases_left(work))
        left = max(0.0, steps - self._position[stage]) if steps else 0.0
        made = math.ceil(left / min(pace, work.largest_pace))
        return made, math.ceil(left)

    def largest_pace(self, stage: int) -> float:
        """The pace at which a stage makes `LEAST_STEPS` updates."""
        return self._stages[stage].largest_pace

    def _phases_left(self, work: StageWork) -> tuple[PhaseWork, ...]:
        return work.phases[self._phase[work.stage] :]

    def _rate(self, rates: dict[int, float], stage: int) -> float:
        """Seconds per pixel in a stage: its own, else the latest known, else steps'.

        A rate of another stage is corrected by the rates of both stages' fields.
        """
        known = rates or self._step_rates
        if stage in known:
            return known[stage]
        if not known:
            return 0.0
        latest = next(reversed(known))
        fields = self._field_rates
        if stage in fields and latest in fields:
            return known[latest] * fields[stage] / fields[latest]
        return known[latest]

    def _report_s(self, work: StageWork, phase: PhaseWork) -> float:
        rates = self._report_rates
        slowdown = self.slowdown if rates else 1.0
        return phase.report_px * self._rate(rates, work.stage) * slowdown

    def _fields_s(self, work: StageWork) -> float:
        rates = self._field_rates
        slowdown = self.slowdown if rates else 1.0
        seconds = work.field_px * self._rate(rates, work.stage) * slowdown
        return self._num_fields[work.stage] * seconds
