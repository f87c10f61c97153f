"""Specs that artificery builds, and whose networks need help to run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metroem.aligner import Aligner
from metroem.errors import PyramidError
from metroem.models.build import build_net, size_divisor
from tests.models.specs import convblock, scalenet, without_features, write_spec

OPERATORS = ("corrected", "stock")


def custom(code):
    return {"type": "custom_layer", "import": ["torch"], "code": f"result = {code}"}


def hourglass(levels):
    """A net of levels that gives features, to stand inside of another one's level."""
    return {
        "type": "scalenet",
        "max_level": levels,
        "upmodules": {str(i): convblock(1 if i == 0 else 4, 4) for i in range(levels)},
        "downmodules": {str(i): convblock(4, 4) for i in range(levels)},
    }


def with_inner(spec, module, level="1", channels=None):
    """The spec, whose features of a level come from a module of a side's channels."""
    spec = copy.deepcopy(spec)
    spec["upmodules"][level]["module"]["processors"][1]["module"] = module
    if channels is not None:
        spec["upmodules"][level]["module"]["processors"][1]["fm_range"] = [0, channels]
    return spec


def nested(levels):
    # The first of 4 features goes in; 4 come out, beside the image.
    spec = scalenet(4, 5)
    return with_inner(spec, hourglass(levels), channels=1)


def run(aligner, rows, cols):
    field, embeddings, *_ = aligner.predict(
        torch.rand(1, 1, rows, cols), torch.rand(1, 1, rows, cols), levels=(0, 1)
    )
    assert field.shape == (1, 2, rows, cols) and torch.isfinite(field).all()
    return embeddings


@pytest.mark.parametrize("operators", OPERATORS)
@pytest.mark.parametrize(("rows", "cols"), [(66, 90), (64, 96), (7, 41)])
def test_a_net_within_a_level_takes_any_size(tmp_path, operators, rows, cols):
    write_spec(tmp_path, nested(3))
    aligner = Aligner(tmp_path, operators=operators)

    embeddings = run(aligner, rows, cols)

    assert embeddings[1].tgt.shape == (1, 5, -(-rows // 2), -(-cols // 2))


@pytest.mark.parametrize(
    ("spec", "multiple"),
    [
        (scalenet(4, 6, 8), 4),
        (nested(1), 2),
        (nested(3), 2 * 4),
        # Pooled twice in turn, at level 1.
        (
            with_inner(
                scalenet(4, 6),
                custom(
                    "torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.MaxPool2d(2), "
                    "torch.nn.Conv2d(4, 5, 3, padding=1), torch.nn.Upsample("
                    "scale_factor=4))"
                ),
            ),
            2 * 4,
        ),
    ],
)
@pytest.mark.parametrize("operators", OPERATORS)
def test_sides_are_multiples_of_what_the_innermost_level_spans(
    tmp_path, spec, multiple, operators
):
    path = write_spec(tmp_path, copy.deepcopy(spec))

    assert size_divisor(build_net(path, operators=operators), path) == multiple
    run(Aligner(tmp_path, operators=operators), 3 * multiple + 1, 5 * multiple + 2)


IN_PLACE = {
    # artificery's own: adds to what a ReLU gave, in place.
    "convblock": {
        "type": "convblock",
        "arch_desc": {
            "fms": [1, 4, 4, 4, 3],
            "k": 3,
            "act": "relu",
            "skips": {"1": 3},
        },
    },
    # What the first layer gives is wanted for the second one's weights.
    "custom": custom(
        "torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3, padding=1), torch.nn.Sigmoid(), "
        "torch.nn.ReLU(inplace=True), torch.nn.LeakyReLU(0.1, inplace=True))"
    ),
}


@pytest.mark.parametrize("operators", OPERATORS)
@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_relu_in_place_trains(tmp_path, operators, kind):
    spec = with_inner(scalenet(4, 6), copy.deepcopy(IN_PLACE[kind]), level="0")
    write_spec(tmp_path, spec)
    aligner = Aligner(tmp_path, operators=operators)

    embedding = run(aligner, 16, 16)[0]
    (embedding.src * embedding.tgt).sum().backward()

    (convolution, *_) = (
        m for m in aligner.net.level_upmodules["0"].modules() if type(m) is nn.Conv2d
    )
    assert convolution.weight.grad.any()


def test_its_values_and_gradients_are_those_of_a_relu(tmp_path):
    spec = with_inner(scalenet(4, 6), custom("torch.nn.ReLU()"), level="0")
    net = build_net(write_spec(tmp_path, spec), operators="stock")
    (relu,) = (m for m in net.modules() if isinstance(m, nn.ReLU))
    values = torch.tensor([-1.0, -0.0, 0.0, 1e-30, 2.0, float("nan"), float("inf")])
    found, expected = (values.clone().requires_grad_() for _ in range(2))

    ours, theirs = relu(found), F.relu(expected)
    ours.sum().backward()
    theirs.sum().backward()

    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=0)


@pytest.mark.parametrize("operators", OPERATORS)
def test_a_mask_on_the_output_is_refused_with_its_name(tmp_path, operators):
    masked = {"type": "mask_output_based_on_input", "inner_module": convblock(1, 3)}
    path = write_spec(tmp_path, with_inner(scalenet(4, 6), masked, level="0"))

    with pytest.raises(PyramidError, match="mask_output_based_on_input.*take it out"):
        Aligner(tmp_path, operators=operators)

    with pytest.raises(PyramidError, match=str(path)):
        build_net(path, operators=operators)


@pytest.mark.parametrize("operators", OPERATORS)
def test_finetuning_without_features_is_refused(tmp_path, operators):
    write_spec(tmp_path, without_features())
    aligner = Aligner(tmp_path, operators=operators, finetune=True)
    image = torch.rand(1, 1, 24, 40)

    says = "level 0 of the network gives the image alone.*with features: 1. Name"
    with pytest.raises(PyramidError, match=says):
        aligner(src_img=image, tgt_img=image)

    assert torch.isfinite(aligner(image, image, finetune=False)).all()
    knots = {"finetune_level": 1, "finetune_knots": (16,), "finetune_iter": 3}
    assert torch.isfinite(aligner(image, image, **knots)).all()


def test_a_network_without_any_features_says_so(tmp_path):
    spec = without_features()
    del spec["upmodules"]["1"], spec["downmodules"]["1"]
    write_spec(tmp_path, spec)
    image = torch.rand(1, 1, 24, 40)

    with pytest.raises(PyramidError, match="levels with features: none"):
        Aligner(tmp_path, operators="corrected").predict(image, image)
