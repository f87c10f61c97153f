"""The correlation network shown a large section tile by tile, level by level."""

import json
from importlib import resources

import pytest
import torch

from metroem.models.correlation_net import (
    Encoder,
    LevelSpec,
    MatchingStep,
    parse_correlation,
)
from metroem.models.correlation_net_tiles import tile_windows
from tests.pairs import texture

TEMPLATE = resources.files("metroem") / "models" / "templates" / "correlation.json"
TWO_STEPS = {
    "type": "correlation",
    "levels": [
        {"features": 6, "radius": [1, 2], "hidden": 8, "dilations": [1]},
        {"features": 8, "blocks": 2, "radius": [2, 1], "hidden": 12, "dilations": [2]},
    ],
}


def network(spec):
    """One that moves every place: fresh ones change little."""
    torch.manual_seed(0)
    net = parse_correlation(spec, None)
    for name, weights in net.named_parameters():
        if "to_window.weight" in name or "to_change.weight" in name:
            torch.nn.init.normal_(weights, std=0.05)
        if "to_pools.bias" in name:
            torch.nn.init.constant_(weights, 1.0)  # all neighbourhoods
    return net.eval()


def pair(rows, cols):
    src, tgt = texture(rows, cols, seed=3), texture(rows, cols, seed=4)
    x = torch.cat((src, (src + tgt) / 2), 1) / 60 - 2
    x[:, 0, 40:90, 300:420] = 0  # no data
    return x


def prior(rows, cols):
    row, col = torch.arange(rows)[:, None], torch.arange(cols)
    d_cols = 40 + 20 * torch.sin(row / 70) + 0 * col  # src of other tiles is read
    d_rows = -70 + 9 * torch.cos(col / 50) + 0 * row  # and what lies beyond it
    return torch.stack((d_cols, d_rows))[None]


@pytest.mark.parametrize("spec", [json.loads(TEMPLATE.read_text()), TWO_STEPS])
@pytest.mark.parametrize("moved", [False, True])
def test_tiles_give_what_the_whole_gives(spec, moved):
    net, x = network(spec), pair(144, 912)
    field = prior(144, 912) if moved else None
    with torch.no_grad():
        whole, state = net(x, field), net.state
        found, tiled = net(x, field, tile_px=512), net.state
    unmoved = 0 if field is None else field
    assert (whole - unmoved).abs().max() > 0.5  # there is something to compare
    torch.testing.assert_close(found, whole, atol=1e-3, rtol=0)
    for key in state["up"]:
        one, other = (s["up"][key]["output"] for s in (tiled, state))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for key in state["down"]:
        one, other = (s["down"][key]["trust"] for s in (tiled, state))
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_a_prior_that_points_nowhere_finds_no_src():
    net, x = network(TWO_STEPS), pair(96, 560)
    field = torch.full((1, 2, 96, 560), -3e3)
    with torch.no_grad():
        whole, found = net(x, field), net(x, field, tile_px=256)
    torch.testing.assert_close(found, whole, atol=1e-3, rtol=0)


def test_the_cores_of_tiles_cover_a_map_once():
    shape, count = (203, 517), torch.zeros(203, 517)
    for tile in tile_windows(shape, 160, 33):
        count[tile.core] += 1
        for padded, core, size in zip(tile.padded, tile.core, shape, strict=True):
            assert padded.stop - padded.start <= 160
            # Blocks of 16 px, and 48 px around the core, or the border.
            assert padded.start == max(core.start - 48, 0) and padded.start % 16 == 0
            assert padded.stop == min(core.stop + 48, size)
    assert torch.equal(count, torch.ones(shape))


def test_layers_say_how_far_they_see():
    spec = LevelSpec(4, blocks=2, radius=(3,), hidden=5, dilations=(1, 4))
    assert Encoder(1, spec).receptive_px == 3  # 2 px of the image, and one a block
    assert MatchingStep(spec, 3, 0).receptive_px == 3 + 5 + 1 + 64
