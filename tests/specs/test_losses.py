import pytest

from metroem.errors import UsageError
from metroem.specs.losses import LossSpec, parse_losses


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"type": "plain"}, LossSpec("plain")),
        ({"type": "known_warp", "weight": 2}, LossSpec("known_warp", weight=2.0)),
        ({"type": "metric"}, LossSpec("metric", levels=(0,), pre_align_weight=0.7)),
        (
            {
                "type": "metric",
                "weight": 0.5,
                "params": {
                    "levels": [0, 2],
                    "pre_align_sample": 32,
                    "pre_align_weight": 0,
                    "norm_embeddings": False,
                    "sm_div": True,
                    "train_thru": False,
                    "pure_emb": True,
                },
            },
            LossSpec("metric", (0, 2), 32, 0, False, True, False, True, weight=0.5),
        ),
        (
            {"type": "metric", "params": {"pre_align_sample": None}},
            LossSpec("metric", pre_align_sample=None),
        ),
        (
            {"type": "distil", "params": {"iterations": 9}},
            LossSpec("distil", iterations=9),
        ),
    ],
)
def test_a_loss_is_read_with_its_values(spec, expected):
    assert parse_losses(spec, "mine") == (expected,)


def test_a_list_of_losses_keeps_its_order_and_weights():
    specs = [{"type": "known_warp"}, {"type": "plain", "weight": 0.1}]
    found = parse_losses(specs, "mine")
    assert found == (LossSpec("known_warp"), LossSpec("plain", weight=0.1))


def test_only_a_metric_loss_looks_at_embeddings():
    metric, plain = parse_losses(
        [{"type": "metric", "params": {"levels": [1, 3]}}, {"type": "plain"}], "mine"
    )
    assert metric.embedding_levels == (1, 3) and plain.embedding_levels == ()


def metric(**params):
    return {"type": "metric", "params": params}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "expected at least one loss"),
        ("plain", "expected an object, got 'plain'"),
        ([{"type": "plain"}, 3], "1: expected an object, got 3"),
        ({}, "type is missing: expected one of .*'known_warp'"),
        ({"type": "magic"}, "type is 'magic': expected one of"),
        ({"type": ["plain"]}, r"type is \['plain'\]: expected one of"),
        ({"type": "plain", "factor": 2}, r"unknown key \['factor'\]"),
        ({"type": "plain", "params": {"levels": [0]}}, "params of plain: unknown key"),
        ({"type": "distil", "params": {"levels": [0]}}, "params of distil: unknown"),
        ({"type": "metric", "params": None}, "params is None: expected an object"),
        ({"type": "plain", "weight": 0}, "weight is 0: expected a number above 0"),
        ({"type": "plain", "weight": -1}, "weight is -1: expected"),
        ({"type": "plain", "weight": True}, "weight is True: expected"),
        ({"type": "plain", "weight": "2"}, "weight is '2': expected"),
        ({"type": "plain", "weight": float("nan")}, "weight is nan: expected"),
        ({"type": "plain", "weight": float("inf")}, "weight is inf: expected"),
        (metric(levels=0), "levels is 0: expected a list of levels"),
        (metric(levels=[]), r"levels is \[\]: expected a list of levels"),
        (metric(levels=[-1]), r"levels is \[-1\]: .*whole numbers >= 0"),
        (metric(levels=["0"]), "levels is .*whole numbers >= 0"),
        (metric(pre_align_sample=0), "pre_align_sample is 0: .*whole number >= 1"),
        (metric(pre_align_sample=2.5), "pre_align_sample is 2.5: .*whole number"),
        (metric(pre_align_weight="a"), "pre_align_weight is 'a': expected a number"),
        (metric(pre_align_weight=-0.1), "pre_align_weight is -0.1: .*number >= 0"),
        (metric(pure_emb=1), "pure_emb is 1: expected true or false"),
        (
            {"type": "distil", "params": {"iterations": 0}},
            "iterations is 0: expected a whole number >= 1",
        ),
        (
            {"type": "distil", "params": {"iterations": True}},
            "iterations is True: expected a whole number >= 1",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place(spec, message):
    with pytest.raises(UsageError, match=f"^mine: loss_spec:? ?{message}"):
        parse_losses(spec, "mine: loss_spec")
