import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metroem import __version__, cli
from metroem.__main__ import main
from metroem.errors import UsageError

ROOT = Path(__file__).parents[1]


def exit_code(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(command)
    return caught.value.code, capsys.readouterr().err


def test_our_errors_end_as_one_line_and_exit_1(capsys):
    def fail():
        raise UsageError("--mip 9: not there")

    assert exit_code(fail, capsys) == (1, "error: --mip 9: not there\n")


def test_an_interrupt_exits_130(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert exit_code(interrupt, capsys)[0] == 130


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


def test_flags_are_not_abbreviated(capsys):
    parser = cli.parser("Does something.")
    parser.add_argument("--patch_sizes")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--patch_size", "3"])
    assert caught.value.code == 2


def test_other_ranks_report_warnings_alone(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    cli.configure_logging()
    logging.getLogger("metroem.x").info("hidden")
    logging.getLogger("metroem.x").warning("shown")
    assert capsys.readouterr().out == "shown\n"


def test_the_log_goes_to_a_file_too(tmp_path, package_log):
    cli.mirror_log(tmp_path / "made" / "run.log")
    logging.getLogger("metroem.x").info("epoch 1")
    assert (tmp_path / "made" / "run.log").read_text().endswith(" epoch 1\n")


@pytest.mark.parametrize(
    "script", ["train.py", "download_image.py", "download_field.py", "-m metroem"]
)
def test_help_comes_without_torch(script):
    program = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        "try: RUN\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    run = (
        "runpy.run_module('metroem', run_name='__main__')"
        if script == "-m metroem"
        else f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program.replace("RUN", run)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"{__version__}\n"


def test_init_makes_a_pyramid_that_can_be_inspected(tmp_path):
    main(["init", str(tmp_path / "p"), "--mip", "5", "3"])
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == [
        "0_mip5in_correlation",
        "1_mip3in_correlation",
    ]
    main(["fetch", str(tmp_path / "p"), str(tmp_path / "copy")])
    assert (tmp_path / "copy" / "1_mip3in_correlation" / "create.py").is_file()
