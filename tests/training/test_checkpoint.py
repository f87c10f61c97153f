import json
import math

import pytest
import torch

from metroem.errors import CheckpointError
from metroem.training.checkpoint import (
    RunFolder,
    TrainingState,
    append_json_line,
    keep_json_lines,
    load_state,
    save_state,
)
from metroem.utils import format_versions

FINGERPRINT = {"--seed": 3, "schedule": ["a"]}


def test_a_state_comes_back_as_it_was(tmp_path):
    state = TrainingState(
        FINGERPRINT,
        phase=1,
        epoch=2,
        step=3,
        position=7.5,
        best=0.5,
        sums=[1.0, 2.0],
        recent_bad=[0, 1],
        quarantine=["x"],
        net={"w": torch.arange(3.0)},
        optimizer={"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
        rng=torch.get_rng_state(),
    )
    save_state(tmp_path / "s.pt", state)
    found = load_state(tmp_path / "s.pt")
    assert found is not None
    tensors = ("net", "optimizer", "rng")
    for key in tensors:
        torch.testing.assert_close(getattr(found, key), getattr(state, key))
    assert all(
        getattr(found, key) == value
        for key, value in vars(state).items()
        if key not in tensors
    )
    assert [p.name for p in tmp_path.iterdir()] == ["s.pt"]


def test_no_state_is_none(tmp_path):
    assert load_state(tmp_path / "s.pt") is None


def test_a_broken_state_is_refused(tmp_path):
    path = tmp_path / "s.pt"
    save_state(path, TrainingState(FINGERPRINT))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read.*--restart"):
        load_state(path)
    torch.save({"net": {}}, path)
    with pytest.raises(CheckpointError, match="not a training state"):
        load_state(path)


def test_lines_at_and_after_a_position_are_dropped(tmp_path):
    run = RunFolder.of(tmp_path, "ck")
    run.make()
    path = run.metrics
    places = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0)]
    for stage, phase, epoch in places:
        append_json_line(path, {"stage": stage, "phase": phase, "epoch": epoch})
    keep_json_lines(path, (1, 0, 1))
    kept = [tuple(json.loads(line).values()) for line in path.read_text().splitlines()]
    assert kept == places[:3]
    assert path == tmp_path / ".train" / "ck" / "metrics.jsonl"


def test_a_state_of_version_1_0_0_is_refused_and_says_what_to_do(tmp_path):
    path = tmp_path / "s.pt"
    torch.save({"version": 1, "settings": {"--seed": 3}, "phase": 0, "net": {}}, path)
    with pytest.raises(CheckpointError, match=r"MetroEM 1\.0\.0 began.*--restart"):
        load_state(path)


def test_a_state_of_a_newer_version_is_refused(tmp_path):
    path = tmp_path / "s.pt"
    torch.save({"version": format_versions.STATE + 1, "a key to come": 1}, path)
    with pytest.raises(CheckpointError, match="version 3, .* up to 2; .*upgrade"):
        load_state(path)


def test_the_mean_of_a_metric_is_over_the_steps_that_know_it():
    state = TrainingState({})
    assert state.mean_metrics() == []
    for values in ([1.0, math.nan, math.nan], [2.0, 6.0, math.nan]):
        state.add_metrics(torch.tensor(values))
    first, second, third = state.mean_metrics()
    assert (first, second) == (1.5, 6.0) and math.isnan(third)
