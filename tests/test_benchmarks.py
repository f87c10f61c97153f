"""The benchmarks run, on little, and their last line has the figures they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tissues
import torch

from metroem.errors import UsageError
from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from metroem.models.weights import checkpoint_path, save_weights
from metroem.synthetic.tissue import TissueRecipe, make_tissue
from tests.models.specs import CORRELATION, write_spec

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHARED = os.environ.get("METROEM_SHARED")
PHASE = {"lr": 1e-3, "num_epochs": 1, "smoothness": 20, "crop_size": 96}

pytestmark = pytest.mark.slow


def figures(zygote, script, *arguments):
    """The JSON of a benchmark's last line on stdout."""
    done = zygote.run(BENCHMARKS.parent, [BENCHMARKS / script, *arguments])
    assert done["status"] == 0, done["output"][-4000:]
    return json.loads(done["printed"].splitlines()[-1])


def test_a_training_step_is_compared_with_the_bare_network(zygote):
    small = ("--size", "96", "--rounds", "7", "--template", "correlation")
    of_bare = figures(zygote, "train_step.py", *small)["correlation"]["of_bare"]
    assert of_bare["bare"] == 1 and len(of_bare) == 4


def test_a_download_is_compared_with_cloudvolume_alone(zygote):
    small = ("--num_sections", "3", "--patch_px", "256", "--chunk", "64", "1")
    small += ("--small_patch_px", "64", "--many", "20", "--rounds", "7")
    found = figures(zygote, "download_speed.py", *small)
    assert found["times_cloud_volume"] > 0 and found["times_cloud_volume_and_h5py"] > 0
    assert set(found["peak_mib_by_sections"]) == {"2", "20"}


@pytest.mark.long
def test_a_large_section_is_measured_in_tiles_and_whole(zygote):
    sizes = ("--sizes", "192", "544", "--made_px", "192", "--tile", "512", "256")
    found = figures(zygote, "large_section.py", *sizes)
    assert found["192"]["apart_max_px"] == 0  # not cut at all
    assert found["544"]["tiled"]["bytes_per_px"] > 0
    assert found["544"]["apart_max_px"] < 1e-3  # but for rounding


@pytest.mark.long
def test_the_steps_of_a_stack_are_measured_by_sections_and_size(tmp_path, zygote):
    np.save(tmp_path / "stack.npy", make_tissue(TissueRecipe(3, 128, 144)))
    (module,) = init_pyramid(tmp_path / "pyramid", [0])
    write_spec(module / "model", CORRELATION)
    loaded: Any = load_module(module, checkpoint_name=None)
    weights = checkpoint_path(module / "model", "checkpoint")
    save_weights(loaded.aligner.net, weights)
    paths = ("--stack", str(tmp_path / "stack.npy"))
    paths += ("--pyramid", str(tmp_path / "pyramid"))
    found = figures(zygote, "stack_scale.py", *paths, "--cases", "2x128", "3x160")
    assert set(found["2x128"]) == {"place", "pairs", "relax", "render", "check"}
    assert found["3x160"]["pairs"]["peak"] > found["3x160"]["pairs"]["start"] > 0
    assert 1 <= found["3x160"]["render"]["read"] < 1.3
    # One case of 128 px, and one of two sections.
    assert found["by_sections"] == found["by_size"]
    assert found["by_size"]["all"] == {"seconds": 1, "peak": 1}


def test_methods_are_compared_on_tissues_and_more_of_them_can_be_added(
    tmp_path, zygote
):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def align(src, tgt):\n"
        "    return np.stack([0 * tgt + 3, 0 * tgt - 4])\n"
    )
    page, out = tmp_path / "docs" / "page.md", tmp_path / "out"
    page.parent.mkdir()
    paths = ("--data", str(tmp_path), "--out", str(out), "--page", str(page))
    chosen = ("--methods", "not aligned", "DIS")

    figures(zygote, "tissues.py", *paths, *chosen, "--tissues", "made")
    mine = ("--method", f"mine={tmp_path / 'mine.py'}:align")
    counts = figures(zygote, "tissues.py", *paths, "--methods", "not aligned", *mine)

    # All other tissues have no file there. Four pairs of three kinds.
    assert counts == {"not aligned": 12, "DIS": 12, "mine": 12}
    results = json.loads((out / "results.json").read_text())
    # The field of "mine" is 5 px long everywhere, and the truth is 0.
    assert results["mine"]["made 0 neighbours"]["epe"] == pytest.approx(5)
    # (3, -4) there and (3, -4) back.
    assert results["mine"]["made 0 neighbours"]["cycle"] == pytest.approx(10)
    found = {name: results[name]["made 1 warped"]["known"] for name in counts}
    assert found["DIS"] < 0.3 * found["not aligned"]
    text = page.read_text()
    assert "| mine |" in text and "| DIS |" in text and "fib25" not in text


