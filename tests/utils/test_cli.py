import logging
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from metroem import __main__ as metroem_main
from metroem import __version__
from metroem.__main__ import main
from metroem.errors import UsageError
from metroem.prepare.requests import FieldRequest, ImageRequest
from metroem.training.requests import TrainRequest
from metroem.utils import cli

ROOT = Path(__file__).parents[2]


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
        "from metroem.utils import cli\n"
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
COMMANDS = [*metroem_main.COMMANDS]


def loaded_by(program):
    """Run a program; return the slow packages that it imports, and its output."""
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
    """Make a program that runs a command line: one of our scripts, or `-m metroem`."""
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


@pytest.mark.parametrize("script", [*SCRIPTS, "-m metroem"])
def test_usage_errors_come_without_anything_slow(script):
    code, loaded, output = loaded_by(running([*script.split(), "--no_such_flag"]))
    assert (code, loaded) == (2, "loaded []")
    assert "unknown flag --no_such_flag" in output


MISTAKES = {
    "a command": (
        "evalute",
        "metroem",
        "unknown command evalute; did you mean evaluate?",
    ),
    "a flag": (
        "evaluate --pyramid_pth p",
        "metroem evaluate",
        "unknown flag --pyramid_pth; did you mean --pyramid_path?",
    ),
    "a flag like no other": (
        "train --zzzzzz=3",
        "metroem train",
        "unknown flag --zzzzzz",
    ),
    "a missing flag": (
        "init --mip 2 0",
        "metroem init",
        "--pyramid_path is required",
    ),
    "a value": (
        "init --pyramid_path p --mip two",
        "metroem init",
        "argument --mip/--mips: invalid int value: 'two'",
    ),
}


