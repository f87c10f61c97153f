"""Networks from specs, and what is refused."""

import json

import pytest
import torch

from metroem.errors import PyramidError
from metroem.models.build import build_net
from tests.models.specs import scalenet, write_spec


def test_building_prints_nothing(tmp_path, capfd):
    build_net(write_spec(tmp_path, scalenet(4, 6)), operators="stock")

    assert capfd.readouterr().out == ""


def test_files_named_in_a_spec_are_those_beside_it(tmp_path, monkeypatch):
    # The working directory has a file of that name too, of another network.
    beside, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    for folder, channels in ((beside, 5), (elsewhere, 9)):
        (folder / "parts").mkdir(parents=True)
        part = scalenet(4, channels)["upmodules"]["1"]
        (folder / "parts" / "up.json").write_text(json.dumps({"path": "block.json"}))
        (folder / "parts" / "block.json").write_text(json.dumps(part))
    monkeypatch.chdir(elsewhere)
    tree = scalenet(4, 5)
    tree["upmodules"]["1"] = {"path": "parts/up.json"}

    net = build_net(write_spec(beside, tree), operators="corrected")

    net(x=torch.rand(1, 2, 16, 24))
    assert net.state["up"]["1"]["output"].shape == (1, 10, 8, 12)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "JSONDecodeError"),
        ('{"type": "transformer"}', "transformer"),
        ('{"max_level": 3}', "Neither type nor path"),
        ('{"path": "nowhere.json"}', "nowhere.json"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused_by_its_path(tmp_path, text, says):
    path = tmp_path / "model_spec.json"
    path.write_text(text)

    with pytest.raises(PyramidError, match=says) as refusal:
        build_net(path, operators="corrected")

    assert str(path) in str(refusal.value)


def test_a_missing_spec_is_refused_by_its_path(tmp_path):
    with pytest.raises(PyramidError, match=r"model_spec\.json"):
        build_net(tmp_path / "model_spec.json", operators="stock")


def test_unknown_operators_are_refused(tmp_path):
    with pytest.raises(PyramidError, match="'corrected', 'stock'"):
        build_net(write_spec(tmp_path, scalenet(4)), operators="new")


@pytest.mark.parametrize("path", ["../secret.json", "{above}/secret.json", "a/../../x"])
def test_files_named_in_a_spec_cannot_lie_elsewhere(tmp_path, path):
    (tmp_path / "secret.json").write_text('{"type": "identity"}')
    (tmp_path / "model").mkdir()
    spec = tmp_path / "model" / "model_spec.json"
    spec.write_text(json.dumps({"path": path.format(above=tmp_path)}))

    with pytest.raises(PyramidError, match="leads out of the spec's folder"):
        build_net(spec, operators="stock")
