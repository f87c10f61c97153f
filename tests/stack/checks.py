"""Run a check in this process, task by task."""

import json
from pathlib import Path

from metroem.stack.check import CheckReportStep, CheckStep
from metroem.stack.check_plan import plan_check
from metroem.stack.requests import CheckRequest


def run_check(path, destination, *, order=1, **flags):
    """Check a volume, and return what check.json holds.

    Args:
        path: of the volume.
        destination: the folder to write to.
        order: 1, or -1 to run the tasks from the last one to the first.
        flags: other flags of `metroem check`.
    """
    request = CheckRequest(cv_path=str(path), dst_path=str(destination), **flags)
    check = CheckStep(plan_check(request))
    for task in check.tasks()[::order]:
        check.run(task)
    return run_report(check)


def run_report(check):
    """Put the figures of a finished check together."""
    CheckReportStep(check).run("report")
    return json.loads((Path(check.destination) / "check.json").read_text())
