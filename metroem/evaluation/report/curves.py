"""Read the curves of a training from its metrics.jsonl."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metroem.errors import DatasetError

NAN = float("nan")
SETS = ("training", "validation")
FIGURES = {"loss": "loss", "epe_px": "EPE, px", "similarity": "similarity"}


class Curve(NamedTuple):
    """One figure over the training of one stage."""

    stage: int
    figure: str  # one of the values of `FIGURES`
    minutes: tuple[float, ...]  # since the stage started, one per point
    phases: tuple[int, ...]  # the phase of each point
    values: dict[str, tuple[float, ...]]  # by set; NaN where it was not logged


class _Line(NamedTuple):
    """One line of the file."""

    stage: int
    phase: int
    epoch: int  # the last epoch that the line covers
    seconds: float  # duration of one epoch
    scores: dict[tuple[str, str], float]  # by set and key of `FIGURES`

    @classmethod
    def parse(cls, line: Mapping[str, Any]) -> "_Line":
        scores = {}
        for name in SETS:
            for key in FIGURES:
                value = line.get(name, {}).get(key)
                scores[name, key] = NAN if value is None else float(value)
        stage, phase, epoch = (int(line[key]) for key in ("stage", "phase", "epoch"))
        return cls(stage, phase, epoch, float(line["seconds"]), scores)


def read_curves(metrics: Path) -> list[Curve]:
    """Read the curves of all stages; each stage begins with its loss.

    Args:
        metrics: written by train.py, one JSON object every few epochs.

    Raises:
        DatasetError: the file is missing, or a line of it has another form.
    """
    if not metrics.is_file():
        raise DatasetError(f"{metrics}: no such file; train.py writes it")
    by_stage: dict[int, list[_Line]] = {}
    for number, text in enumerate(metrics.read_text().splitlines(), start=1):
        try:
            line = _Line.parse(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(
                f"{metrics}: line {number} is not a line of train.py ({error!r}); "
                "remove the line, or move the file away"
            ) from error
        by_stage.setdefault(line.stage, []).append(line)
    return [
        curve
        for stage in sorted(by_stage)
        for key in FIGURES
        if (curve := _curve(stage, by_stage[stage], key)).values
    ]


def main_curves(curves: Sequence[Curve]) -> list[Curve]:
    """Choose one curve per stage: the field's error if all its points have one."""
    main: dict[int, Curve] = {}
    for curve in curves:
        values = [value for line in curve.values.values() for value in line]
        is_whole = all(value == value for value in values)
        if curve.stage not in main or (curve.figure == FIGURES["epe_px"] and is_whole):
            main[curve.stage] = curve
    return list(main.values())


def _curve(stage: int, lines: Sequence[_Line], key: str) -> Curve:
    minutes, before = [0.0], -1
    for line in lines:
        # A line covers all epochs since the line before, and describes the last one.
        epochs = line.epoch - before if line.epoch > before else line.epoch + 1
        minutes.append(minutes[-1] + epochs * line.seconds / 60)
        before = line.epoch
    values = {}
    for name in SETS:
        found = tuple(line.scores[name, key] for line in lines)
        if any(value == value for value in found):
            values[name] = found
    phases = tuple(line.phase for line in lines)
    return Curve(stage, FIGURES[key], tuple(minutes[1:]), phases, values)
