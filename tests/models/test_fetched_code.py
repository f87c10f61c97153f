"""What of a fetched module would run is shown, all of it, and can be refused."""

import json
import os

import pytest

from metroem import __main__ as command
from metroem.errors import PyramidError
from metroem.models.fetched_code import describe_code, find_code
from metroem.models.module_folders import fetch, init_pyramid

KNOWN = "import os\nMIP = 0  # of the images\nrun()\n"
LAYER = {"type": "Custom_Layer", "import": ["os"], "code": "result = 1\nos.getpid()"}


def listing(files):
    return describe_code(find_code({"0_mip5in_a": files}), known=KNOWN)


def test_python_files_are_shown_line_by_line():
    text = listing({"create.py": b"import os\nos.remove('x')\n", "model/a.tar": b"\0"})

    assert "0_mip5in_a/create.py (sha256 " in text
    assert "    os.remove('x')" in text and "a.tar" not in text


def test_our_own_create_py_is_named_as_such_whatever_its_mip():
    ours = KNOWN.replace("MIP = 0", "MIP = 5").encode()

    assert listing({"create.py": ours}).endswith(": as metroem init writes it")
    changed = listing({"create.py": ours.replace(b"run()", b"run(1)")})
    assert "    run(1)" in changed
    hidden = listing({"create.py": ours.replace(b"MIP = 5", b"MIP = 5; os.abort()")})
    assert "os.abort()" in hidden


@pytest.mark.parametrize("name", ["model/model_spec.json", "model/part.txt"])
def test_code_inside_a_spec_is_shown_however_it_is_written(name):
    spec = json.dumps({"upmodules": {"0": [LAYER]}})
    escaped = spec.replace("Custom_Layer", "Custom\\u005fLayer").encode()

    for content in (spec.encode(), escaped):
        assert "os.getpid()" in listing({name: content})
    assert listing({name: b'{"type": "identity"}'}) == ""
    assert listing({name: b'{"type": "custom_layer"'}) == ""


def test_compiled_code_is_listed():
    assert "helper.so (sha256" in listing({"helper.so": b"\x7fELF"})
    assert "cannot be shown" in listing({"__pycache__/create.cpython-311.pyc": b"\0"})


def test_what_is_shown_cannot_play_tricks_on_a_terminal():
    text = listing({"create.py": b"evil()\r# good()\x1b[1A\x1b[2K", "a\x1b.py": b""})

    assert "\x1b" not in text and "\r" not in text and r"\x1b[2K" in text


class TestFetch:
    @pytest.fixture(autouse=True)
    def afar(self, tmp_path, monkeypatch):
        """A bucket with one module."""
        (module,) = init_pyramid(tmp_path / "source", [5])
        (module / "helper.py").write_text("import antigravity\n")
        files = [
            (str(p.relative_to(tmp_path / "source")), p.read_bytes())
            for p in sorted(module.rglob("*"))
            if p.is_file()
        ]
        monkeypatch.setattr(
            "metroem.models.module_folders._read_files", lambda source: files
        )

    def test_it_asks_once_and_shows_the_code(self, tmp_path):
        asked = []

        fetch("gs://b/p", tmp_path / "mine", lambda code: not asked.append(code))

        (code,) = asked
        assert "as metroem init writes it" in code and "import antigravity" in code
        assert os.listdir(tmp_path / "mine") == ["0_mip5in_correlation"]

    def test_what_is_not_trusted_leaves_no_trace(self, tmp_path):
        with pytest.raises(PyramidError, match="--trust"):
            fetch("gs://b/p", tmp_path / "mine", lambda code: False)

        assert not (tmp_path / "mine").exists()

    def test_the_command_refuses_where_nobody_can_be_asked(self, tmp_path, capsys):
        with pytest.raises(PyramidError, match="not trusted"):
            command.main(["fetch", "gs://b/p", str(tmp_path / "mine")])

        assert "import antigravity" in capsys.readouterr().err
        assert not (tmp_path / "mine").exists()

    @pytest.mark.parametrize(("answer", "kept"), [("y\n", True), ("\n", False)])
    def test_the_command_does_as_it_is_told(self, tmp_path, monkeypatch, answer, kept):
        class Terminal:
            isatty = staticmethod(lambda: True)
            readline = staticmethod(lambda: answer)

        monkeypatch.setattr("sys.stdin", Terminal)
        argv = ["fetch", "s3://b/p", str(tmp_path / "mine")]
        if kept:
            command.main(argv)
        else:
            with pytest.raises(PyramidError):
                command.main(argv)

        assert (tmp_path / "mine").exists() == kept

    def test_trust_and_local_sources_ask_nothing(self, tmp_path, capsys):
        command.main(["fetch", "gs://b/p", str(tmp_path / "mine"), "--trust"])
        command.main(["fetch", str(tmp_path / "source"), str(tmp_path / "other")])

        assert len(os.listdir(tmp_path / "mine")) == 1
        assert "antigravity" not in capsys.readouterr().err
