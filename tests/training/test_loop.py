"""Test that few functions lie between the command and a step of the optimizer."""

import json
import sys
from pathlib import Path

import pytest
import torch

import train
from metroem.models.module_folders import init_pyramid
from tests.models.specs import scalenet, write_spec
from tests.pairs import write_pairs

ROOT = Path(train.__file__).parent


@pytest.mark.parametrize("accumulate", [1, 2])
def test_four_functions_are_on_the_stack_at_an_update(
    tmp_path, monkeypatch, accumulate
):
    write_pairs(tmp_path / "data", mips=(1,), num_pairs=3, shape=(64, 88))
    (module,) = init_pyramid(tmp_path / "pyramid", [1], "scalenet")
    write_spec(module / "model", scalenet(4, 6))
    phase = {"lr": 1e-3, "num_epochs": 1, "smoothness": 1, "crop_size": 48}
    phase |= {"accumulate": accumulate, "ema": 0.9}
    (tmp_path / "schedule.json").write_text(json.dumps({"1": [phase]}))
    found, update = [], torch.optim.Adam.step

    def noting(self, *args, **options):
        frame, names = sys._getframe(1), []
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path == ROOT / "train.py" or ROOT / "metroem" in path.parents:
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        found.append(names[::-1])
        return update(self, *args, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", noting)
    train.main(
        [
            *("--pyramid_path", str(tmp_path / "pyramid"), "--device", "cpu"),
            *("--dataset_path", str(tmp_path / "data"), "--val_pairs", "0"),
            *("--train_mode", "custom", "--generate_field_stages"),
            *("--train_params_path", str(tmp_path / "schedule.json")),
        ]
    )
    assert len(found) == -(-3 // accumulate)
    expected = ["main", "train_pyramid", "train_stage", "train_step"]
    assert all(names == expected for names in found)
