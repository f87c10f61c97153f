"""The finetuner: it gains by its own loss, and finds small shifts."""

import pytest
import torch

from metroem.errors import FieldError, UsageError
from metroem.finetune.adam import (
    FieldAdam,
    _upsample,
    _upsample_transpose,
    finetune_adam,
)
from metroem.finetune.analytic_loss import AdamOptions, AnalyticLoss
from metroem.finetuner import optimize_pre_post_ups
from metroem.geometry.field import warp
from metroem.geometry.rigidity import rigidity_map
from metroem.imaging.loss_weights import PairWeight
from metroem.loss import similarity, weighted_mean

ROWS, COLS = 40, 56


def texture(*, shift=(0.0, 0.0)):
    """(1, 2, H, W) features by formula, displaced by (cols, rows) px."""
    row, col = torch.meshgrid(
        torch.arange(float(ROWS)) + shift[1],
        torch.arange(float(COLS)) + shift[0],
        indexing="ij",
    )
    first = torch.sin(row / 3) + torch.cos(col / 4)
    return torch.stack([first, torch.sin((row + col) / 5)])[None]


def ones(batch=1):
    return PairWeight(*(torch.ones(batch, 1, ROWS, COLS) for _ in range(2)))


def nothing(batch=1):
    return torch.zeros(batch, 2, ROWS, COLS)


def inner(field):
    return field[..., 6:-6, 6:-6]


OPTIONS = AdamOptions(smoothness=1.0, num_iter=60, l2=0.0)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_a_small_shift_is_found(momentum):
    src, tgt = texture(), texture(shift=(1.5, -1.0))
    rate = 0.1 if momentum is None else 300.0
    options = AdamOptions(
        smoothness=1.0, num_iter=150, l2=0.0, rate_px=rate, momentum=momentum
    )

    tuned = finetune_adam(src, tgt, nothing(), ones(), ones(), options)

    # src(p + d) = tgt(p) = src(p + shift), so d is the shift.
    mean = inner(tuned.field).mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([1.5, -1.0]), atol=0.1, rtol=0)


def test_a_coarser_field_finds_it_too():
    src, tgt = texture(), texture(shift=(1.5, -1.0))
    options = AdamOptions(smoothness=1.0, num_iter=100, l2=0.0, coarseness=2)

    field = finetune_adam(src, tgt, nothing(), ones(), ones(), options).field

    assert field.shape == (1, 2, ROWS, COLS)
    mean = inner(field).mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([1.5, -1.0]), atol=0.1, rtol=0)


def test_a_coarser_change_leaves_the_detail_of_the_field():
    torch.manual_seed(0)
    detail = 0.1 * torch.randn(1, 2, ROWS, COLS)
    options = AdamOptions(smoothness=0.1, num_iter=30, coarseness=2)
    src, tgt = texture(), texture(shift=(1.5, -1.0))

    field = finetune_adam(src, tgt, detail, ones(), ones(), options).field

    change = field - detail
    assert inner(change).abs().mean() > 0.3
    # Bilinear between knots 4 px apart: hardly any step from pixel to pixel.
    step, steps_of_detail = (t.diff(dim=-1).abs().mean() for t in (change, detail))
    assert step < steps_of_detail


@pytest.mark.parametrize("rate_px", [0.1, 5.0])
def test_the_result_is_never_worse_by_its_own_loss(rate_px):
    start = 0.5 * torch.randn(1, 2, ROWS, COLS)
    options = AdamOptions(num_iter=12, rate_px=rate_px)

    tuned = finetune_adam(texture(), texture(), start, ones(), ones(), options)

    assert (tuned.loss_after <= tuned.loss_before).all()
    assert tuned.iterations == options.num_steps == 10


def test_where_nothing_can_be_gained_the_start_is_returned():
    tuned = finetune_adam(
        texture(), texture(), nothing(), ones(), ones(), AdamOptions(num_iter=5)
    )

    assert torch.equal(tuned.field, nothing())


def test_the_loss_is_similarity_rigidity_and_magnitude():
    src, tgt = texture(), texture(shift=(1, 2))
    field = 0.3 * torch.randn(1, 2, ROWS, COLS)
    options = AdamOptions(smoothness=7.0, num_iter=0, border=3, l2=0.5)

    tuned = finetune_adam(src, tgt, field, ones(), ones(), options)

    expected = (
        similarity(warp(src, field), tgt, border=3)
        + 7 * weighted_mean(rigidity_map(field), border=3)
        + 0.5 * (field**2).mean()
    )
    torch.testing.assert_close(tuned.loss_before, expected[None])
    torch.testing.assert_close(tuned.field, field)


