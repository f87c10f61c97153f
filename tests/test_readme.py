"""The README, and the pages that go on with its data: every command is run.

Here, in tests/clients (corgie), or by .ci/run (make, pip).
"""

import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.commands import (
    CORGIE,
    PAGES,
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

# In the order in which their commands need each other.
TO_FOLLOW = [README] + [
    PAGES[name]
    for name in (
        "data_sets",
        "points",
        "training",
        "report",
        "two_images",
        "stack",
        "volumes",
    )
]
RUN_ELSEWHERE = ("make", "source", "pip", CORGIE)


def small(text, folder):
    """A command or an example on a volume in `folder`, with less to do."""
    text = text.replace("gs://my-bucket/em", "em").replace("demo/sections", "em")
    text = text.replace("gs://my-bucket", str(folder))
    text = text.replace("demo/pyramid", "pyramid")
    text = text.replace("[:, :, z]", "[:128, :128, z]")
    return {"112": "32", "448": "128", "28": "25"}.get(text, text)


@pytest.mark.slow
def test_the_commands_of_the_readme_and_its_pages_work_in_their_order(
    tmp_path, monkeypatch
):
    num_x, num_y = 384, 320
    sections = [texture(num_y, num_x, seed=0)[0, 0].byte().numpy() for _ in range(9)]
    (tmp_path / "demo" / "images").mkdir(parents=True)
    for z in range(28):
        image = Image.fromarray(sections[z % 9])
        image.save(tmp_path / "demo" / "images" / f"z{z:04d}.png")
    # 4 px along x, in mip-0 pixels.
    by_mip = [np.zeros((9, 2, num_x >> m, num_y >> m), np.float32) for m in range(3)]
    for field in by_mip:
        field[:, 0] = 4.0
    make_volume(tmp_path / "field", by_mip, resolution=(8, 8, 40))
    labels = [np.arange(1, 29, dtype=np.uint64).repeat(num_x * num_y)]
    labels[0].shape = (28, 1, num_x, num_y)
    make_volume(tmp_path / "labels", labels, chunk=(128,) * 3, resolution=(8, 8, 40))
    monkeypatch.chdir(tmp_path)
    (template,) = blocks(PAGES["points"], "json")
    (tmp_path / "template.json").write_text(small(template, tmp_path))
    (tmp_path / "points.csv").write_text("x0,y0,z0\n200,180,5\n220,160,7\n")
    (tmp_path / "schedule.json").write_text(short_schedule())

    done = []
    for words in (words for page in TO_FOLLOW for words in commands(page)):
        words = [small(word, tmp_path) for word in words]
        # Pages repeat what the README has.
        if words[0] not in RUN_ELSEWHERE and words not in done:
            run(words)
            done.append(words)
    names = {}
    (example,) = blocks(README, "python")
    exec(small(example, tmp_path), names)

    # Two stages under three names, one under three; and a copy.
    assert len(list(tmp_path.glob("pyramid/*/model/*.state.pth.tar"))) == 9
    assert len(list(tmp_path.glob("fetched/*/model/*.state.pth.tar"))) == 2
    assert list(tmp_path.glob("points/x*.h5"))
    assert "<html" in (tmp_path / "report.html").read_text()
    assert names["field"].shape == (2, 128, 128)
    assert (tmp_path / "stack" / "layers" / "labels" / "info").is_file()
    assert len(list((tmp_path / "aligned_images").glob("z*.png"))) == 4
    for name in ("check.json", "placement.json"):
        stored = json.loads((tmp_path / "stack" / name).read_text())
        stored.get("settings", {}).clear()  # flags
        for key in all_keys(stored):
            assert f"`{key}`" in PAGES["stack"], f"{name}: {key}"


def all_keys(value):
    """The keys of all objects in a JSON value; a section's number is none."""
    if isinstance(value, list):
        return {key for one in value for key in all_keys(one)}
    if not isinstance(value, dict):
        return set()
    keys = {key for key in value if not key.isdigit()}
    return keys | {key for one in value.values() for key in all_keys(one)}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130
    assert len(README.split()) <= 1200


def test_the_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    used = make_targets(README) | set(re.findall(r"`make (\w+)", README))
    assert used and used <= set(targets)


@pytest.mark.parametrize("words", commands(README), ids=" ".join)
def test_each_command_is_spelled_as_its_parser_has_it(words):
    check_spelling(words)


def test_links_and_pictures_of_the_readme_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