@pytest.mark.parametrize(
    ("words", "command", "message"), MISTAKES.values(), ids=MISTAKES
)
def test_a_mistake_is_answered_in_two_lines(words, command, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"{command}: error: {message}\nsee: {command} --help\n"


def test_a_path_is_taken_by_its_place_and_by_its_flag():
    parse = metroem_main.build_parser().parse_args
    for words in (
        "fetch from --pyramid_path to --trust",
        "fetch from to --trust",
        "fetch from --trust to",
        "fetch --trust from to",
    ):
        found = parse(words.split())
        assert (found.source, found.pyramid_path) == ("from", Path("to")), words
    assert parse(["inspect", "data"]) == parse(["inspect", "--dataset_path", "data"])


def test_without_a_command_all_commands_are_listed(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    listed = re.findall(r"^  ([a-z][a-z-]+)  ", capsys.readouterr().out, re.M)
    assert caught.value.code == 2 and listed == [*metroem_main.COMMANDS]


def test_each_command_shows_an_example_that_is_right():
    parser = metroem_main.build_parser()
    for command, (request, _) in metroem_main.COMMANDS.items():
        text = cli.parser(request.HELP.replace("%(prog)s", "PROG")).format_help()
        example = text.partition("Example:")[2].partition("\n\n")[0]
        words = shlex.split(example.replace("\\\n", " "))
        assert words[0] == "PROG", command
        parser.parse_args([command, *words[1:]])


def test_many_flags_are_in_groups():
    for command, (request, _) in metroem_main.COMMANDS.items():
        parser = cli.parser("", request)
        together = [len(group._group_actions) for group in parser._action_groups]
        assert max(together) <= 12, command
        assert sum(together) <= 8 or sum(1 for n in together if n) > 1, command


def test_results_name_the_command_as_it_is_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/metroem/__main__.py", "check", "--mip", "1"])
    assert cli.command_line() == "metroem check --mip 1"


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"{__version__}\n"


def test_init_makes_a_pyramid_that_can_be_inspected(tmp_path):
    main(["init", "--pyramid_path", str(tmp_path / "p"), "--mip", "5", "3"])
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == [
        "0_mip5in_correlation",
        "1_mip3in_correlation",
    ]
    main(["fetch", str(tmp_path / "p"), "--pyramid_path", str(tmp_path / "copy")])
    assert (tmp_path / "copy" / "1_mip3in_correlation" / "create.py").is_file()


REQUESTS = {
    "download_image.py": ImageRequest,
    "download_field.py": FieldRequest,
    "train.py": TrainRequest,
    **{name: request for name, (request, *_) in metroem_main.COMMANDS.items()},
}


@pytest.mark.parametrize("command", REQUESTS)
def test_each_flag_has_help_that_shows_its_default(command):
    parser = cli.parser("", REQUESTS[command])
    for action in parser._actions:
        if action.dest == "help" or not action.option_strings:
            assert action.help
            continue
        if action in parser.by_place:
            assert action.help.endswith(" (required)")
            continue
        shown = action.default
        if action.nargs == 0:
            shown = "off"
        elif isinstance(shown, list):
            shown = " ".join(map(str, shown))
        end = "(required)" if action.required else f"(default {shown})"
        words, _, told = action.help.rpartition(" (")
        assert words
        if shown is None and not action.required:
            assert told.startswith("default: ")
        else:
            assert f"({told}" == end


# Commands with one wrong path: no/em is not there, "has" holds something else.
PYRAMID = ["--pyramid_path", "has/pyramid"]
DATA = ["--dataset_path", "has/data"]
AREA = "--x_offset 0 --y_offset 0 --z_start 1 --z_end 2".split()
IMAGES = ["download_image.py", "--mip", "1", "--patch_size", "8", *AREA]
FIELDS = ["download_field.py", "--src_mip", "1", "--dst_mip", "1", "--patch_size"]
FIELDS += ["8", *AREA]
COLUMNS = ["-m", "metroem", "create-spec", "--dst_spec_path", "o.json"]
EXPORT = ["-m", "metroem", "export-fields", "--dst_path", "out"]
WRONG_PATHS = {
    "download_image": [*IMAGES, "--cv_path", "no/em"],
    "its reference": [*IMAGES, "--cv_path", "has", "--cv_path_defects", "no/em"],
    "its field": [*IMAGES, "--cv_path", "has", "--field_dset", "no/em"],
    "download_field": [*FIELDS, "--cv_path", "no/em"],
    "train's pyramid": ["train.py", *DATA, "--pyramid_path", "no/em"],
    "train's data": ["train.py", *PYRAMID, "--dataset_path", "no/em"],
    "train's schedule": [
        *("train.py", *PYRAMID, *DATA, "--train_mode", "custom"),
        *("--train_params_path", "no/em"),
    ],
    "write-fields": ["-m", "metroem", "write-fields", *DATA, "--pyramid_path", "no/em"],
    "fields' data": ["-m", "metroem", "write-fields", *PYRAMID, "--dataset_path"]
    + ["no/em"],
    "fetch": ["-m", "metroem", "fetch", "no/em", "copy"],
    "inspect": ["-m", "metroem", "inspect", "no/em"],
    "inspect's pyramid": ["-m", "metroem", "inspect", "has", "--pyramid_path", "no/em"],
    "create-spec": [*COLUMNS, "--src_spec_path", "no/em", "--points_path", "has/file"],
    "its points": [*COLUMNS, "--src_spec_path", "has/file", "--points_path", "no/em"],
    "make-dataset": "-m metroem make-dataset --spec_path no/em --dst_path out".split(),
    "evaluate": ["-m", "metroem", "evaluate", *DATA, "--pyramid_path", "no/em"],
    "its data": ["-m", "metroem", "evaluate", *PYRAMID, "--dataset_path", "no/em"],
    "export-fields": [*EXPORT, "--dataset_path", "no/em"],
    "its bounds": [*EXPORT, *DATA, "--like", "no/em"],
    "init": ["-m", "metroem", "init", "has", "--mip", "1"],
    "demo": ["-m", "metroem", "demo", "--folder", "has"],
}


@pytest.mark.parametrize("words", WRONG_PATHS.values(), ids=WRONG_PATHS.keys())
def test_a_wrong_path_is_refused_before_anything_slow_is_imported(words, tmp_path):
    (tmp_path / "has" / "pyramid" / "0_mip1in_x").mkdir(parents=True)
    (tmp_path / "has" / "data").mkdir()
    (tmp_path / "has" / "file").touch()
    words = [re.sub("^(no|has)\\b", f"{tmp_path}/\\1", word) for word in words]
    code, loaded, output = loaded_by(running(words))
    assert (code, loaded) == (1, "loaded []") and "error: " in output
    assert ("no/em" if f"{tmp_path}/no/em" in words else "has") in output


@dataclass(frozen=True)
class Asked(cli.Request):
    sizes: list[int] = cli.flag("sizes", [2, 3], least=1)
    ratio: float | None = cli.flag("ratio", None)
    mode: str = cli.flag("mode", "a", choices=("a", "b", "c"))
    folder: Path = cli.flag("folder", Path("x"))
    point: list[float] | None = cli.flag("point", None, nargs=3)
    quiet: bool = cli.flag("say nothing", False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sizes": 2}, "--sizes 2: expected a list"),
        ({"sizes": ["2"]}, "--sizes '2': expected a whole number"),
        ({"sizes": [True]}, "--sizes True: expected a whole number"),
        ({"sizes": [1, 0]}, "--sizes 0: must be >= 1"),
        ({"sizes": None}, "--sizes None: expected a list"),
        ({"ratio": "half"}, "--ratio 'half': expected a number"),
        ({"mode": "d"}, "--mode d: expected a, b or c"),
        ({"folder": "x"}, "--folder 'x': expected a pathlib.Path"),
        ({"point": [1, 2]}, r"--point \[1, 2\]: expected 3 values"),
        ({"quiet": 1}, "--quiet 1: expected True or False"),
    ],
)
def test_a_request_refuses_what_its_parser_would(wrong, message):
    with pytest.raises(UsageError, match=message):
        Asked(**wrong)


def test_a_request_takes_what_its_parser_makes():
    flags = "--sizes 4 5 --ratio 2 --mode b --folder f --point 1 2 3 --quiet".split()
    made = cli.parse(Asked, flags)
    assert made == Asked([4, 5], 2.0, "b", Path("f"), [1.0, 2.0, 3.0], True)
    assert cli.parse(Asked, []) == Asked()


def test_a_training_on_a_device_that_is_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--device tpu: expected auto, cpu or cuda"):
        TrainRequest(tmp_path, tmp_path, device="tpu")
