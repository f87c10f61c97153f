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


def test_a_process_that_is_ending_is_not_ended_again():
    program = (
        "import atexit, os, signal\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "from metroem import cli\n"
        "cli.run(lambda: None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


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


SCRIPTS = ["train.py", "download_image.py", "download_field.py"]
COMMANDS = [*("init", "fetch", "inspect", "create-spec", "make-dataset", "evaluate")]
COMMANDS += ["export-fields", "demo"]


def loaded_by(program):
    """Which of the slow packages a program loads, though it exits, and its output."""
    check = (
        "import atexit, runpy, sys\n"
        "slow = ('torch', 'numpy', 'h5py', 'cloudvolume', 'scipy', 'boto3')\n"
        "found = lambda: [name for name in slow if name in sys.modules]\n"
        "atexit.register(lambda: print('loaded', found()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{check}\n{program}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    *output, loaded = done.stdout.splitlines()
    return done.returncode, loaded, "\n".join(output) + done.stderr


def running(words):
    """A program that runs a command line: a script of ours, or `-m metroem ...`."""
    run = f"runpy.run_path({words[0]!r}, run_name='__main__')"
    if words[0] == "-m":
        run = "runpy.run_module('metroem', run_name='__main__')"
    return f"sys.argv = {['x', *words[2 if words[0] == '-m' else 1 :]]}\n{run}"


def test_import_metroem_loads_nothing_slow():
    assert loaded_by("import metroem")[:2] == (0, "loaded []")


@pytest.mark.parametrize(
    "words",
    [[script] for script in SCRIPTS]
    + [["-m", "metroem"], *(["-m", "metroem", command] for command in COMMANDS)],
    ids=lambda words: words[-1],
)
def test_help_comes_without_anything_slow(words):
    code, loaded, output = loaded_by(running([*words, "--help"]))
    assert (code, loaded) == (0, "loaded []") and "usage:" in output


@pytest.mark.parametrize("script", [*SCRIPTS, "-m"])
def test_usage_errors_come_without_anything_slow(script):
    code, loaded, output = loaded_by(running([script, "--no_such_flag"]))
    assert (code, loaded) == (2, "loaded []") and "usage:" in output


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
