"""Trained modules at work in corgie, which applies them to whole volumes.

corgie has an environment of its own, `.venv-corgie`; `make clients` makes it.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from metroem.io.volume_write import write_volume
from tests.clients.modules import pyramid_of, shifted_stack, trained_module
from tests.pairs import SHIFT_PX

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-corgie"
SHARED = os.environ.get("METROEM_SHARED")
TEMPLATES = ("correlation", "scalenet")
INNER = (..., slice(32, -32), slice(32, -32))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ENVIRONMENT / "bin" / "corgie").is_file(),
        reason="no corgie: `make clients` makes .venv-corgie",
    ),
]
needs_client = pytest.mark.skipif(
    SHARED is None, reason="METROEM_SHARED names no folder with clients/"
)


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """A trained module of each template."""
    folder = tmp_path_factory.mktemp("clients")
    return {name: trained_module(folder / name, name) for name in TEMPLATES}


def run(*command, cwd):
    """Run a program of corgie's environment."""
    program = ENVIRONMENT / "bin" / command[0]
    done = subprocess.run(
        [str(program), *map(str, command[1:])], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# The client knows raw grey levels alone, in uint8 and in float32.
@needs_client
@pytest.mark.parametrize(
    ("template", "shape", "flags"),
    [
        ("scalenet", (2, 256, 192), []),
    ],
)
def test_a_module_passes_the_client(tmp_path, modules, template, shape, flags):
    np.save(tmp_path / "stack.npy", shifted_stack(*shape))

    run(
        *("python", f"{SHARED}/clients/corgie_client.py", modules[template]),
        *("stack.npy", "out", "--min_gain", "0.5", *flags),
        cwd=tmp_path,
    )

    field = np.load(tmp_path / "out" / "field.npy")[1][INNER]
    assert np.median(field[0]) == pytest.approx(SHIFT_PX, abs=1)
    assert np.median(field[1]) == pytest.approx(0, abs=1)


def page_commands():
    """corgie's commands of docs/volumes.md, each as a list of words."""
    text = (ROOT / "docs" / "volumes.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines]
    return [words for words in commands if words and words[0].endswith("/corgie")]


def read(volume):
    """(Z, C, rows, cols) of a volume at mip 0."""
    from cloudvolume import CloudVolume

    values = np.asarray(CloudVolume(f"file://{volume}", fill_missing=True)[:])
    return values.transpose(2, 3, 0, 1).astype(np.float32)


def test_a_pyramid_aligns_a_volume_by_the_commands_of_its_page(tmp_path, modules):
    pyramid_of(tmp_path / "pyramid", modules["correlation"], (2, 0))
    stack = shifted_stack(3, 256, 256, grain=2)
    write_volume(tmp_path / "em", stack, 3)
    commands = page_commands()
    assert [words[1] for words in commands] == [
        "align-block",
        "compute-field",
        "render",
    ]

    for words in commands:
        words = [w.replace("gs://my-bucket", f"file://{tmp_path}") for w in words]
        # Less of it, since all of this runs on a CPU.
        words = [w.replace("512", "256").replace("256,4", "256,3") for w in words]
        run("corgie", *words[1:], cwd=tmp_path)

    sections = stack.astype(np.float32)
    unaligned = ((sections[2] - sections[1])[INNER] ** 2).mean()
    # Each section on the one before, itself aligned; then each on the raw one before.
    aligned = read(tmp_path / "aligned/img/img_block")[:, 0]
    assert ((aligned[2] - aligned[1])[INNER] ** 2).mean() < 0.2 * unaligned
    rendered = read(tmp_path / "rendered/img/img_rendered")[:, 0]
    assert ((rendered[2] - sections[1])[INNER] ** 2).mean() < 0.2 * unaligned
    field = np.median(read(tmp_path / "field")[2][INNER], axis=(1, 2))
    assert field == pytest.approx([SHIFT_PX, 0], abs=1)
