"""Weights that are not there: refused, but where a training begins."""

import logging

import pytest
import torch

import train
from metroem import Pyramid
from metroem.__main__ import main
from metroem.errors import CheckpointError
from metroem.evaluation.evaluate import evaluate_dataset
from metroem.evaluation.requests import EvaluateRequest
from metroem.models.load import load_module
from metroem.models.module_folders import fetch, init_pyramid
from metroem.models.weights import checkpoint_path
from metroem.specs.modules import find_modules
from tests.pairs import write_pairs

UNTRAINED = "so the network is UNTRAINED"
SCHEDULE = """{"0": [{"lr": 1e-4, "num_epochs": 1, "smoothness": 0, "crop_size": 32,
    "loss_spec": {"type": "known_warp"}, "augmentations": [{"type": "known_warp"}]}]}"""


def trained(path, *, name="mine", stages=(0, 1)):
    """A pyramid of two stages, those of `stages` with weights."""
    modules = [
        load_module(module, checkpoint_name=None)
        for module in init_pyramid(path, [1, 0])
    ]
    for stage, module in zip(find_modules(path), modules, strict=True):
        if stage.stage in stages:
            weights = checkpoint_path(stage.weights_folder, name)
            torch.save(module.aligner.net.state_dict(), weights)
    return path


@pytest.mark.parametrize(
    ("name", "stages", "says"),
    [
        ("typo", (0, 1), r"0_mip1in_\w+, 1_mip0in_\w+ has no weights 'typo'.*'mine'"),
        ("mine", (0,), r"p: 1_mip0in_correlation has no weights 'mine'"),
        ("mine", (1,), r"p: 0_mip1in_correlation has no weights 'mine'"),
        ("checkpoint", (), "no weights 'checkpoint'.*the pyramid has none"),
    ],
)
def test_a_stage_without_weights_is_named_when_a_pyramid_is_loaded(
    tmp_path, name, stages, says
):
    path = trained(tmp_path / "p", stages=stages)
    with pytest.raises(CheckpointError, match=says):
        Pyramid.load(path, checkpoint_name=name)


def test_untrained_networks_are_loaded_for_those_who_ask_for_them(tmp_path, caplog):
    path = trained(tmp_path / "p")
    loaded = []
    for name in ("mine", None, None):
        torch.manual_seed(4)
        pyramid = Pyramid.load(path, checkpoint_name=name)
        loaded.append(
            torch.cat([p.flatten() for p in pyramid.aligners[0].parameters()])
        )
    assert torch.equal(loaded[1], loaded[2]) and not torch.equal(loaded[0], loaded[1])
    assert UNTRAINED not in caplog.text


def test_the_way_that_corgie_loads_modules_warns(tmp_path, caplog):
    (module, _) = find_modules(trained(tmp_path / "p"))
    load_module(module.path, checkpoint_name="mine")
    assert UNTRAINED not in caplog.text
    load_module(module.path, checkpoint_name="typo")
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert UNTRAINED in record.getMessage()
    assert "typo.state.pth.tar: no such file" in record.getMessage()


def test_an_evaluation_takes_no_weights_that_are_not_there(tmp_path):
    write_pairs(tmp_path / "data", mips=(1, 0), num_pairs=1, shape=(96, 160))
    path = trained(tmp_path / "p", stages=())
    with pytest.raises(CheckpointError, match="--checkpoint_name typo: .*has none"):
        evaluate_dataset(EvaluateRequest(path, tmp_path / "data", "typo"))


def test_figures_of_a_pyramid_that_nobody_trained_end_in_an_error(tmp_path):
    write_pairs(tmp_path / "data", mips=(1, 0), num_pairs=1, shape=(96, 160))
    path, figures = trained(tmp_path / "p", stages=()), tmp_path / "f.json"
    request = EvaluateRequest(path, tmp_path / "data", json=figures, no_finetune=True)
    with pytest.raises(CheckpointError, match="p: no module has weights.*UNTRAINED"):
        evaluate_dataset(request)
    assert figures.is_file()


def train_it(tmp_path, *flags, mode="finetune"):
    argv = ["--pyramid_path", str(tmp_path / "p"), "--dataset_path"]
    argv += [str(tmp_path / "data"), "--train_mode", mode, *flags]
    train.main([*argv, "--device", "cpu", "--val_pairs", "0", "--max_epochs", "1"])


@pytest.mark.parametrize("mode", ["finetune", "classic_finetune"])
@pytest.mark.parametrize(("name", "lacking"), [("typo", "0_mip1"), ("mine", "1_mip0")])
def test_finetuning_begins_from_weights_alone(tmp_path, mode, name, lacking):
    write_pairs(tmp_path / "data", mips=(1, 0), num_pairs=1, shape=(64, 96))
    path = trained(tmp_path / "p", stages=(0,))
    before = sorted(path.rglob("*.tar"))
    match = f"--train_mode {mode} .*fetch .*/p --pyramid_path COPY.*: {lacking}"
    match += f".*'{name}'.*'mine'"
    with pytest.raises(CheckpointError, match=match):
        train_it(tmp_path, "--checkpoint_name", name, mode=mode)
    assert sorted(path.rglob("*.tar")) == before


@pytest.fixture
def run(tmp_path):
    """A pyramid of one stage, trained from scratch by a schedule of one step."""
    write_pairs(tmp_path / "data", mips=(0,), num_pairs=1, shape=(64, 96))
    init_pyramid(tmp_path / "p", [0])
    (tmp_path / "s.json").write_text(SCHEDULE)
    return tmp_path


def test_a_fresh_training_begins_without_weights_and_warns_of_none(run, caplog):
    flags = ["--train_params_path", str(run / "s.json"), "--checkpoint_name", "new"]
    train_it(run, *flags, mode="custom")
    assert "operators, fresh weights" in caplog.text and UNTRAINED not in caplog.text
    (weights,) = run.glob("p/0_*/model/new.state.pth.tar")
    weights.unlink()
    with pytest.raises(CheckpointError, match="new.state.pth.tar: is gone, though"):
        train_it(run, *flags, mode="custom")
    with pytest.raises(
        CheckpointError,
        match=r"began from fresh weights.*fetch \S+ --pyramid_path COPY",
    ):
        train_it(run, "--checkpoint_name", "new", "--restart")


def test_a_copy_of_a_trained_pyramid_is_finetuned(tmp_path, caplog):
    write_pairs(tmp_path / "data", mips=(1, 0), num_pairs=1, shape=(64, 96))
    fetch(str(trained(tmp_path / "trained")), tmp_path / "p")
    flags = ["--checkpoint_name", "mine", "--train_stages", "0"]
    train_it(tmp_path, *flags, "--max_minutes", "1e-6")
    assert "weights of mine.state.pth.tar" in caplog.text


def test_a_module_that_comes_without_weights_is_named(tmp_path, caplog):
    path = trained(tmp_path / "p", stages=(0,))
    fetch(str(path), tmp_path / "copy")
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert "1_mip0in_correlation: came without weights" in warning


def test_fields_of_a_name_that_no_set_has_are_not_exported(tmp_path):
    (tmp_path / "data").mkdir()
    argv = ["export-fields", "--dataset_path", str(tmp_path / "data")]
    with pytest.raises(ValueError, match="no field sets of --checkpoint_name 'typo'"):
        main([*argv, "--dst_path", str(tmp_path / "o"), "--checkpoint_name", "typo"])