def test_samples_of_a_batch_are_searched_each_for_itself():
    src = texture().expand(2, -1, -1, -1)
    tgt = torch.cat([texture(shift=(1, 0)), texture(shift=(0, -2))])

    together = finetune_adam(src, tgt, nothing(2), ones(2), ones(2), OPTIONS)

    for i in range(2):
        alone = finetune_adam(
            src[i : i + 1], tgt[i : i + 1], nothing(), ones(), ones(), OPTIONS
        )
        # float32 rounding, through 60 steps.
        torch.testing.assert_close(together.field[i], alone.field[0], atol=2e-3, rtol=0)


def test_what_weighs_nothing_is_not_aligned():
    src, tgt = texture(), texture(shift=(1, 0))
    tgt[..., :20, :] = texture(shift=(-1, 0))[..., :20, :]
    weight = ones()
    weight.tgt[..., :20, :] = 0

    tuned = finetune_adam(src, tgt, nothing(), weight, ones(), OPTIONS)

    # The weightless half follows the other by rigidity alone.
    assert inner(tuned.field)[:, 0].mean() > 0.5


def test_the_search_ends_when_the_rate_has_been_halved_often_enough():
    options = AdamOptions(num_iter=500, patience=2, max_halvings=2)

    tuned = finetune_adam(texture(), texture(), nothing(), ones(), ones(), options)

    assert tuned.iterations < 100


def test_the_field_given_is_left_alone_and_no_gradient_comes_back():
    start = nothing().requires_grad_()

    with torch.no_grad():
        field = finetune_adam(
            texture(), texture(shift=(1, 0)), start, ones(), ones(), OPTIONS
        ).field

    assert not start.any()
    assert not field.requires_grad


def test_a_field_of_another_size_is_refused():
    with pytest.raises(FieldError, match="sizes must be equal"):
        finetune_adam(
            texture(), texture(), torch.zeros(1, 2, 40, 40), ones(), ones(), OPTIONS
        )


class TestOriginalForm:
    """`optimize_pre_post_ups`, as pipelines call it."""

    def call(self, **changed):
        no_data = torch.zeros(ROWS, COLS, dtype=torch.bool)
        arguments = {
            "src": texture(),
            "tgt": texture(shift=(1.5, -1.0)),
            "initial_res": nothing(),
            "sm": 1.0,
            "lr": 0.1,
            "num_iter": 100,
            "src_defects": torch.zeros(1, ROWS, COLS),
            "tgt_defects": None,
            "src_zeros": no_data,
            "tgt_zeros": no_data[None],
        }
        return optimize_pre_post_ups(**(arguments | changed))

    def test_it_finds_a_shift_and_returns_a_torchfields_field(self):
        import torchfields

        field = self.call(normalize=False, l2=0, crop=2, max_bad=5)

        assert isinstance(field, torchfields.Field)
        mean = inner(field.as_subclass(torch.Tensor)).mean((0, 2, 3))
        torch.testing.assert_close(mean, torch.tensor([1.5, -1.0]), atol=0.1, rtol=0)

    def test_positional_arguments_are_in_the_order_of_the_original(self):
        no_data = torch.zeros(1, 1, ROWS, COLS)

        optimize_pre_post_ups(
            *(texture(), texture(), nothing(), 30.0, 0.1, 2),
            *(None, None, no_data, no_data, None, "sgd", 2, 50, 1, 0, 1e-4, True),
        )

    def test_mask_rules_are_read_with_tuples_too(self):
        tgt = texture(shift=(1.5, -1.0))
        no_data = torch.zeros(1, 1, ROWS, COLS)
        no_data[..., :20, :] = 1
        rule = {
            "name": "tgt_zeros",
            "binarization": {"strat": "eq", "value": 0},
            "coarsen_ranges": [(1, 0)],
        }

        masked = self.call(
            tgt=torch.where(no_data > 0, 5.0, tgt),
            tgt_zeros=no_data,
            crop=2,
            normalize=False,
            mse_keys_to_apply={"tgt": [rule]},
        )

        assert inner(masked.as_subclass(torch.Tensor))[:, 0].mean() > 0.7

    @pytest.mark.parametrize(
        "changed",
        [
            {"opt_mode": "lbfgs"},
            {"opt_mode": "sgd", "opt_params": {"nesterov": True}},
            {"sm_keys_to_apply": {"both": []}},
            {"mse_keys_to_apply": {"src": [{"name": "src", "colour": 1}]}},
        ],
    )
    def test_what_it_does_not_know_is_refused(self, changed):
        with pytest.raises(UsageError):
            self.call(**changed)


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_written_out_is_that_of_the_loss(masked):
    torch.manual_seed(0)
    field = 0.3 * torch.randn(2, 2, ROWS, COLS)
    src, tgt = texture().expand(2, -1, -1, -1), texture(shift=(1, 2))
    tgt = tgt.expand(2, -1, -1, -1)
    similarity_weight, smoothness_weight = ones(2), ones(2)
    if masked:
        similarity_weight.tgt[..., :15, :20] = 0
        smoothness_weight.tgt[..., 20:, 30:] = 0.1
    options = AdamOptions(smoothness=7.0, border=3, l2=0.5)
    loss = AnalyticLoss((src, tgt), (similarity_weight, smoothness_weight), options)

    value, gradient = loss.with_gradient(field)

    for i in range(2):
        leaf = field[i : i + 1].clone().requires_grad_()
        alike = (warp(src[:1], leaf) - tgt[:1]) ** 2
        expected = (
            weighted_mean(alike, similarity_weight.tgt[:1], border=3)
            + 7 * weighted_mean(rigidity_map(leaf), smoothness_weight.tgt[:1], border=3)
            + 0.5 * (leaf**2).mean()
        )
        (slope,) = torch.autograd.grad(expected, leaf)
        torch.testing.assert_close(value[i], expected.detach())
        torch.testing.assert_close(gradient[i], slope[0], atol=1e-6, rtol=1e-4)


