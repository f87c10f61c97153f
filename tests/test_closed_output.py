"""Commands whose output nobody reads any more, as in `| head`."""

import logging
import os
import sys
from contextlib import contextmanager

import pytest

import download_field
import download_image
import train
from metroem.__main__ import main
from metroem.errors import UsageError
from metroem.utils import cli
from tests.models.specs import pyramid_with_weights
from tests.pairs import write_pairs


@contextmanager
def nobody_reads(*names):
    """Streams of python are a pipe that was closed at its other end.

    No fixture, since pytest puts its own streams there after the fixtures.
    """
    before = [getattr(sys, name) for name in names]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:  # closing fails if something is left in it
        for name in names:
            setattr(sys, name, stream)
        try:
            yield
            assert all(getattr(sys, name) is stream for name in names)
        finally:
            for name, one in zip(names, before, strict=True):
                setattr(sys, name, one)


def run(argv, command=main):
    cli.run(lambda: command([str(word) for word in argv]))


def test_an_evaluation_is_kept_though_nobody_reads_it(tmp_path, capsys):
    write_pairs(tmp_path / "d", mips=(0,), num_pairs=2, shape=(96, 112))
    pyramid_with_weights(tmp_path / "p", [0])
    argv = ["evaluate", "--pyramid_path", tmp_path / "p", "--dataset_path"]
    argv += [tmp_path / "d", "--no_finetune", "--json", tmp_path / "figures.json"]
    with nobody_reads("stdout"):
        run([*argv, "--report", tmp_path / "report.html"])
    assert (tmp_path / "figures.json").is_file() and (
        tmp_path / "report.html"
    ).is_file()
    assert capsys.readouterr().err == ""


def test_figures_are_kept_before_they_are_printed(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("metroem.evaluation.evaluate.print_evaluation", full)
    write_pairs(tmp_path / "d", mips=(0,), num_pairs=1, shape=(96, 112))
    pyramid_with_weights(tmp_path / "p", [0])
    argv = ["evaluate", "--pyramid_path", tmp_path / "p", "--dataset_path"]
    argv += [tmp_path / "d", "--no_finetune", "--json", tmp_path / "figures.json"]
    with pytest.raises(SystemExit) as caught:
        run(argv)
    assert caught.value.code == 1 and (tmp_path / "figures.json").is_file()


def test_a_command_goes_on_to_its_end_and_its_exit_code(capsys):
    done = []

    def work():
        for number in range(3):
            sys.stdout.write("a figure\n")
            sys.stdout.flush()
            logging.getLogger("metroem.x").info("line %d", number)
            done.append(number)
        raise UsageError("--mip 9: not there")

    with nobody_reads("stdout"), pytest.raises(SystemExit) as caught:
        cli.run(work)
    assert (caught.value.code, done) == (1, [0, 1, 2])
    assert capsys.readouterr().err == "error: --mip 9: not there\n"


def test_a_closed_stderr_ends_nothing_either():
    def work():
        sys.stderr.write("half of a bar\r")
        sys.stderr.flush()
        raise KeyboardInterrupt

    with nobody_reads("stdout", "stderr"), pytest.raises(SystemExit) as caught:
        cli.run(work)
    assert caught.value.code == cli.INTERRUPTED


def test_other_broken_pipes_are_still_errors(capsys):
    def lose_a_server():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        cli.run(lose_a_server)


@pytest.mark.parametrize(
    ("command", "argv"),
    [(module.main, ["--help"]) for module in (download_image, download_field, train)]
    + [(main, ["--help"]), (main, ["--version"]), (main, ["inspect", "--help"])],
    ids=lambda value: getattr(value, "__module__", None),
)
def test_help_that_nobody_reads_ends_well(capsys, command, argv):
    with nobody_reads("stdout"), pytest.raises(SystemExit) as caught:
        run(argv, command)
    assert caught.value.code == 0 and capsys.readouterr().err == ""


def test_a_data_set_is_inspected_to_its_end(tmp_path):
    write_pairs(tmp_path / "d", mips=(0,), num_pairs=1, shape=(48, 64))
    (tmp_path / "d" / "zz.h5").touch()  # what is found last
    with nobody_reads("stdout"), pytest.raises(SystemExit) as caught:
        run(["inspect", tmp_path / "d"])
    assert caught.value.code == 1


def test_a_stdout_that_was_never_opened_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)
    run(["init", tmp_path / "p", "--mip", "0"])
    assert (tmp_path / "p").is_dir()