@pytest.mark.parametrize("name", ["DIS", "pretrained", "finetuned, 5 minutes"])
def test_a_method_of_your_own_has_a_name_of_its_own(tmp_path, name):
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(UsageError, match=f"--method {name}: is a method already"):
        tissues.main([*flags, "--method", f"{name}=mine.py:align"])


def test_figures_of_other_weights_are_dropped(tmp_path):
    names = ["DIS", "untrained", "networks", "pretrained", "finetuned, 2 minutes"]
    results = {name: {"vnc 0 warped": {"known": 1.5}} for name in names}
    tissues.drop_figures_of_other_weights(tmp_path, results)
    tissues.drop_figures_of_other_weights(tmp_path, results)  # the same weights
    assert list(results) == names

    (noted,) = tmp_path.glob("weights*")
    noted.write_text("0" * 64)
    tissues.drop_figures_of_other_weights(tmp_path, results)

    assert list(results) == ["DIS", "untrained"]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert noted.read_text() != "0" * 64


@pytest.mark.skipif(SHARED is None, reason="METROEM_SHARED names no folder with peers")
@pytest.mark.long
def test_unrelated_images_are_counted_that_are_refused(tmp_path, zygote):
    for name, seed in (("stack", 0), ("other", 1)):
        np.save(
            tmp_path / f"{name}.npy", make_tissue(TissueRecipe(6, 128, 144, seed=seed))
        )
    (module,) = init_pyramid(tmp_path / "pyramid", [0])
    write_spec(module / "model", CORRELATION)
    loaded: Any = load_module(module, checkpoint_name=None)
    save_weights(loaded.aligner.net, checkpoint_path(module / "model", "checkpoint"))
    found = figures(
        zygote,
        "two_images.py",
        *("--stack", str(tmp_path / "stack.npy"), "--parts", "refused"),
        *("--pyramid", str(tmp_path / "pyramid"), "--sections", "4", "5"),
        *("--bench", str(Path(SHARED or "") / "bench")),
        *("--other_stacks", str(tmp_path / "other.npy")),
    )
    assert found == {"refused": {"pairs": 4, "refused": 4}}


@pytest.mark.long  # a minute or two, which CI does not have yet
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
    done = zygote.run(BENCHMARKS.parent, [BENCHMARKS / "gpu.py"])
    assert done["status"] == 1 and "try --device cpu" in done["output"]


@pytest.mark.skipif(SHARED is None, reason="METROEM_SHARED names no folder with peers")
@pytest.mark.long
def test_quality_trains_scores_and_writes_its_page(tmp_path, zygote):
    bench = Path(SHARED or "") / "bench"
    np.save(tmp_path / "stack.npy", make_tissue(TissueRecipe(9, 160, 176)))
    phase = {**PHASE, "loss_spec": {"type": "plain"}}
    (tmp_path / "schedule.json").write_text(json.dumps({"1": [phase]}))
    stack, peers = tmp_path / "stack.npy", tmp_path / "peers.json"
    cases = ["--magnitudes", "12,30,60", "--limit", "1", "--peers", "identity"]
    script = [sys.executable, str(bench / "run.py"), "--exact", *cases]
    command = [*script, "--stack", f"{stack}:6:", "--out", str(peers)]
    subprocess.run(command, check=True, capture_output=True)
    peer_results = json.loads(peers.read_text())
    peer = [{**record, "method": "still"} for record in peer_results["records"]]
    peer_results["records"] += peer
    peers.write_text(json.dumps(peer_results))
    train_flags = ["--train_params_path", str(tmp_path / "schedule.json")]

    found = figures(
        zygote,
        "quality.py",
        *("--stack", str(stack), "--bench", str(bench), "--out", str(tmp_path / "o")),
        *("--other_stack", str(stack), "--other_peers_json", str(peers)),
        *("--peers_json", str(peers), "--page", str(tmp_path / "quality.md")),
        *("--num_train", "6", "--score_from", "6", "--limit", "1"),
        *("--train_mode", "custom", *train_flags, "--parts", "train", "score", "page"),
    )

    assert len(found["bars"]) == 16 and found["parts"] == ["train", "score", "page"]
    page = (tmp_path / "quality.md").read_text()
    pictures = sorted(path.name for path in (tmp_path / "quality").iterdir())
    assert len(pictures) == 10 and all(f"quality/{name}" in page for name in pictures)
