"""What is installed: the wheel, and requirement files that agree with each other."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
SCRIPTS = ("download_image.py", "download_field.py", "train.py")
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
NAME = r"^[A-Za-z0-9_.\-]+(?:\[[a-z0-9_,]+\])?"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built from a copy without any index."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*SOURCES, *SCRIPTS):
        shutil.copy(ROOT / name, folder)
    no_cache = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "metroem", folder / "metroem", ignore=no_cache)
    environment = {**os.environ, "METROEM_URL": "https://example.org/metroem/"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def pins(name):
    """The version that a requirements file pins of each package."""
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_wheel_has_every_file_of_the_package(wheel):
    tree = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "metroem").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in wheel.namelist() if name.startswith("metroem/")} == tree
    assert {Path(name).suffix for name in tree} >= {".json", ".html", ".css", ".js"}
    assert "metroem/py.typed" in tree


def test_the_wheel_has_the_scripts_and_the_command(wheel):
    names = {Path(n).name for n in wheel.namelist() if ".data/scripts/" in n}
    assert names == set(SCRIPTS)
    (entry,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert b"metroem = metroem.__main__:entry_point" in wheel.read(entry)


def test_the_wheel_says_who_made_it_and_where_it_lives(metadata):
    assert metadata["Author"] == "MetroEM contributors"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert "https://example.org/metroem" in metadata.as_string()


def test_the_extra_dev_names_what_requirements_dev_pins(metadata):
    extra = {
        re.match(NAME, line)[0]
        for line in metadata.get_all("Requires-Dist")
        if 'extra == "dev"' in line
    }
    assert extra == set(pins("requirements-dev.txt"))


def test_requirements_pin_what_the_wheel_requires(metadata):
    required = {
        re.match(NAME, line)[0]
        for line in metadata.get_all("Requires-Dist")
        if "extra ==" not in line
    }
    assert required == set(pins("requirements.txt"))


def test_triton_is_required_for_tests_with_a_cpu_build_alone():
    for path in ROOT.glob("requirements*.txt"):
        assert ("triton" in pins(path.name)) == (path.stem == "requirements-cpu-tests")


def test_pre_commit_runs_the_versions_of_requirements_dev():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    asked = dict(re.findall(r"\b([a-z-]+)==([\d.]+)", text))
    pinned = pins("requirements-dev.txt")
    assert asked["ruff"] == pinned["ruff"]
    assert all(pinned.get(name, version) == version for name, version in asked.items())


def test_the_workflow_installs_a_cpu_build():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (name,) = re.findall(r"REQUIREMENTS: (\S+)", text)
    assert "download.pytorch.org/whl/cpu" in (ROOT / name).read_text()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"make (\w+)", text)) <= set(targets)


def test_the_page_on_installation_names_files_that_exist():
    page = (ROOT / "docs" / "installation.md").read_text()
    named = set(re.findall(r"requirements[\w-]*\.txt", page))
    assert {"requirements.txt", "requirements-cpu.txt"} <= named
    assert all((ROOT / name).is_file() for name in named)
