"""Time a run: say how long it still takes, and keep it within --budget_minutes.

`TimeLeft` has the arithmetic. The clock of rank 0 decides for all ranks. The time that
was used is kept in the folder of the run, so a run that was stopped resumes within what
is left of its budget.
"""

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from metroem.errors import UsageError
from metroem.io.files import replace_file
from metroem.training.time_left import LEAST_STEPS, StageWork, TimeLeft
from metroem.utils import distributed
from metroem.utils.progress import in_words

logger = logging.getLogger(__name__)

# Updates that are measured before the first estimate.
FIRST_STEPS = 20
# Updates that are measured before a budget is refused.
LEAST_MEASURED = 5
_SAVE_EVERY_S = 5.0
# Of the budget: kept for what is not foreseen, such as loading networks.
_MARGIN = 0.03


class RunClock:
    """Measures a run, and finds the pace that ends it in time.

    Attributes:
        left: the work that is left.
        budget_s: seconds of --budget_minutes; infinite without it.
    """

    def __init__(
        self,
        works: Sequence[StageWork],
        *,
        started: float,
        device: torch.device,
        budget_minutes: float | None = None,
        record: Path | None = None,
    ) -> None:
        """Start at a time that is already past.

        Args:
            works: what the run does, stage by stage.
            started: `time.monotonic()` when the command began.
            device: of this rank.
            budget_minutes: for all commands of the run together; None for no limit.
            record: file of the time that stopped commands have used; None keeps none.
        """
        self.left = TimeLeft(works)
        self.budget_s = math.inf if budget_minutes is None else 60 * budget_minutes
        self._stages = [work.stage for work in works]
        self._device = device
        self._record = record
        self._used_before = 0.0
        if self.has_budget and record is not None:
            self._used_before = _read_used(record, self._stages)
        self._started = self._last = started
        self._saved = -math.inf
        self._stage = -1
        self._num_steps = 0  # that this command has measured
        # A run that was within its budget once is finished as well as it can be.
        self._may_refuse = self._used_before == 0

    @property
    def has_budget(self) -> bool:
        """Whether --budget_minutes was given."""
        return math.isfinite(self.budget_s)

    def used_s(self) -> float:
        """Seconds that this command and the stopped ones before it have used."""
        return self._used_before + time.monotonic() - self._started

    def begin_stage(self, stage: int, phase: int, position: float) -> None:
        """Begin to measure the training of a stage, where it begins or resumes."""
        self._stage = stage
        self.left.begin_stage(stage)
        self.left.move(stage, phase, position)
        self._last = math.nan  # the first update also starts workers and allocates

    def end_phase(self, phase: int) -> None:
        """Note that a phase of the stage is done."""
        self.left.move(self._stage, phase + 1, 0.0)
        self._last = math.nan
        self._may_refuse = False

    def after_step(self, phase: int, position: float) -> float:
        """Measure an update, and find how many of the schedule it counts as.

        Args:
            phase: index of the phase.
            position: updates of the schedule that counted as done before it.

        Returns:
            1 without a budget; the same on every rank.

        Raises:
            UsageError: the budget is too small for this machine.
        """
        time_now, seconds = time.monotonic(), 0.0
        self.left.move(self._stage, phase, position)
        if math.isfinite(self._last):
            seconds = time_now - self._last
            self.left.add_step(self._stage, seconds)
            self._num_steps += 1
        self._last = time_now
        pace = 1.0
        if self.has_budget:
            self.save()
            if self.left.is_known:
                pace = self.left.pace(self._seconds_left() + seconds)
            if self._is_too_small(pace):
                pace = -1.0  # tells all ranks
            pace = distributed.first_rank_value(pace, self._device)
            if pace < 0:
                self._refuse()
        counts_as = min(pace, self.left.largest_pace(self._stage))
        self.left.move(self._stage, phase, position + counts_as)
        if self._num_steps == FIRST_STEPS:
            self._log_estimate(pace)
        return counts_as

    def after_report(self) -> None:
        """Measure a validation, and the saving around it."""
        time_now = time.monotonic()
        if math.isfinite(self._last):
            self.left.add_report(self._stage, time_now - self._last)
        self._last = time_now

    def after_field(self, stage: int, seconds: float) -> None:
        """Note how long the field of a pair took."""
        self.left.add_field(stage, seconds)
        self.save()

    def left_in_words(self) -> str:
        """Say how long the whole run still takes; "" while nothing is known."""
        if not self.left.is_known:
            return ""
        pace = self.left.pace(self._seconds_left()) if self.has_budget else 1.0
        return f"about {in_words(self.left.left_s(pace))} left"

    def save(self, *, at_once: bool = False) -> None:
        """Record the time that was used, `at_once` or at most every few seconds."""
        if not self.has_budget or self._record is None or distributed.rank() > 0:
            return
        time_now = time.monotonic()
        if at_once or time_now - self._saved >= _SAVE_EVERY_S:
            used = {"used_s": self.used_s(), "stages": self._stages}
            replace_file(self._record, json.dumps(used).encode())
            self._saved = time_now

    def end(self) -> None:
        """Say how long the run took, and forget that time, since the run is done."""
        if self._record is not None and distributed.rank() == 0:
            self._record.unlink(missing_ok=True)
        if not self.has_budget:
            return
        used, budget = self.used_s(), self.budget_s
        if used > budget:
            logger.warning(
                "--budget_minutes %g: the run took %.1f, since the machine became "
                "slower or a stage needs %d updates",
                *(budget / 60, used / 60, LEAST_STEPS),
            )
        else:
            logger.info(
                "took %.1f of --budget_minutes %g",
                *(used / 60, budget / 60),
            )

    def _seconds_left(self) -> float:
        return self.budget_s * (1 - _MARGIN) - self.used_s()

    def _is_too_small(self, pace: float) -> bool:
        """Whether the budget turns out to be too small, before much work is done."""
        is_early = LEAST_MEASURED <= self._num_steps <= FIRST_STEPS
        is_late = self.used_s() >= self.budget_s / 2
        return self._may_refuse and math.isinf(pace) and (is_early or is_late)

    def _refuse(self) -> None:
        """Refuse a budget that no pace can keep (UsageError)."""
        least = (self.used_s() + self.left.least_s()) / 60 / (1 - _MARGIN)
        if self._record is not None and distributed.rank() == 0:
            self._record.unlink(missing_ok=True)
        raise UsageError(
            f"--budget_minutes {self.budget_s / 60:g}: this machine needs at least "
            f"about {math.ceil(least)} for {LEAST_STEPS} updates of each stage and "
            "its fields; give more minutes, or take fewer or smaller patches"
        )

    def _log_estimate(self, pace: float) -> None:
        """Log how long the run takes, and what a budget leaves of the schedule."""
        logger.info(
            "%s, from %d updates measured", self.left_in_words(), self._num_steps
        )
        if not self.has_budget:
            return
        if pace == 1:
            logger.info(
                "--budget_minutes %g: is more than the schedule needs, which runs as "
                "it is; the run ends early",
                self.budget_s / 60,
            )
            return
        for stage in self._stages:
            made, scheduled = self.left.steps_left(stage, pace)
            if scheduled:
                logger.info(
                    "--budget_minutes %g: stage %d gets about %d of the %d updates "
                    "that its schedule still has",
                    *(self.budget_s / 60, stage, made, scheduled),
                )


def _read_used(record: Path, stages: Sequence[int]) -> float:
    """Read the seconds that stopped commands of the same stages have used."""
    try:
        found = json.loads(record.read_text())
        used, same = float(found["used_s"]), found["stages"] == list(stages)
    except (OSError, ValueError, TypeError, KeyError):
        return 0.0  # none, or a run that never got there
    return used if same and math.isfinite(used) and used > 0 else 0.0
