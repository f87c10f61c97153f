"""The benchmarks run, on little, and their figures are what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metroem.tissue import TissueRecipe, make_tissue
from tests.benchmark_runs import figures

ROOT = Path(__file__).parents[1]
SHARED = os.environ.get("METROEM_SHARED")
PHASE = {"lr": 1e-3, "num_epochs": 4, "smoothness": 20, "crop_size": 96}
# A plain loss leads a correlation network astray in so few steps.
WARP = {"type": "known_warp", "same": 1.0, "peak_px": 4, "shift_px": 4, "tear": 0}
KNOWN = {"loss_spec": {"type": "known_warp"}, "augmentations": [WARP]}
SCHEDULE = {"1": [{**PHASE, "smoothness": 0, **KNOWN}]}

pytestmark = pytest.mark.slow


def test_download_bytes_reads_each_chunk_once(zygote):
    assert figures(zygote, "download_bytes.py")["read_per_needed"] <= 1.1


@pytest.mark.long
def test_kill_resume_ends_with_the_same_weights(zygote):
    found = figures(zygote, "kill_resume.py", "--kills", "2")
    assert found["calm"] == found["killed"] and len(found["calm"]) == 4


@pytest.mark.long
@pytest.mark.parametrize("natural", [False, True])
def test_real_sections_scores_a_stack(tmp_path, natural, zygote):
    stack = make_tissue(TissueRecipe(12, 288 + 48, 256 + 48))
    np.save(tmp_path / "stack.npy", stack)
    (tmp_path / "schedule.json").write_text(json.dumps(SCHEDULE))
    found = figures(
        zygote,
        "real_sections.py",
        *("--stack", str(tmp_path / "stack.npy")),
        *("--train_params_path", str(tmp_path / "schedule.json")),
        *(["--natural"] if natural else []),
    )
    assert found["cpc"][-1] > 0 and len(found["cpc"]) == 2
    assert (found["epe_none"] is None) == natural
    if not natural:
        assert found["epe"][-1] < found["epe_none"]


@pytest.mark.skipif(SHARED is None, reason="METROEM_SHARED names no folder with peers")
@pytest.mark.long
def test_quality_trains_scores_and_writes_its_page(tmp_path, zygote):
    bench = Path(SHARED or "") / "bench"
    np.save(tmp_path / "stack.npy", make_tissue(TissueRecipe(9, 160, 176)))
    phase = {**PHASE, "num_epochs": 1, "loss_spec": {"type": "plain"}}
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
