import pytest
import torch
from torch import nn

from metroem.aligner import Prediction
from metroem.data.sample import Sample, seeded_generator
from metroem.loss import LossTerms
from metroem.specs.schedule import Phase
from metroem.training.step import BAD_LOSS, phase_loss, train_step


class Line(nn.Module):
    """A network of one weight, 2.0: its field is that everywhere."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self):
        return Prediction(self.weight.expand(1, 2, 3, 4), {})


def step(net, optimizer, factor, stop=0):
    def loss_of(prediction):
        total = factor * prediction.field.mean()
        return LossTerms(total, total, 0 * total, 0 * total)

    return train_step(net, loss_of, optimizer, prior=None, stop=stop)


def test_a_good_step_is_taken():
    net = Line()
    done = step(net, torch.optim.SGD(net.parameters(), lr=0.5), 1.0)
    assert done.taken and not done.suspect and done.stop == 0
    assert net.weight.item() == 1.5
    assert done.scores[0] == 2.0
    assert float(done.scores[4]) == pytest.approx(8**0.5)  # |(2, 2)|


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), BAD_LOSS, -BAD_LOSS])
def test_a_bad_step_leaves_the_weights_and_the_optimizer(factor):
    net = Line()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.5)
    step(net, optimizer, 1.0)
    before = net.weight.item(), optimizer.state_dict()["state"][0]["step"].item()
    done = step(net, optimizer, factor)
    assert not done.taken and done.suspect
    assert before == (
        net.weight.item(),
        optimizer.state_dict()["state"][0]["step"].item(),
    )


def test_the_stop_code_is_handed_on():
    net = Line()
    assert step(net, torch.optim.SGD(net.parameters(), lr=0.1), 1.0, stop=143).stop


def test_generators_differ_by_their_key():
    draws = {
        torch.rand((), generator=seeded_generator(*key)).item()
        for key in [(0, 0), (0, 1), (1, 0), (0, 0, 0)]
    }
    assert len(draws) == 4


def test_the_loss_of_a_phase_leaves_out_the_defects_of_a_sample():
    generator = seeded_generator(5)
    src, tgt = torch.randn(2, 1, 1, 24, 40, generator=generator) + 5
    defects = torch.zeros(1, 1, 24, 40, dtype=torch.bool)
    defects[..., :20] = True
    # src is far off on its defects, and nowhere else.
    src = torch.where(defects, 50.0, tgt)
    phase = Phase(lr=1e-3, num_epochs=1, smoothness=0.0)

    def similarity(sample):
        prediction = Prediction(torch.zeros(1, 2, 24, 40), {})
        return float(phase_loss(phase, sample, prediction, generator).similarity)

    sample = Sample(src, tgt, None, ("a",))
    assert similarity(sample) > 100
    assert similarity(sample._replace(src_defects=defects)) < 1e-9
