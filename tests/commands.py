"""The commands and examples of pages for people, as tests run them."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import download_field
import download_image
import train
from metroem import __main__ as metroem_main
from tests.models.specs import CORRELATION, write_spec

ROOT = Path(__file__).parents[1]
CORGIE = ".venv-corgie/bin/corgie"  # what make clients installs
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
SCRIPTS = {
    "download_image.py": download_image,
    "download_field.py": download_field,
    "train.py": train,
}


def blocks(page, language):
    """The fenced blocks of one language in the text of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.S | re.M)


def commands(page):
    """All commands of a page, in order, each as a list of words."""
    lines = [b.replace("\\\n", " ").splitlines() for b in blocks(page, "sh")]
    return [shlex.split(line) for block in lines for line in block if line.strip()]


def make_targets(page):
    """The targets that a page tells people to make."""
    return {words[1] for words in commands(page) if words[0] == "make"}


def short_schedule():
    """The schedule of the page on training with few samples, for `shortened`."""
    (schedule,) = blocks(PAGES["training"], "json")
    return schedule.replace('"num_samples": 400', '"num_samples": 4')


def shortened(arguments):
    """Flags that make a training short: half an hour on a page, seconds here.

    They expect `short_schedule` in schedule.json.
    """
    extra = ["--max_epochs", "1", "--device", "cpu"]  # where tests run
    if "custom" not in arguments:
        extra += ["--train_mode", "custom", "--train_params_path", "schedule.json"]
    return extra


def run(words):
    """Run one command, pyramids of small networks; ranks in processes of their own."""
    match words:
        case ["metroem", "init", *arguments]:
            metroem_main.main(words[1:])
            pyramid = arguments[arguments.index("--pyramid_path") + 1]
            for module in Path(pyramid).glob("*_mip*"):
                write_spec(module / "model", CORRELATION)
                # Pretrained weights are of the large network.
                (module / "model" / "checkpoint.state.pth.tar").unlink(missing_ok=True)
        case ["torchrun", *arguments] | ["metroem", *arguments] if (
            words[0] == "torchrun" or "--gpu" in words
        ):
            how = ["torch.distributed.run"] if words[0] == "torchrun" else ["metroem"]
            command = [sys.executable, "-m", *how, *arguments, *shortened(arguments)]
            command += ["--train_stages", "0", "--generate_field_stages", "0"]
            command = [str(ROOT / w) if w == "train.py" else w for w in command]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            subprocess.run(command, env=environment, check=True)
        case ["metroem", "train", *arguments]:
            metroem_main.main(["train", *arguments, *shortened(arguments)])
        case ["metroem", "view", *_]:  # it would wait for Ctrl-C
            with patch("signal.pause", side_effect=KeyboardInterrupt):
                metroem_main.main(words[1:])
        case ["metroem", *arguments]:
            metroem_main.main(arguments)
        case _:
            raise AssertionError(f"no test runs {words}")


def check_spelling(words):
    """Parse one command by its parser, without running it."""
    match words:
        case ["metroem", *arguments]:
            metroem_main.build_parser().parse_args(arguments)
        case ["python", script, *arguments] if script.startswith("benchmarks/"):
            benchmark = importlib.import_module(Path(script).stem)
            benchmark.build_parser().parse_args(arguments)
        case ["torchrun", _, _, script, *arguments] | ["python", script, *arguments]:
            if script != "-m":
                SCRIPTS[script].build_parser().parse_args(arguments)
        case ["make" | "source" | "pip", *_]:
            pass
        case _:
            raise AssertionError(f"no parser is known for {words}")
