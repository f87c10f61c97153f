"""The network of the template `correlation`, through the aligner that runs it."""

import json
import shutil
from importlib import resources

import pytest
import torch

from metroem.aligner import Aligner
from metroem.data.sample import seeded_generator
from metroem.errors import PyramidError
from metroem.geometry.field import upsample_field
from metroem.loss import Target, endpoint_loss
from metroem.models.build import build_net
from metroem.models.correlation_net import CorrelationNet
from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from metroem.models.soft_argmax import robust_average, soft_argmax
from tests.models.specs import write_spec

TEMPLATE = resources.files("metroem") / "models" / "templates" / "correlation.json"
SMALL = {
    "type": "correlation",
    "levels": [
        {"features": 6, "radius": [1], "hidden": 8, "dilations": [1]},
        {"features": 8, "blocks": 2, "radius": [2, 1], "hidden": 12, "dilations": [2]},
    ],
}
COARSEST_PX = 4  # of `SMALL`


def images(*shape):
    """Images of noise, mean 0 and std 1."""
    return torch.randn(*shape, generator=seeded_generator(*shape))


def moved_pair(rows, cols, *, d_rows, d_cols):
    """Noise, and the same noise displaced: tgt(p) = src(p + d)."""
    margin = 1 + max(abs(d_rows), abs(d_cols))
    whole = images(1, 1, rows + 2 * margin, cols + 2 * margin)
    top, left = margin - d_rows, margin - d_cols
    src = whole[..., top : top + rows, left : left + cols]
    tgt = whole[..., margin:-margin, margin:-margin]
    return src.contiguous(), tgt.contiguous()


def constant_field(d_cols, d_rows, *shape):
    return torch.tensor([d_cols, d_rows]).view(1, 2, 1, 1).expand(1, 2, *shape).float()


def make_aligner(folder, spec=SMALL, **params):
    torch.manual_seed(0)
    write_spec(folder, spec)
    return Aligner(folder, operators="corrected", **params)


def template_aligner(folder):
    return make_aligner(folder, json.loads(TEMPLATE.read_text()))


def made_decisive(net):
    """Each place votes for its best match alone, and asks no neighbours."""
    with torch.no_grad():
        for steps in net.level_downmodules.values():
            for step in steps:
                step.scale.fill_(1e5)
                step.to_pools.weight.zero_()
                step.to_pools.bias.zero_()
                step.to_pools.bias[1] = 100.0  # the share of its own vote
    return net


@pytest.fixture
def aligner(tmp_path):
    return make_aligner(tmp_path)


