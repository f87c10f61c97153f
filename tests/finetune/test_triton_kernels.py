"""What a GPU does in one go beside what torch does, both on a CPU."""

from types import ModuleType
from unittest.mock import patch

import pytest
import torch

from metroem.finetune.adam import FieldAdam
from metroem.finetune.analytic_loss import AdamOptions, AnalyticLoss, can_use_triton
from metroem.imaging.loss_weights import PairWeight


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """As Triton's interpreter runs them (`tests/conftest.py`)."""
    return pytest.importorskip(
        "metroem.finetune.triton_kernels",
        reason="Triton comes with torch for GPUs",
        exc_type=ImportError,
    )


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 9, 7), (2, 3, 37, 23), (3, 7, 1, 40)])
def test_loss_and_gradient_are_those_of_torch(kernels, shape, moving):
    batch, _, rows, cols = shape
    chance = torch.Generator().manual_seed(0)
    features = torch.randn(2, *shape, generator=chance)
    weights = torch.rand(4, batch, 1, rows, cols, generator=chance)
    if not moving:
        weights[:2] = 1
    field = 3 * torch.randn(batch, 2, rows, cols, generator=chance)
    field[0, :, 0, 0] = torch.tensor([1e4, -1e4])  # outside, as far as it goes
    pairs = PairWeight(*weights[::2]), PairWeight(*weights[1::2])
    loss = AnalyticLoss(
        (features[0], features[1]), pairs, AdamOptions(l2=0.3, border=2)
    )
    wanted = loss.with_gradient(field)

    with patch("metroem.finetune.analytic_loss.can_use_triton", return_value=True):
        found = loss.with_gradient(field)

    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=0)
    size = wanted[1][1:].abs().max() if batch > 1 else 1.0
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-6 * float(size))


# The interpreter computes by numpy, which warns of them.
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_place_that_is_no_number_is_read_as_torch_reads_it(kernels):
    chance = torch.Generator().manual_seed(1)
    features = torch.randn(2, 1, 2, 5, 8, generator=chance)
    ones = torch.ones(1, 1, 5, 8)
    pairs = PairWeight(ones, ones), PairWeight(ones, ones)
    loss = AnalyticLoss(
        (features[0], features[1]), pairs, AdamOptions(smoothness=0, l2=0)
    )
    field = torch.zeros(1, 2, 5, 8)
    field[0, 0, 2, 3], field[0, 1, 1, 4] = float("nan"), float("inf")
    value, wanted = loss.with_gradient(field)
    assert value.isnan().all() and wanted.isfinite().sum() > 50

    with patch("metroem.finetune.analytic_loss.can_use_triton", return_value=True):
        other, found = loss.with_gradient(field)

    assert other.isnan().all()
    known = wanted.isfinite()
    torch.testing.assert_close(found[known], wanted[known])


@pytest.mark.parametrize(
    ("shape", "scale"), [((9, 7), 2), ((37, 64), 4), ((3, 100), 4), ((1, 1), 2)]
)
def test_the_coarser_gradient_is_that_of_torch(kernels, shape, scale):
    rows, cols = (-(-size // scale) for size in shape)
    chance = torch.Generator().manual_seed(2)
    change = torch.zeros(2, 2, rows, cols, requires_grad=True)
    gradient = torch.randn(2, 2, *shape, generator=chance)
    fine = torch.nn.functional.interpolate(
        change * scale, scale_factor=scale, mode="bilinear"
    )
    (wanted,) = torch.autograd.grad(fine[..., : shape[0], : shape[1]], change, gradient)
    torch.testing.assert_close(
        kernels.upsample_transpose(gradient, scale), wanted, rtol=1e-5, atol=1e-4
    )


def test_a_search_by_kernels_ends_where_that_of_torch_does(kernels):
    chance = torch.Generator().manual_seed(3)
    features = torch.randn(2, 1, 3, 20, 33, generator=chance)
    ones = torch.ones(1, 1, 20, 33)
    pairs = PairWeight(ones, ones), PairWeight(ones, ones)
    fields = []
    for by_kernels in (False, True):
        loss = AnalyticLoss((features[0], features[1]), pairs, AdamOptions())
        search = FieldAdam(torch.zeros(1, 2, 20, 33), loss.options)
        with (
            patch(
                "metroem.finetune.analytic_loss.can_use_triton", return_value=by_kernels
            ),
            patch("metroem.finetune.adam.can_use_triton", return_value=by_kernels),
        ):
            for _ in range(2):
                search.step(*loss.with_gradient(search.field))
        fields.append(search.field)
    assert fields[0].abs().max() > 0.1
    torch.testing.assert_close(fields[1], fields[0], rtol=0, atol=1e-4)


def test_without_a_compiler_torch_does_it_and_the_log_says_so(kernels, caplog):
    class OnGPU(torch.Tensor):
        is_cuda = True

    field = torch.zeros(1, 2, 3, 4).as_subclass(OnGPU)
    with patch(
        "metroem.finetune.triton_kernels.upsample_transpose",
        side_effect=RuntimeError("no C compiler\n"),
    ):
        assert not can_use_triton(field)
    assert "no C compiler. It needs a C compiler" in caplog.text
    assert not can_use_triton(field.double())
