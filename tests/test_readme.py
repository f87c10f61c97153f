"""Every command of the README is run: here, in tests/clients, or by .ci/run."""

import re

import numpy as np
import pytest

from metroem.io.volume_write import write_volume
from tests.commands import (
    CORGIE,
    README,
    ROOT,
    blocks,
    check_spelling,
    commands,
    make_targets,
    run,
    short_schedule,
)
from tests.pairs import texture
from tests.volumes import make_volume


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
    template = blocks(README, "json")[0]
    template = template.replace("gs://my-bucket", str(tmp_path))
    (tmp_path / "template.json").write_text(template)
    (tmp_path / "points.csv").write_text("x0,y0,z0\n256,260,5\n200,300,7\n")
    (tmp_path / "schedule.json").write_text(short_schedule())

    for words in commands(README):
        words = [w.replace("gs://my-bucket", str(tmp_path)) for w in words]
        # A smaller patch, since all of this runs on a CPU.
        words = [{"128": "32", "512": "128"}.get(w, w) for w in words]
        # Those are what .ci/run does and what tests/clients/test_corgie.py does.
        if words[0] not in ("make", "bash", CORGIE):
            run(words)

    # Two stages under two names, one under three.
    assert len(list(tmp_path.glob("pyramid/*/model/*.state.pth.tar"))) == 7


def test_the_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    used = make_targets(README)
    assert used and used <= set(targets)


@pytest.mark.parametrize("words", commands(README), ids=" ".join)
def test_each_command_is_spelled_as_its_parser_has_it(words):
    check_spelling(words)


def test_the_python_example_names_what_there_is():
    for block in blocks(README, "python"):
        compile(block, "README.md", "exec")
