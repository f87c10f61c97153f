"""Where the original goes wrong and no other test says that ours does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metroem.aligner import Aligner
from metroem.finetuner import optimize_pre_post_ups
from metroem.imaging.loss_weights import PairWeight
from metroem.loss import PairLoss, metric_loss, weighted_mean
from metroem.specs.losses import LossSpec
from tests.models.specs import scalenet, write_spec

ROWS, COLS = 24, 36


def rising(*, factor=1.0):
    """(1, 2, ROWS, COLS): a stretch along cols, which strains every spring but one."""
    field = torch.zeros(1, 2, ROWS, COLS)
    field[:, 0] = factor * torch.arange(float(COLS))
    return field


def test_a_border_of_0_leaves_everything_in():
    # The original cuts its halo by `hsz:-hsz`, and with 0 that is nothing.
    values = torch.arange(6.0).view(1, 1, 2, 3)
    assert float(weighted_mean(values, border=0)) == 2.5

    no_data = torch.zeros(1, 1, ROWS, COLS)
    found = optimize_pre_post_ups(
        *(torch.zeros(1, 1, ROWS, COLS), torch.zeros(1, 1, ROWS, COLS)),
        *(rising(factor=0.1), 30.0, 0.1, 10, None, None, no_data, no_data),
        crop=0,
    )
    assert (found.as_subclass(torch.Tensor) - rising(factor=0.1)).abs().max() > 0.01


@pytest.mark.parametrize("divided", [False, True])
def test_the_smoothness_reported_is_the_smoothness_minimised(divided):
    # The original reports it divided and minimises it undivided.
    features = torch.rand(1, 2, ROWS // 4, COLS // 4)
    field = rising(factor=0.1)
    ones = PairWeight(*(torch.ones(1, 1, ROWS, COLS) for _ in range(2)))
    pair = PairLoss(field, ones, ones, smoothness=8.0)
    spec = LossSpec("metric", levels=(2,), sm_div=divided, pre_align_weight=0.0)

    terms = metric_loss([(2, features, features)], pair, spec)

    smoothness = 8.0 / 4 if divided else 8.0
    assert float(terms.rigidity) > 0
    expected = terms.similarity + smoothness * terms.rigidity
    torch.testing.assert_close(terms.total, expected)


def test_an_image_whose_grey_levels_cancel_is_not_blank(tmp_path):
    # The original takes a sum of 0 for "no data", which a mean of 0 comes near to.
    write_spec(tmp_path, scalenet(4, 6))
    aligner = Aligner(tmp_path)
    image = torch.ones(16, 16)
    image[:, ::2] = -1
    assert image.sum() == 0

    field = aligner(src_img=image, tgt_img=image.T)

    assert field.any()


def test_importing_loads_nothing_and_names_everything():
    # The original pulls in all of its modules, and one of them runs a benchmark.
    program = (
        "import sys, metroem\n"
        "assert not {'torch', 'cloudvolume', 'h5py'} & set(sys.modules)\n"
        "metroem.aligner.Aligner, metroem.finetuner.optimize_pre_post_ups\n"
        "metroem.loss.rigidity"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
