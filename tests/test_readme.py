"""Every command of the README is run: here, in tests/clients, or by .ci/run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import download_field
import download_image
import train
from metroem import __main__ as metroem_main
from metroem.io.volume_write import write_volume
from tests.pairs import texture
from tests.volumes import make_volume

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CORGIE = ".venv-corgie/bin/corgie"
SCRIPTS = {
    "download_image.py": download_image,
    "download_field.py": download_field,
    "train.py": train,
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands():
    """All commands of the README, in order, each as a list of words."""
    lines = [b.replace("\\\n", " ").splitlines() for b in blocks("sh")]
    return [shlex.split(line) for block in lines for line in block if line.strip()]


def shortened(arguments):
    """Flags that make a training short: half an hour in the README, seconds here."""
    extra = ["--max_epochs", "1"]
    if "custom" not in arguments:
        extra += ["--train_mode", "custom", "--train_params_path", "schedule.json"]
    return extra


def run(words):
    """Run one command of the README; several ranks in processes of their own."""
    match words:
        case ["torchrun", *arguments] | ["python", *arguments] if (
            words[0] == "torchrun" or "--gpu" in words
        ):
            launcher = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
            command = [sys.executable, *launcher, *arguments, *shortened(arguments)]
            script = command.index("train.py")
            command[script] = str(ROOT / "train.py")
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            subprocess.run(command, env=environment, check=True)
        case ["python", "-m", "metroem", *arguments]:
            metroem_main.main(arguments)
        case ["python", script, *arguments]:
            extra = shortened(arguments) if script == "train.py" else []
            SCRIPTS[script].main([*arguments, *extra])
        case _:
            raise AssertionError(f"no test runs {words}")


@pytest.mark.slow
def test_the_commands_of_the_readme_work_in_their_order(tmp_path, monkeypatch):
    sections = [texture(512, 512, seed=0)[0, 0].byte().numpy() for _ in range(9)]
    write_volume(tmp_path / "em", np.stack(sections), 3)
    # 4 px along x, in mip-0 pixels.
    by_mip = [np.zeros((9, 2, 512 >> m, 512 >> m), np.float32) for m in range(3)]
    for field in by_mip:
        field[:, 0] = 4.0
    make_volume(tmp_path / "field", by_mip, resolution=(8, 8, 40))
    monkeypatch.chdir(tmp_path)
    template, schedule = blocks("json")
    template = template.replace("gs://my-bucket", str(tmp_path))
    (tmp_path / "template.json").write_text(template)
    (tmp_path / "points.csv").write_text("x0,y0,z0\n256,260,5\n200,300,7\n")
    schedule = schedule.replace('"num_samples": 400', '"num_samples": 12')
    (tmp_path / "schedule.json").write_text(schedule)

    for words in commands():
        words = [w.replace("gs://my-bucket", str(tmp_path)) for w in words]
        # A smaller patch, since all of this runs on a CPU.
        words = [{"128": "48", "512": "192"}.get(w, w) for w in words]
        # Those are what .ci/run does and what tests/clients/test_corgie.py does.
        if words[0] not in ("make", "bash", CORGIE):
            run(words)

    # Two stages under four names, one of a fifth.
    assert len(list(tmp_path.glob("pyramid/*/model/*.state.pth.tar"))) == 9


def test_the_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    used = [words[1] for words in commands() if words[0] == "make"]
    assert used and set(used) <= set(targets)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_each_command_is_spelled_as_its_parser_has_it(words):
    match words:
        case ["torchrun", _, _, script, *arguments] | ["python", script, *arguments]:
            if script != "-m":
                SCRIPTS[script].build_parser().parse_args(arguments)
        case ["make" | "bash", *_]:
            assert (ROOT / words[1]).exists() or words[0] == "make"


def test_the_python_example_names_what_there_is():
    for block in blocks("python"):
        compile(block, "README.md", "exec")
