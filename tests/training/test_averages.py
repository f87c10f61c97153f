import pytest
import torch
from torch import nn

from metroem.training.averages import Averages


class TwoNames(nn.Module):
    """A weight of two names and a buffer, as networks of artificery have them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 1, bias=False)])
        self.seq = nn.Sequential(*self.layers)
        self.register_buffer("seen", torch.tensor(0.0))


def set_to(net, value):
    with torch.no_grad():
        net.layers[0].weight.fill_(value)
        net.seen.fill_(value)


def test_averages_are_those_of_the_formula():
    net = TwoNames()
    set_to(net, 1.0)
    averages = Averages(net, 0.25)
    expected = 1.0
    # Decays of the first three updates: 1/10, 2/11, then 3/12 = 0.25.
    for value, decay in ((5.0, 1 / 10), (7.0, 2 / 11), (-3.0, 0.25), (2.0, 0.25)):
        set_to(net, value)
        averages.update()
        expected = decay * expected + (1 - decay) * value
    (found,) = averages.values.values()  # once, though state_dict names it twice
    assert len(net.state_dict()) == 3
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert net.layers[0].weight.item() == 2.0


def test_averages_take_the_place_of_the_weights_for_a_while():
    net = TwoNames()
    set_to(net, 1.0)
    averages = Averages(net, 0.5)
    set_to(net, 2.0)
    weight = net.layers[0].weight
    with averages.applied():
        assert {v.item() for k, v in net.state_dict().items() if k != "seen"} == {1.0}
        assert net.seen == 2.0 and net.layers[0].weight is weight
    assert weight.item() == 2.0
    with pytest.raises(RuntimeError), averages.applied():
        raise RuntimeError
    assert weight.item() == 2.0
    averages.keep()
    assert weight.item() == 1.0


def test_averages_that_were_saved_go_on_as_if_they_had_not_been():
    net = TwoNames()
    averages, others = Averages(net, 0.9), []
    for value in (1.0, 2.0):
        set_to(net, value)
        averages.update()
    again = Averages(net, 0.9)
    again.load_state_dict(averages.state_dict())
    set_to(net, 3.0)
    for one in (averages, again):
        one.update()
        others.append(one.values["layers.0.weight"].item())
    assert others[0] == others[1] and again.count == 3
