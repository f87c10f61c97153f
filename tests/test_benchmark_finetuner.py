"""The benchmarks of the finetuner and of a GPU run, on little."""

from pathlib import Path

import finetuner_pair
import pytest
import torch
from original import PYTHON

from tests.benchmark_runs import figures, run

ROOT = Path(__file__).parents[1]


def test_the_pair_has_masks_that_move_and_differ():
    pair = finetuner_pair.make_pair(0, size=96)
    for side in ("src", "tgt"):
        no_data, defects = pair[f"{side}_zeros"], pair[f"{side}_defects"]
        assert 0 < no_data.float().mean() < 0.2 and 0 < defects.mean() < 0.2
        assert not pair[side].masked_select(no_data).any()
        assert torch.isfinite(pair[side]).all()
    assert not torch.equal(pair["src_zeros"], pair["tgt_zeros"])


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.is_file(), reason=f"no {PYTHON}: make original")
def test_the_finetuner_is_timed_beside_the_original(zygote):
    found = figures(zygote, "finetuner.py", "--size", "64", "--rounds", "7")
    assert set(found["seconds"]) >= {"original", "ours", "bare_warp"}

    whole = ("--whole", "--size", "96", "--num_iter", "40", "--seeds", "1")
    assert 0 < figures(zygote, "finetuner.py", *whole)["largest_loss_ratio"] < 2


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path, zygote):
    small = ("--size", "64", "--batches", "1", "--precisions", "fp32", "--rounds", "7")
    table = tmp_path / "profile.txt"
    found = figures(
        zygote, "gpu.py", "--device", "cpu", *small, "--profile", str(table)
    )
    assert found["rows"]["batch 1, fp32"]["host_syncs"] is None
    assert "finetuner_step" in table.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so(zygote):
    done = run(zygote, "gpu.py")
    assert done["status"] == 1 and "try --device cpu" in done["output"]
