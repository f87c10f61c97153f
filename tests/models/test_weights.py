"""Weights on disk."""

import pytest
import torch
from torch import nn

from metroem.errors import CheckpointError
from metroem.models.weights import checkpoint_path, load_weights, save_weights


def net(channels=3):
    return nn.Sequential(nn.Conv2d(1, channels, 3), nn.Conv2d(channels, 2, 3))


def test_weights_come_back_as_they_were(tmp_path):
    path = checkpoint_path(tmp_path, "best")
    saved, loaded = net(), net()

    save_weights(saved, path)
    load_weights(loaded, path)

    assert path.name == "best.state.pth.tar"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    for name, values in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], values)


def test_equal_weights_give_equal_bytes(tmp_path):
    weights = net()
    first, second = tmp_path / "a.state.pth.tar", tmp_path / "b.state.pth.tar"

    save_weights(weights, first)
    save_weights(weights, second)

    assert first.read_bytes() == second.read_bytes()


def test_weights_of_another_network_are_refused_by_layer(tmp_path):
    path = tmp_path / "a.state.pth.tar"
    save_weights(net(channels=4), path)
    own = net()
    before = {name: values.clone() for name, values in own.state_dict().items()}

    with pytest.raises(CheckpointError, match=r"0\.bias is \(4,\), expected \(3,\)"):
        load_weights(own, path)

    assert all(torch.equal(own.state_dict()[name], v) for name, v in before.items())


def test_layers_missing_and_unknown_are_named(tmp_path):
    path = tmp_path / "a.state.pth.tar"
    save_weights(nn.Sequential(nn.Conv2d(1, 3, 3)), path)

    with pytest.raises(CheckpointError, match=r"1\.bias is missing"):
        load_weights(net(), path)
    save_weights(nn.Sequential(*net(), nn.Conv2d(2, 2, 1)), path)
    with pytest.raises(CheckpointError, match=r"2\.bias is unknown"):
        load_weights(net(), path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_file_that_is_no_checkpoint_is_refused_by_its_path(tmp_path, content):
    path = tmp_path / "a.state.pth.tar"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match="a.state.pth.tar"):
        load_weights(net(), path)


def test_a_pickled_object_is_refused(tmp_path):
    path = tmp_path / "a.state.pth.tar"
    torch.save([torch.zeros(2)], path)

    with pytest.raises(CheckpointError, match="list"):
        load_weights(net(), path)
