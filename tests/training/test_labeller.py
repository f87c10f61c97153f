"""Who makes pseudo-labels: a finetuned network as it was when finetuning began."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metroem.data.sample import Sample
from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from metroem.models.weights import checkpoint_path, save_weights
from metroem.specs.augmentations import KnownWarp
from metroem.specs.modules import find_modules
from metroem.specs.schedule import Phase
from metroem.training import validate
from metroem.training.checkpoint import RunFolder
from metroem.training.model import load_labeller
from metroem.training.targets import EarlierStages
from tests.training.test_config import config_of

UNALIGNED, ALIGNED = (
    Phase(1e-3, 1, 0.0, augmentations=(KnownWarp(aligned=aligned),))
    for aligned in (False, True)
)


class Asked(Exception):
    """Ends a validation once a network was asked for a label."""


class HeldOutPair:
    """One pair to validate on."""

    phase = SimpleNamespace(known_warp=None)

    def __getitem__(self, index):
        image = torch.ones(1, 1, 8, 9)
        return Sample(image, image, None, ())


@pytest.fixture
def finetuned(tmp_path):
    """A config of a module whose weights, and those that it began with, differ."""
    init_pyramid(tmp_path / "pyramid", [0], "scalenet")
    (module,) = find_modules(tmp_path / "pyramid")
    run = RunFolder.of(tmp_path / "pyramid", "checkpoint")
    run.path.mkdir(parents=True)
    for seed, path in (
        (0, run.weights(0, "initial")),
        (1, checkpoint_path(module.weights_folder, "checkpoint")),
    ):
        torch.manual_seed(seed)
        loaded: Any = load_module(module.path, checkpoint_name=None)
        save_weights(loaded.aligner.net, path)
    return config_of(UNALIGNED, module=module, run=run, checkpoint_name="checkpoint")


@pytest.mark.parametrize(("is_fresh", "name"), [(True, "best"), (False, "initial")])
def test_labels_come_from_the_weights_of_the_start(finetuned, is_fresh, name):
    before = torch.get_rng_state()

    labeller = load_labeller(replace(finetuned, keeps_labels=True), is_fresh=is_fresh)

    assert labeller is not None and not labeller.training
    assert torch.equal(torch.get_rng_state(), before)
    path = finetuned.best_weights if name == "best" else finetuned.run.weights(0, name)
    wanted = torch.load(path, weights_only=True)
    for key, value in labeller.net.state_dict().items():
        assert torch.equal(value, wanted[key])
    assert load_labeller(finetuned, is_fresh=is_fresh) is None
    needs_none = replace(finetuned, keeps_labels=True, phases=(ALIGNED,))
    assert load_labeller(needs_none, is_fresh=is_fresh) is None


def test_validation_asks_the_labeller(monkeypatch):
    labeller, net = object(), torch.nn.Identity()
    asked = []

    def ask(sample, predict, options):
        asked.append(predict)
        raise Asked

    monkeypatch.setattr(validate, "add_pseudo_label", ask)
    for given in (labeller, None):
        earlier = EarlierStages(0, (), "ck", torch.device("cpu"), given)
        samples = HeldOutPair()
        with pytest.raises(Asked):
            validate._predict(net, samples, 0, earlier, torch.device("cpu"))

    assert asked == [labeller, net]
