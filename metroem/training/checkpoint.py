"""State to resume a run from, kept outside of the module directories.

Everything lies in `<pyramid>/.train/<checkpoint_name>/`, since modelhouse and
corgie copy a whole module directory on every load:

    stage_<s>.state.pt                   to go on from
    stage_<s>_last.state.pth.tar         the last weights (the best ones are the
                                         module's checkpoint)
    stage_<s>_initial.state.pth.tar      the checkpoint that training began from
    metrics.jsonl                        one object an epoch
    quarantine.jsonl                     pairs whose loss went bad
    tensorboard/stage_<s>/               the same and pictures, with --tensorboard
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

from metroem import versions
from metroem.errors import CheckpointError
from metroem.io.replace import make_folder, replace_file, writing
from metroem.training.distributed import check_same
from metroem.training.earlier import DATA_KEYS, PAIRS, upgrade

# Keys that states of earlier programs do not have.
_ADDED = {"averages"}


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, i.e. of one checkpoint name of a pyramid."""

    path: Path

    @classmethod
    def of(cls, pyramid: Path, checkpoint_name: str) -> "RunFolder":
        """The folder of a run; there is none before its training began."""
        return cls(pyramid / ".train" / checkpoint_name)

    def make(self) -> None:
        """Make the folder if it is missing."""
        make_folder(self.path)

    def state(self, stage: int) -> Path:
        """State to resume a stage from."""
        return self.path / f"stage_{stage}.state.pt"

    def weights(self, stage: int, which: str) -> Path:
        """Weights kept beside the best ones: "last", "initial", "replaced"."""
        return self.path / f"stage_{stage}_{which}.state.pth.tar"

    @property
    def metrics(self) -> Path:
        """One JSON object an epoch."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of what TensorBoard reads, if it is asked for."""
        return self.path / "tensorboard"

    @property
    def quarantine(self) -> Path:
        """One JSON object a pair whose loss went bad."""
        return self.path / "quarantine.jsonl"


_NONE = type(None)
# Of what else the values of a state are made, a training finds out when it begins.
_KINDS: dict[str, Any] = {
    **{"settings": dict, "phase": int, "epoch": int, "step": int, "net": dict},
    **{"sums": list, "recent_bad": list, "quarantine": list},
    **{"best": (float, _NONE), "optimizer": (dict, _NONE), "averages": (dict, _NONE)},
    "rng": (torch.Tensor, _NONE),
}


@dataclass
class TrainingState:
    """Where a stage's training stands.

    Attributes:
        settings: what the run was started with; another may not go on from it.
        phase: position in the schedule; its length when the stage is done.
        epoch: position in the phase.
        step: position in the epoch.
        best: best validation score of the phase; None before the first.
        sums: running sums of the epoch, see `stage.py`.
        recent_bad: 1 for each bad one of the last steps, 0 for each good one.
        quarantine: names of pairs whose loss went bad.
        net: weights, as they are without averaging.
        optimizer: state of the optimizer; None at the start of a phase.
        rng: torch's global random state, for networks that draw chance.
        averages: see `averages.Averages`; None where weights are not averaged.
    """

    settings: dict[str, Any]
    phase: int = 0
    epoch: int = 0
    step: int = 0
    best: float | None = None
    sums: list[float] = field(default_factory=list)
    recent_bad: list[int] = field(default_factory=list)
    quarantine: list[str] = field(default_factory=list)
    net: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    rng: torch.Tensor | None = None
    averages: dict[str, Any] | None = None


def save_state(path: Path, state: TrainingState) -> None:
    """Write a state; the file is there whole or not at all."""
    tree = {"version": versions.STATE, **vars(state)}
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    replace_file(path, buffer.getvalue())


def load_state(path: Path, settings: Mapping[str, Any]) -> TrainingState | None:
    """Read the state that a run may go on from; None if there is none.

    Args:
        path: file written by `save_state`.
        settings: of the run that wants to go on.

    Raises:
        CheckpointError: the file cannot be read, is of a newer version, or
            belongs to a run with other settings (the message names them).
        UsageError: the ranks of the run see different states.
    """
    state = _read_state(path, settings)
    place = (state.phase, state.epoch, state.step) if state else (-1, -1, -1)
    check_same(place, str(path))
    return state


def _read_state(path: Path, settings: Mapping[str, Any]) -> TrainingState | None:
    if not path.is_file():
        return None
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its readers raise
        raise CheckpointError(
            f"{path}: cannot be read ({error}); start anew with --restart"
        ) from error
    if isinstance(tree, dict) and "version" in tree:
        versions.check_version(
            tree["version"], versions.STATE, str(path), CheckpointError
        )
    names = {f.name for f in dataclasses.fields(TrainingState)} | {"version"}
    if not isinstance(tree, dict) or not names - _ADDED <= set(tree) <= names:
        raise CheckpointError(f"{path}: not a training state; give --restart")
    del tree["version"]
    wrong = sorted(
        k for k, v in tree.items() if not isinstance(v, _KINDS.get(k, object))
    )
    counts = (tree[key] for key in ("phase", "epoch", "step") if key not in wrong)
    if wrong or not all(0 <= count < 2**31 for count in counts):
        raise CheckpointError(
            f"{path}: not a training state ({wrong or 'its place'} cannot be); give "
            "--restart"
        )
    upgrade(tree, settings)
    state = TrainingState(**tree)
    changed = {
        key: _change(key, state.settings.get(key), settings.get(key))
        for key in sorted(state.settings.keys() | settings.keys())
        if state.settings.get(key) != settings.get(key)
    }
    if changed:
        apply = ""
        if changed.keys() & {PAIRS, *DATA_KEYS}:
            apply = ". Fields of other data need no training: metroem write-fields"
        raise CheckpointError(
            f"{path}: this run was started with other settings: "
            f"{'; '.join(changed.values())}. "
            "Use the same ones to go on with it, another --checkpoint_name for a run "
            "beside it, or --restart to begin it anew (with --train_stages: that stage "
            f"alone){apply}"
        )
    return state


def _change(key: str, before: Any, now: Any) -> str:
    if isinstance(before, list):
        return f"{key} are not the same"
    return f"{key} was {before!r}, is {now!r}"


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add one JSON object as a line.

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
    """Drop the lines of a stage that lie at or after a position.

    A run that resumes writes them again.

    Args:
        path: of records with "stage", "phase" and "epoch".
        before: (stage, phase, epoch) that the run goes on from.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut short by what stopped the machine
            continue
        place = (record["stage"], record["phase"], record["epoch"])
        if place[0] != before[0] or place < before:
            kept.append(line + "\n")
    replace_file(path, "".join(kept).encode())
