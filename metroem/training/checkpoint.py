"""Save and load the state that a training is resumed from.

All files lie in `<pyramid>/.train/<checkpoint_name>/`, outside of the module
directories, since modelhouse and corgie copy a whole module directory on every load:

    stage_<s>.state.pt                   the state to resume from
    stage_<s>_last.state.pth.tar         the last weights (the best weights are the
                                         module's checkpoint)
    stage_<s>_initial.state.pth.tar      the checkpoint that training started from
    stage_<s>_replaced.state.pth.tar     the checkpoint that --restart replaced
    metrics.jsonl                        one object per report
    quarantine.jsonl                     pairs whose loss was bad
    tensorboard/stage_<s>/               metrics and pictures, with --tensorboard
    budget.json                          time used, with --budget_minutes, of a run that
                                         was stopped
"""

import dataclasses
import errno
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from metroem.errors import CheckpointError
from metroem.io.files import make_folder, replace_file, writing
from metroem.utils import format_versions


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, i.e. of one checkpoint name of a pyramid."""

    path: Path

    @classmethod
    def of(cls, pyramid: Path, checkpoint_name: str) -> "RunFolder":
        """Name the folder of a run; it does not exist before its training started."""
        return cls(pyramid / ".train" / checkpoint_name)

    def make(self) -> None:
        """Make the folder if it is missing."""
        make_folder(self.path)

    def state(self, stage: int) -> Path:
        """Path of the state that a stage is resumed from."""
        return self.path / f"stage_{stage}.state.pt"

    def weights(self, stage: int, which: str) -> Path:
        """Path of other weights than the best: "last", "initial" or "replaced"."""
        return self.path / f"stage_{stage}_{which}.state.pth.tar"

    @property
    def metrics(self) -> Path:
        """Path of the metrics: one JSON object per report."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder that --tensorboard writes to."""
        return self.path / "tensorboard"

    @property
    def budget(self) -> Path:
        """Path of the time that a stopped run has used of --budget_minutes."""
        return self.path / "budget.json"

    @property
    def quarantine(self) -> Path:
        """Path of the list of bad pairs: one JSON object per pair."""
        return self.path / "quarantine.jsonl"


_NONE = type(None)
# Types of the values of a state. Their contents are checked when a training resumes.
_KINDS: dict[str, Any] = {
    **{"fingerprint": dict, "phase": int, "epoch": int, "step": int, "net": dict},
    **{"sums": list, "recent_bad": list, "quarantine": list},
    **{"best": (float, _NONE), "optimizer": (dict, _NONE), "average": (dict, _NONE)},
    **{"rng": (torch.Tensor, _NONE), "position": (float, _NONE)},
    "updates": (int, _NONE),
}


@dataclass
class TrainingState:
    """Where the training of a stage stands.

    Attributes:
        fingerprint: of the training; a training with another one may not resume it.
        phase: index in the schedule; the number of phases when the stage is done.
        epoch: index in the phase.
        step: index in the epoch.
        position: updates of the phase's schedule that count as done. With a budget an
            update may count as more than one, see `time_left`. None in states of
            earlier versions: then as many as were made.
        updates: updates made in all phases. None in states of earlier versions.
        best: best validation loss of the phase; None before the first.
        sums: sums of the metrics since the last report, then the number of steps in
            each sum.
        recent_bad: for each of the last steps, 1 if it was bad, else 0.
        quarantine: names of pairs whose loss was bad.
        net: weights, not averaged.
        optimizer: state of the optimizer; None at the start of a phase.
        rng: torch's global random state, for networks that draw from it.
        average: state of the averaged weights; None where there are none.
    """

    fingerprint: dict[str, Any]
    phase: int = 0
    epoch: int = 0
    step: int = 0
    position: float | None = None
    updates: int | None = 0
    best: float | None = None
    sums: list[float] = field(default_factory=list)
    recent_bad: list[int] = field(default_factory=list)
    quarantine: list[str] = field(default_factory=list)
    net: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    rng: torch.Tensor | None = None
    average: dict[str, Any] | None = None

    def add_metrics(self, metrics: torch.Tensor) -> None:
        """Add the metrics of a step to the sums; unknown ones are left out."""
        known = ~metrics.isnan()
        values = [*torch.where(known, metrics, 0.0).tolist(), *known.tolist()]
        sums = self.sums or [0.0] * len(values)
        self.sums = [a + b for a, b in zip(sums, values, strict=True)]

    def mean_metrics(self) -> list[float]:
        """Average each metric since the last report; NaN if it is unknown."""
        half = len(self.sums) // 2
        return [
            value / count if count else float("nan")
            for value, count in zip(self.sums[:half], self.sums[half:], strict=True)
        ]


def save_state(path: Path, state: TrainingState) -> None:
    """Write a state; the file is complete or does not exist."""
    tree = {"version": format_versions.STATE, **vars(state)}
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    replace_file(path, buffer.getvalue())


def load_state(path: Path) -> TrainingState | None:
    """Read the state that a training may be resumed from; None if there is none.

    Raises:
        CheckpointError: the file cannot be read, is not a state, or has another
            version.
    """
    if not path.is_file():
        return None
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch passes on any error of its readers
        raise CheckpointError(
            f"{path}: cannot be read ({error}); begin again with --restart"
        ) from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: not a training state; give --restart")
    version = tree.pop("version", None)
    if "settings" in tree and version in (None, 1):
        raise CheckpointError(
            f"{path}: a training that MetroEM 1.0.0 began, which this version cannot "
            "resume: finish it with MetroEM 1.0.0, or begin it again with --restart. "
            "What it has trained can be used: leave its stage out (--train_stages)"
        )
    if version is not None:
        format_versions.check_version(
            version, format_versions.STATE, str(path), CheckpointError
        )
    for key in ("position", "updates"):  # earlier versions had none
        tree.setdefault(key, None)
    if version is None or set(tree) != {
        f.name for f in dataclasses.fields(TrainingState)
    }:
        raise CheckpointError(f"{path}: not a training state; give --restart")
    wrong = sorted(
        k for k, v in tree.items() if not isinstance(v, _KINDS.get(k, object))
    )
    counts = (tree[key] for key in ("phase", "epoch", "step") if key not in wrong)
    if wrong or not all(0 <= count < 2**31 for count in counts):
        raise CheckpointError(
            f"{path}: not a training state ({wrong or 'its position'} cannot be); give "
            "--restart"
        )
    return TrainingState(**tree)


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line.

    Raises:
        StorageError: the disk is full; the file is as it was.
    """
    with writing(path), path.open("ab", buffering=0) as file:
        size = file.seek(0, io.SEEK_END)
        line = (json.dumps(record) + "\n").encode()
        if file.write(line) != len(line):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def keep_json_lines(path: Path, before: tuple[int, int, int]) -> None:
    """Delete the lines of a stage at or after a position: a resumed run repeats them.

    Args:
        path: file of records with "stage", "phase" and "epoch".
        before: (stage, phase, epoch) at which the run resumes.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # incomplete, since the machine stopped
            continue
        position = (record["stage"], record["phase"], record["epoch"])
        if position[0] != before[0] or position < before:
            kept.append(line + "\n")
    replace_file(path, "".join(kept).encode())
