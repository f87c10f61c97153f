"""The notebooks of docs/: stored without outputs, and run as people run them."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import tifffile
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from scipy import ndimage

from tests.commands import ROOT, check_spelling

FOLDER = ROOT / "docs" / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
COMMAND = re.compile(r"^!((?:.*\\\n)*.*)$", re.M)  # "!", and lines that continue it


def code_cells(book):
    """The cells of a notebook that are run."""
    return [cell for cell in book.cells if cell.cell_type == "code"]


def execute(book, folder):
    """Run a notebook in a folder; a command that fails ends it, as an error does."""
    for cell in code_cells(book):
        # The kernel keeps the exit code of the last command, and goes on.
        cell.source = COMMAND.sub(r"!\1\nassert _exit_code == 0", cell.source)
    client = NotebookClient(
        book, timeout=900, resources={"metadata": {"path": str(folder)}}
    )
    beside = Path(sys.executable).parent  # `metroem` is installed there
    path = os.pathsep.join([str(beside), os.environ["PATH"]])
    client.execute(env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)})


def printed(cell):
    """All that a cell that was run printed."""
    return "".join(output.get("text", "") for output in cell.outputs)


def correlation(one, other):
    """Correlation of two images where both have tissue, away from borders."""
    inside = ndimage.binary_erosion((one != 0) & (other != 0), iterations=4)
    assert inside.mean() > 0.2
    return np.corrcoef(one[inside], other[inside])[0, 1]


def read_images(paths):
    """Image files as arrays, (y, x) float, in the order of their names."""
    return [np.asarray(Image.open(path), float) for path in sorted(paths)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_stored_notebook_is_valid_and_has_no_outputs(path):
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    assert len(code_cells(book)) > 5
    for cell in code_cells(book):
        assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_commands_and_links_of_a_notebook_exist(path):
    book = nbformat.read(path, 4)
    source = "\n".join(cell.source for cell in code_cells(book))
    commands = [command.replace("\\\n", " ") for command in COMMAND.findall(source)]
    assert len(commands) >= 5
    for command in commands:
        check_spelling(shlex.split(command))
    text = "\n".join(cell.source for cell in book.cells)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all((FOLDER / link).is_file() for link in links)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which both notebooks were run, one after the other."""
    folder = tmp_path_factory.mktemp("notebooks")
    for name in ("first_hour", "stack"):  # the second takes the first one's pyramid
        execute(nbformat.read(FOLDER / f"{name}.ipynb", 4), folder)
    return folder


@pytest.mark.slow
def test_the_first_hour_aligns_pairs_that_were_not_trained_on(folder):
    made = folder / "first_hour"
    # The patch: 256 px from x 0, y 16 on.
    raw = [image[16:272] for image in read_images(made.glob("sections/*.png"))]
    for z in (11, 12, 13):
        aligned = tifffile.imread(made / "aligned" / f"z{z:04}.tif").astype(float)
        before = correlation(raw[z], raw[z - 1])
        assert correlation(aligned, raw[z - 1]) > before + 0.25
    assert "<html" in (made / "report.html").read_text()
    assert (made / "fields" / "info").is_file()


@pytest.mark.slow
def test_the_stack_lies_on_itself_once_it_is_aligned(folder):
    made = folder / "stack"
    raw = read_images(made.glob("sections/*.png"))
    aligned = read_images(made.glob("images/*.png"))
    assert len(raw) == len(aligned) == 6
    for z in range(1, 6):
        before = correlation(raw[z], raw[z - 1])
        assert correlation(aligned[z], aligned[z - 1]) > max(before, 0) + 0.3
    placed, after = (
        json.loads((made / name / "check.json").read_text())["stack"]
        for name in ("placed/check", "aligned")
    )
    assert after["jump_median_px"] < placed["jump_median_px"] / 2
    assert "<html" in (made / "aligned" / "report.html").read_text()


@pytest.mark.slow
def test_a_command_that_fails_ends_a_notebook(tmp_path):
    sources = ["!metroem --version", "!metroem inspect \\\n    nowhere\n1"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    book = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(CellExecutionError, match="assert _exit_code"):
        execute(book, tmp_path)
    first, second = (printed(cell) for cell in book.cells)
    assert re.match(r"[\d.]+\s", first) and second.startswith("error: ")
