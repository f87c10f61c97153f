import json

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

SETTINGS = {"--seed": 3, "phases": ["a"]}


def test_a_state_comes_back_as_it_was(tmp_path):
    state = TrainingState(
        SETTINGS,
        phase=1,
        epoch=2,
        step=3,
        best=0.5,
        sums=[1.0, 2.0],
        recent_bad=[0, 1],
        quarantine=["x"],
        net={"w": torch.arange(3.0)},
        optimizer={"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
        rng=torch.get_rng_state(),
    )
    save_state(tmp_path / "s.pt", state)
    found = load_state(tmp_path / "s.pt", SETTINGS)
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
    assert load_state(tmp_path / "s.pt", SETTINGS) is None


def test_other_settings_are_refused_by_name(tmp_path):
    save_state(tmp_path / "s.pt", TrainingState(SETTINGS))
    with pytest.raises(CheckpointError, match="--seed was 3, is 4.*--restart"):
        load_state(tmp_path / "s.pt", SETTINGS | {"--seed": 4})
    with pytest.raises(CheckpointError, match="phases are not the same"):
        load_state(tmp_path / "s.pt", SETTINGS | {"phases": ["b"]})


def test_a_broken_state_is_refused(tmp_path):
    path = tmp_path / "s.pt"
    save_state(path, TrainingState(SETTINGS))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read.*--restart"):
        load_state(path, SETTINGS)
    torch.save({"net": {}}, path)
    with pytest.raises(CheckpointError, match="not a training state"):
        load_state(path, SETTINGS)


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


def test_a_state_from_before_weights_were_averaged_is_read(tmp_path):
    path = tmp_path / "s.pt"
    save_state(path, TrainingState(SETTINGS, phase=1, net={"w": torch.arange(3.0)}))
    tree = torch.load(path, weights_only=True)
    del tree["averages"]
    torch.save(tree, path)
    found = load_state(path, SETTINGS)
    assert found is not None and found.phase == 1 and found.averages is None
    del tree["net"]
    torch.save(tree, path)
    with pytest.raises(CheckpointError, match="not a training state"):
        load_state(path, SETTINGS)