@pytest.mark.parametrize(("rows", "cols"), [(37, 90), (64, 48), (5, 7)])
def test_the_template_takes_any_size(tmp_path, rows, cols):
    aligner = template_aligner(tmp_path)
    assert isinstance(aligner.net, CorrelationNet)
    prior = 3 * images(2, 2, rows, cols)
    with torch.no_grad():
        found = aligner.predict(
            images(2, 1, rows, cols), images(2, 1, rows, cols), prior, levels=(0, 1, 2)
        )
    assert found.field.shape == (2, 2, rows, cols)
    assert found.field.isfinite().all()
    for level, pair in found.embeddings.items():
        size = (-(-rows // 2**level), -(-cols // 2**level))
        assert pair.src.shape[-2:] == pair.tgt.shape[-2:] == size
    assert found.confidence.shape == (2, 1, rows, cols)
    assert 0 <= found.confidence.min() and found.confidence.max() <= 1
    for level, field in found.coarse.items():
        assert field.shape[-2] * 2**level >= rows
        assert field.shape[-1] * 2**level >= cols


def test_the_field_is_that_of_the_finest_level_upsampled(aligner):
    with torch.no_grad():
        found = aligner.predict(*images(2, 1, 1, 33, 47))
    level = min(found.coarse)
    upsampled = upsample_field(found.coarse[level], level)
    assert torch.equal(found.field, upsampled[..., :33, :47])


def test_a_sample_in_a_batch_gets_what_it_gets_alone(aligner):
    src, tgt = images(2, 3, 1, 37, 50)
    prior = 2 * images(3, 2, 37, 50)
    with torch.no_grad():
        together = aligner.predict(src, tgt, prior, levels=(1,))
        for i in range(3):
            one = slice(i, i + 1)
            alone = aligner.predict(src[one], tgt[one], prior[one], levels=(1,))
            # Convolutions and products sum in another order: 1e-6 of features of
            # about 1 and of fields of some 10 px, times a few layers.
            torch.testing.assert_close(
                together.field[one], alone.field, atol=1e-3, rtol=0
            )
            torch.testing.assert_close(
                together.embeddings[1].tgt[one],
                alone.embeddings[1].tgt,
                atol=1e-4,
                rtol=0,
            )


def test_equal_images_have_no_displacement(aligner):
    made_decisive(aligner.net)
    image = images(1, 1, 40, 64)
    with torch.no_grad():
        field = aligner.predict(image, image).field
    # Nothing is as like a place as the place itself, at the border too.
    assert field.abs().max() < 1e-3


def test_equal_images_of_a_fresh_network_have_little_displacement(aligner):
    image = images(1, 1, 200, 280)
    with torch.no_grad():
        field = aligner.predict(image, image).field
    # Its soft arg-max is blunt: at the border, beyond which nothing is alike,
    # it points inwards, and neighbours take that over. Off it votes cancel.
    middle = field[..., 80:-80, 80:-80]
    assert middle.norm(dim=1).mean() < COARSEST_PX / 4


@pytest.mark.parametrize(("d_rows", "d_cols"), [(4, -8), (-8, 0), (0, 4)])
def test_a_displacement_within_the_search_window_is_found(aligner, d_rows, d_cols):
    # Whole pixels of the coarsest level, so that both images have the same features.
    made_decisive(aligner.net)
    pair = moved_pair(64, 96, d_rows=d_rows, d_cols=d_cols)
    with torch.no_grad():
        field = aligner.predict(*pair).field
    inner = (..., slice(24, -24), slice(24, -24))  # what both show, and whole features
    expected = constant_field(d_cols, d_rows, 64, 96)
    torch.testing.assert_close(field[inner], expected[inner], atol=1e-2, rtol=0)


@pytest.mark.parametrize(("d_rows", "d_cols"), [(16, -20), (-12, 24)])
def test_what_the_prior_says_already_is_kept(aligner, d_rows, d_cols):
    # Beyond the search window: the network would not find it by itself.
    made_decisive(aligner.net)
    pair = moved_pair(96, 128, d_rows=d_rows, d_cols=d_cols)
    prior = constant_field(d_cols, d_rows, 96, 128)
    with torch.no_grad():
        field = aligner.predict(*pair, prior).field
        without = aligner.predict(*pair).field
    inner = (..., slice(36, -36), slice(36, -36))
    torch.testing.assert_close(field[inner], prior[inner], atol=1e-2, rtol=0)
    assert (without[inner] - prior[inner]).norm(dim=1).mean() > COARSEST_PX


def test_no_step_goes_further_than_it_sees(aligner):
    # By its soft arg-max and its correction, each at most the radius.
    with torch.no_grad():
        for steps in aligner.net.level_downmodules.values():
            for step in steps:
                step.to_change.bias.fill_(1e4)
                step.to_pools.bias[-1] = -100.0  # "no change" would hide it
        coarse = aligner.predict(*images(2, 1, 1, 64, 96), levels=()).coarse
    levels = enumerate(SMALL["levels"], start=1)
    largest = sum(2 * sum(spec["radius"]) * 2**level for level, spec in levels)
    assert 2 * coarse[1].abs().max() <= largest


def test_a_vote_is_surer_across_a_line_than_along_it():
    # Weights of a window of radius 1 spread along cols alone: variance 2/3 px^2 there.
    weights = torch.zeros(1, 1, 1, 9)
    weights[..., 3:6] = 1 / 3
    votes, precision = soft_argmax(weights, 1)
    assert votes.abs().max() < 1e-6
    expected = [1 / (2 / 3 + 0.05), 1 / 0.05, 0.0]
    torch.testing.assert_close(precision.flatten(), torch.tensor(expected))


def test_a_vote_in_a_corner_has_its_place_and_correlated_axes():
    # Half at (row -1, col -1), half at (0, 0): mean -1/2, variances and covariance 1/4.
    weights = torch.zeros(1, 1, 1, 9)
    weights[..., 0] = weights[..., 4] = 1 / 2
    votes, precision = soft_argmax(weights, 1)
    torch.testing.assert_close(votes.flatten(), torch.tensor([-0.5, -0.5]))
    covariance = torch.tensor([[0.30, 0.25], [0.25, 0.30]])
    (cc, cr), (_, rr) = torch.linalg.inv(covariance)
    torch.testing.assert_close(precision.flatten(), torch.stack([cc, rr, cr]))


def pooled_by_2(votes, precision):
    """The mean over neighbourhoods of 2 px blocks alone."""
    shares = torch.zeros(1, 6, *votes.shape[-2:])
    shares[:, 1] = 1
    return robust_average(votes, precision, shares, torch.tensor(1.0))


def test_neighbours_complete_what_a_vote_does_not_know():
    # Rows of votes that know d_cols = 1 alone, and d_rows = -2 alone, in turn.
    votes = torch.zeros(1, 2, 16, 20)
    precision = torch.zeros(1, 3, 16, 20)
    votes[:, 0, ::2], precision[:, 0, ::2] = 1.0, 100.0
    votes[:, 1, 1::2], precision[:, 1, 1::2] = -2.0, 100.0
    # Where a vote knows nothing it says 0: off the mean, and so of less weight, but
    # the same for all of a kind, so the means stay.
    found = pooled_by_2(votes, precision)
    expected = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand_as(votes)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_votes_far_off_their_neighbours_count_little():
    votes = torch.zeros(1, 2, 16, 20)
    votes[..., 8, 10] = 20.0  # 1 of the 36 votes of a neighbourhood
    precision = torch.ones(1, 3, 16, 20)
    precision[:, 2] = 0
    # The plain mean would be 20 / 36 px; the outlier is 19.4 px off in both axes,
    # which leaves 1 / (1 + 2 * 19.4**2) of its weight.
    assert pooled_by_2(votes, precision).abs().max() < 0.01


def test_bfloat16_inside_gives_about_the_same_field(aligner):
    pair = images(2, 1, 1, 37, 50)
    prior = 2 * images(1, 2, 37, 50)
    with torch.no_grad():
        exact = aligner.predict(*pair, prior).field
        with torch.autocast("cpu", torch.bfloat16):
            found = aligner.predict(*pair, prior).field
    assert found.dtype == torch.float32
    # Likenesses are rounded by 2**-9 and multiplied by 8, so weights are off by up to
    # 2 %, of both signs, in votes that are mostly within 1 px of 4 px.
    assert (found - exact).norm(dim=1).mean() < 0.02 * COARSEST_PX


# torch 2.13 says so of what its own compiler does.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("has_prior", [True, False])
def test_the_network_compiles_whole(aligner, has_prior):
    compiled = torch.compile(aligner.net, fullgraph=True, backend="eager")
    x = images(2, 2, 32, 48)
    prior = 2 * images(2, 2, 32, 48) if has_prior else None
    expected = aligner.net(x=x, in_field=prior)
    features = aligner.net.state["up"]["1"]["output"]
    found = compiled(x=x, in_field=prior)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        aligner.net.state["up"]["1"]["output"], features, atol=1e-5, rtol=0
    )
    found.sum().backward()
    assert aligner.net.level_upmodules["1"].halve.weight.grad is not None


@pytest.mark.parametrize("level", [0, 1, 2])
def test_embeddings_lie_where_the_losses_look_for_them(aligner, level):
    src, tgt = images(2, 2, 1, 32, 48)
    with torch.no_grad():
        embeddings = aligner.predict(src, tgt, levels=(level,)).embeddings[level]
        aligner.net(x=torch.cat((src, tgt), 1), in_field=None)
    state = aligner.net.state["up"][str(level)]["output"]
    assert torch.equal(state, torch.cat(tuple(embeddings), 1))
    for image, features in zip((src, tgt), embeddings, strict=True):
        small = torch.nn.functional.avg_pool2d(image, 2**level)
        torch.testing.assert_close(features[:, :1], small)
        assert features.shape[1] > 1


@pytest.mark.parametrize("level", [0, 1, 2])
def test_embeddings_are_of_each_image_by_itself(aligner, level):
    src, tgt = images(2, 1, 1, 37, 50)
    with torch.no_grad():
        pair = aligner.predict(src, tgt, levels=(level,)).embeddings[level]
    for image, features in zip((src, tgt), pair, strict=True):
        found = aligner.get_embeddings(image, level=level)
        torch.testing.assert_close(found, features[0, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("has_prior", [True, False])
def test_gradients_of_the_endpoint_error_reach_every_weight(aligner, has_prior):
    src, tgt, prior = images(2, 1, 32, 48), images(2, 1, 32, 48), images(2, 2, 32, 48)
    src[..., :12] = 0  # else that src has data everywhere says nothing
    found = aligner.predict(src, tgt, prior if has_prior else None, levels=())
    wanted = Target(3 * images(2, 2, 32, 48), torch.ones(2, 1, 32, 48))
    endpoint_loss(found.field, found.coarse, wanted).total.backward()
    for name, parameter in aligner.net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_blank_images_give_finite_fields_and_gradients(aligner):
    blank = torch.zeros(1, 1, 32, 48)
    found = aligner.predict(blank, images(1, 1, 32, 48), levels=())
    found.field.abs().sum().backward()
    assert found.field.isfinite().all()
    assert all(p.grad.isfinite().all() for p in aligner.net.parameters())


def test_weights_come_back_from_their_checkpoint(tmp_path):
    saved = make_aligner(tmp_path, checkpoint_name="mine")
    saved.save_checkpoint(tmp_path)
    torch.manual_seed(7)
    loaded = Aligner(tmp_path, operators="corrected", checkpoint_name="mine")
    pair = images(2, 1, 1, 32, 48)
    with torch.no_grad():
        assert torch.equal(loaded.predict(*pair).field, saved.predict(*pair).field)


def test_a_module_of_the_template_loads_and_aligns(tmp_path):
    (path,) = init_pyramid(tmp_path / "pyramid", [3], "correlation")
    assert path.name == "0_mip3in_correlation"
    module = load_module(path, checkpoint_name="first")
    assert type(module.aligner.net).__name__ == "CorrelationNet"
    field = module(src_img=images(40, 56), tgt_img=images(40, 56))
    assert field.shape == (1, 2, 40, 56)


def test_the_template_is_built_from_its_file(tmp_path):
    shutil.copy(str(TEMPLATE), tmp_path / "model_spec.json")
    net = build_net(tmp_path / "model_spec.json", operators="corrected")
    levels = json.loads(TEMPLATE.read_text())["levels"]
    assert list(net.level_upmodules) == [str(i + 1) for i in range(len(levels))]
    searched = [str(i + 1) for i, level in enumerate(levels) if level.get("radius")]
    assert sorted(net.level_downmodules) == searched


def changed(level, **change):
    levels = [dict(one) for one in SMALL["levels"]]
    levels[level] |= change
    return {**SMALL, "levels": levels}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "correlation"}, "levels is missing: expected a list"),
        ({**SMALL, "levels": []}, r"levels is \[\]: expected a list of at least one"),
        ({**SMALL, "levels": {"1": {}}}, "levels is {'1': {}}: expected a list"),
        ({**SMALL, "max_level": 3}, "unknown key .*max_level.*known are .*levels"),
        ({**SMALL, "levels": [3]}, "levels 0: expected an object, got 3"),
        (changed(0, width=3), "levels 0: unknown key .*width"),
        ({**SMALL, "levels": [{"radius": [1], "hidden": 4}]}, "levels 0: features is"),
        (changed(1, radius=[]), "coarsest level has no radius"),
        (changed(0, radius=2), "levels 0: radius is 2: expected a list of whole"),
        (changed(0, radius=[0]), r"radius is \[0\]: expected .*numbers from 1 to 1024"),
        (
            changed(0, radius=[1.5]),
            r"radius is \[1.5\]: expected .*whole numbers from 1",
        ),
        (changed(0, features=0), "features is 0: expected a whole number from 1"),
        (changed(0, features=1025), "features is 1025: expected .* to 1024"),
        (changed(0, features="6"), "features is '6': expected a whole number from 1"),
        (changed(0, blocks=-1), "blocks is -1: expected a whole number from 0"),
        (changed(0, dilations=[0]), "dilations is .*: expected .*whole numbers from 1"),
        (changed(0, hidden=0), "levels 0: .*a level with a radius needs hidden"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(tmp_path, spec, message):
    path = write_spec(tmp_path, spec)
    with pytest.raises(
        PyramidError, match=f"model_spec.json: correlation: .*{message}"
    ):
        build_net(path, operators="corrected")


def test_a_level_without_a_search_is_only_encoded(tmp_path):
    aligner = make_aligner(tmp_path, changed(0, radius=[], hidden=0, dilations=[]))
    with torch.no_grad():
        found = aligner.predict(*images(2, 1, 1, 32, 48), levels=(0, 1))
    assert list(found.coarse) == [2] and found.field.shape == (1, 2, 32, 48)


def test_stock_operators_know_no_correlation(tmp_path):
    with pytest.raises(PyramidError, match="cannot build this network"):
        build_net(write_spec(tmp_path, SMALL), operators="stock")
