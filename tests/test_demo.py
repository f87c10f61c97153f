import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metroem import demo
from metroem.demo import Run, make_sections, run_demo, run_steps
from metroem.errors import MetroEMError, UsageError
from metroem.synthetic.requests import GAP, MARKER, DemoRequest

ROOT = Path(__file__).resolve().parents[1]


def small(folder, **changes):
    return DemoRequest(
        folder, **{"num_sections": 9, "rows": 160, "cols": 128, **changes}
    )


def test_the_same_request_makes_the_same_sections(tmp_path):
    request = small(tmp_path, num_sections=7, num_held_out=1)
    first, again = make_sections(request), make_sections(request)
    assert len(first) == 7
    assert first[0].image.shape == (160, 128)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.image, other.image)


def test_sections_scored_are_apart_from_those_trained_on(tmp_path):
    request = DemoRequest(tmp_path)
    first_scored = request.num_sections - request.num_held_out - 1  # tgt of a pair
    assert first_scored - (request.num_train - 1) > GAP


def test_too_few_sections_are_refused(tmp_path):
    with pytest.raises(UsageError, match="leaves 1 sections for training"):
        small(tmp_path, num_sections=9, num_held_out=5)


def test_sizes_that_the_coarse_mip_does_not_divide_are_refused(tmp_path):
    with pytest.raises(UsageError, match="multiples of 4"):
        small(tmp_path, rows=161, num_held_out=1)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="no demo wrote"):
        run_demo(small(tmp_path, num_held_out=1))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_what_an_earlier_demo_left_is_removed(tmp_path):
    (tmp_path / MARKER).write_text("")
    (tmp_path / "pyramid").mkdir()
    demo._clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MARKER]


def test_the_steps_are_those_a_user_would_type(tmp_path):
    run = Run(tmp_path, range(0, 9), (16, 0), 128, (2, 0), tmp_path / "s.json", 7)
    steps = (" ".join(command) for command in run.commands())
    imports, download, init, train = steps
    named = f"import {tmp_path / 'images'} {tmp_path / 'sections'}"
    assert imports == f"{named} --resolution 8 8 40 --mips 3"
    assert "--mip 2 0 --patch_size 32 128 --x_offset 16 --y_offset 0" in download
    assert "--z_start 1 --z_end 9 --normalize" in download
    assert init == f"init --pyramid_path {tmp_path / 'pyramid'} --mip 2 0"
    assert "--train_mode custom" in train
    assert "--generate_field_stages 0 --seed 7" in train


def test_a_step_that_fails_ends_the_run_and_is_named(tmp_path):
    never = tmp_path / "never"
    steps = [["inspect", str(never)], ["init", "--pyramid_path", str(never), "--mip=0"]]
    with pytest.raises(
        MetroEMError, match="metroem inspect .*\nended with exit code 1"
    ):
        run_steps(steps)
    assert not never.exists()


@pytest.mark.slow
@pytest.mark.long  # CI runs make demo
def test_the_demo_runs_twice_and_ends_with_its_figures(tmp_path):
    schedule = tmp_path / "schedule.json"
    phase = {
        "lr": 1e-3,
        "num_epochs": 1,
        "num_samples": 160,
        "batch_size": 4,
        "smoothness": 0,
        "loss_spec": {"type": "known_warp"},
        # The same section as src and tgt, since training is too short for real pairs.
        "augmentations": [{"type": "known_warp", "peak_px": 6, "same": 1}],
    }
    schedule.write_text(json.dumps({"2": [phase], "0": [phase]}))
    code = (
        "from pathlib import Path; from metroem.utils import cli; "
        "from metroem.demo import run_demo; "
        "from metroem.synthetic.requests import DemoRequest; cli.run(lambda: "
        "run_demo(DemoRequest(Path('d'), 12, 160, 128, 1, "
        f"train_params_path=Path({str(schedule)!r}))))"
    )
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        figures = json.loads(ended.stdout.splitlines()[-1])
        names = {
            "epe_none",
            "epe",
            "epe_untrained",
            "epe_pretrained",
            "cpc_none",
            "cpc",
        }
        assert set(figures) == names
        assert figures["epe_none"] > 1
        assert len(figures["epe"]) == 2
        # Hardly trained, but enough to be better than nothing.
        assert figures["epe"][1] < figures["epe_none"]
        assert (tmp_path / "d" / "before_after.png").is_file()
        assert len(list((tmp_path / "d" / "images").iterdir())) == 12
