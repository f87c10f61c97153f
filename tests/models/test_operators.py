"""Corrected operators against the algebra of fields."""

import pytest
import torch
from torch import nn

from metroem.errors import PyramidError
from metroem.geometry.field import compose, downsample_field, warp
from metroem.models.build import build_net, stock_operators_at_work
from metroem.models.operators import RefineField, WarpSource
from tests.models.specs import scalenet, write_spec

SIZES = [(24, 40), (33, 17), (16, 16)]


def smooth_field(rows, cols, *, scale=1.0, batch=1):
    row, col = torch.meshgrid(
        torch.arange(float(rows)), torch.arange(float(cols)), indexing="ij"
    )
    field = torch.stack([torch.sin(row / 7), torch.cos(col / 9)]) * scale
    return field.expand(batch, -1, -1, -1).contiguous()


class Gives(nn.Module):
    """An inner module that finds one field whatever it sees."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, features):
        return self.field


def silence(net):
    """Make every level find a field of 0."""
    for down in net.level_downmodules.values():
        for parameter in down.parameters():
            nn.init.zeros_(parameter)


@pytest.fixture
def net(tmp_path):
    torch.manual_seed(0)
    spec = write_spec(tmp_path, scalenet(4, 6, 8))
    return build_net(spec, operators="corrected")


def test_a_level_composes_what_it_finds_before_what_was_found():
    found, before = smooth_field(24, 40, scale=3), smooth_field(24, 40, scale=2)
    found = found.flip(1)

    out = RefineField(Gives(found))(None, {"down": {"1": {"input": before}}}, 1)

    torch.testing.assert_close(out, compose(found, before))
    # The order matters: stock operators have the other one.
    assert (out - compose(before, found)).abs().max() > 0.1


@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_src_is_warped_by_exactly_the_pixels_asked_for(rows, cols):
    features = torch.rand(2, 6, rows, cols)
    shift = torch.zeros(2, 2, rows, cols)
    shift[:, 0], shift[:, 1] = 3.0, -2.0

    src, tgt = WarpSource()(features, shift, {}, 0).chunk(2, dim=1)

    expected = features[:, :3, : rows - 2, 3:]
    torch.testing.assert_close(src[:, :, 2:, :-3], expected, atol=1e-5, rtol=0)
    assert torch.equal(tgt, features[:, 3:])


@pytest.mark.parametrize(("rows", "cols"), [(24, 40), (16, 32)])
def test_a_net_that_finds_nothing_gives_the_prior_back_in_full_detail(net, rows, cols):
    silence(net)
    # Noise, which would not survive a way through coarser levels.
    prior = torch.randn(1, 2, rows, cols)

    out = net(x=torch.rand(1, 2, rows, cols), in_field=prior)

    torch.testing.assert_close(out, prior)


def test_what_is_found_is_composed_with_the_prior_at_every_level(net):
    # Each level finds a constant field; constants add up, doubled a level.
    silence(net)
    for level, down in net.level_downmodules.items():
        down.module.layers[-1].bias.data[:] = torch.tensor([0.5, -0.25]) * (
            1 + int(level)
        )
    prior = smooth_field(32, 48, scale=2)

    out = net(x=torch.rand(1, 2, 32, 48), in_field=prior)

    # Level 2 finds 1.5, level 1 adds 1.0 to 3.0, level 0 adds 0.5 to 8.0.
    found = torch.tensor([8.5, -4.25]).view(1, 2, 1, 1).expand(1, 2, 32, 48)
    torch.testing.assert_close(out, compose(found, prior))
    seen = net.state["down"]["1"]["input"][0, :, 0, 0]
    torch.testing.assert_close(seen, torch.tensor([3.0, -1.5]))


def test_src_is_warped_by_the_whole_field_at_each_level(net, monkeypatch):
    seen = {}

    def spy(self, x, field, state, level):
        seen[level] = field
        return x

    monkeypatch.setattr(WarpSource, "forward", spy)
    silence(net)
    prior = smooth_field(32, 48, scale=2)

    net(x=torch.rand(1, 2, 32, 48), in_field=prior)

    for level in (0, 1, 2):
        torch.testing.assert_close(seen[level], downsample_field(prior, level))


def test_a_batch_gives_what_its_samples_give(net):
    pair, prior = torch.rand(2, 2, 16, 24), smooth_field(16, 24, batch=2)

    together = net(x=pair, in_field=prior)

    alone = [net(x=pair[i : i + 1], in_field=prior[:1]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_both_kinds_of_operators_have_the_same_weights(tmp_path):
    spec = write_spec(tmp_path, scalenet(4, 6, 8))
    weights = {}
    for operators in ("corrected", "stock"):
        torch.manual_seed(3)
        weights[operators] = build_net(spec, operators=operators).state_dict()

    assert weights["corrected"].keys() == weights["stock"].keys()
    for name, values in weights["stock"].items():
        assert torch.equal(weights["corrected"][name], values), name


def test_corrected_and_stock_agree_where_fields_are_small_and_far_from_the_border(
    tmp_path,
):
    spec = write_spec(tmp_path, scalenet(4, 6))
    nets = []
    for operators in ("corrected", "stock"):
        torch.manual_seed(3)
        nets.append(build_net(spec, operators=operators))
    pair = torch.rand(1, 2, 64, 64)

    with stock_operators_at_work():
        corrected, stock = (net(x=pair) for net in nets)

    # Fresh nets find about 0.1 px: orders differ by its square, scales by 1/32.
    inner = (..., slice(8, -8), slice(8, -8))
    assert corrected.abs().max() > 0.05
    torch.testing.assert_close(corrected[inner], stock[inner], atol=0.02, rtol=0)


def test_warping_by_a_nets_field_equals_warping_by_its_parts():
    # The truth: an image that is a formula, warped by two fields in turn.
    rows, cols = 48, 64
    found, before = smooth_field(rows, cols, scale=2), smooth_field(rows, cols, scale=3)
    row, col = torch.meshgrid(
        torch.arange(float(rows)), torch.arange(float(cols)), indexing="ij"
    )
    image = (torch.sin(row / 7) + torch.cos(col / 5))[None, None]

    total = RefineField(Gives(found))(None, {"down": {"0": {"input": before}}}, 0)

    inner = (..., slice(8, -8), slice(8, -8))
    twice = warp(warp(image, before), found)[inner]
    # Bilinear errors: (1/7**2 + 1/5**2) / 8 = 0.008 grey levels a warp.
    torch.testing.assert_close(warp(image, total)[inner], twice, atol=0.016, rtol=0)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "hindsight_warp", "arch_desc": {"rollback": 0}},
        {"type": "rollback_warp", "arch_desc": {"rollback": 1}},
    ],
)
def test_parts_without_a_corrected_form_are_refused(tmp_path, part):
    tree = scalenet(4, 6) | {"combiners": {"all": part}}

    with pytest.raises(PyramidError, match=part["type"]):
        build_net(write_spec(tmp_path, tree), operators="corrected")


@pytest.mark.slow
def test_a_corrected_net_compiles_as_one_graph(net):
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    pair, prior = torch.rand(1, 2, 16, 24), smooth_field(16, 24)

    out = compiled(x=pair, in_field=prior)

    torch.testing.assert_close(out, net(x=pair, in_field=prior))