def test_a_search_at_several_scales_makes_fewer_steps():
    steps = {n: AdamOptions(num_iter=n).num_steps for n in (5, 12, 100, 300)}

    assert steps == {5: 5, 12: 10, 100: 34, 300: 100}
    assert AdamOptions(num_iter=300, momentum=0.9).num_steps == 300
    assert AdamOptions(num_iter=300, coarseness=1).num_steps == 300


def test_what_is_coarser_gets_the_gradient_of_what_is_finer():
    # Also where the size is no multiple of the scale.
    change = torch.randn(2, 2, 10, 15, dtype=torch.float64, requires_grad=True)
    like, pull = torch.empty(1, 1, 38, 57), torch.randn(2, 2, 38, 57).double()

    (expected,) = torch.autograd.grad(_upsample(change, 2, like=like), change, pull)

    torch.testing.assert_close(_upsample_transpose(pull, 2), expected)


def test_the_gradient_knows_how_weights_that_move_change_the_means():
    torch.manual_seed(0)
    weights = []
    for _ in range(2):
        src = torch.rand(2, 1, ROWS, COLS, dtype=torch.float64)
        tgt = torch.rand(2, 1, ROWS, COLS, dtype=torch.float64)
        weights.append(PairWeight(src, tgt))
    features = torch.randn(2, 2, 3, ROWS, COLS, dtype=torch.float64)
    options = AdamOptions(smoothness=7.0, border=3, l2=0.5)
    loss = AnalyticLoss((features[0], features[1]), (weights[0], weights[1]), options)
    field, way = torch.randn(2, 2, 2, ROWS, COLS, dtype=torch.float64)

    _, gradient = loss.with_gradient(field)

    # Central differences over a step that no pixel crosses a border of bilinear in.
    step = 1e-7 * way
    ahead, behind = (loss.with_gradient(at)[0] for at in (field + step, field - step))
    found = (gradient * way).sum((1, 2, 3))
    torch.testing.assert_close(found, (ahead - behind) / 2e-7, atol=0, rtol=1e-5)


def test_a_search_that_leaves_nothing_to_compare_is_not_kept(monkeypatch):
    # src shows nothing right of col 28: a field that points there has no loss at all.
    weight, start = ones(), nothing() + 1.0
    weight.src[..., 28:] = 0

    def runs_away(search, loss):
        search.best_loss = torch.zeros(1)

    monkeypatch.setattr(FieldAdam, "update_best", runs_away)
    monkeypatch.setattr(FieldAdam, "best_field", property(lambda _: nothing() + 400.0))
    src, tgt = texture(), texture(shift=(1.5, -1.0))
    tuned = finetune_adam(src, tgt, start, weight, ones(), OPTIONS)
    assert torch.equal(tuned.field, start) and tuned.loss_after == tuned.loss_before
