"""Test done-markers, failures, shards and processes with a small step."""

import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from itertools import permutations

import pytest

from metroem.errors import StorageError, TaskError, UsageError
from metroem.geometry.grid import Grid
from metroem.io.files import lock, lock_path
from metroem.io.volume_write import Notes
from metroem.stack import run_tasks
from metroem.stack.requests import RunRequest
from metroem.stack.task_records import TaskRecords
from metroem.stack.tasks import Block, run_step, split_blocks
from tests.stack.steps import (
    FilesStep,
    note,
    outputs,
    runs_of,
    start,
    wait_for,
    wait_until_begun,
)

HERE = RunRequest()


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="metroem")
    return caplog


def test_blocks_cover_the_area_once_and_their_names_are_read_back():
    area = Grid(2, 8, 16, 70, 50)
    blocks = split_blocks(area, range(3, 8), 32, 2)
    covered = [
        (z, x, y)
        for block in blocks
        for z in block.sections
        for x in range(block.grid.x, block.grid.end[0], 4)
        for y in range(block.grid.y, block.grid.end[1], 4)
    ]
    assert len(covered) == len(set(covered)) == 5 * 70 * 50
    assert len(blocks) == 3 * 3 * 2
    assert [Block.parse(block.name) for block in blocks] == blocks
    with pytest.raises(UsageError, match="expected a name such as"):
        Block.parse("z0-16_x0-2048_y0-2048_mip0/../..")


def test_each_task_is_run_once_and_marked_with_its_figures(tmp_path, log):
    assert run_step(FilesStep(tmp_path, tasks=3, smoothness=1.0), HERE)
    assert runs_of(tmp_path) == {"z0-1": 1, "z1-2": 1, "z2-3": 1}
    marker = note(tmp_path, "files/z1-2")
    assert marker["figures"] == {"bytes_read": 12_000, "bytes_needed": 10_000}
    assert marker["seconds"] >= 0
    stored = note(tmp_path, "files")
    assert stored == {"digest": marker["digest"], "settings": {"smoothness": 1.0}}
    assert "step files: 3 tasks; 3 to do" in log.text
    assert "3 tasks are done; 0 s, 0 s of tasks; 36 kB read, 30 kB needed" in log.text
    assert not list((tmp_path / "tasks/files/tries").iterdir())
    log.clear()

    assert run_step(FilesStep(tmp_path, tasks=3, smoothness=1.0), HERE)
    assert runs_of(tmp_path) == {"z0-1": 1, "z1-2": 1, "z2-3": 1}
    assert log.messages == [
        "step files: 3 tasks, 3 of them done already; nothing to do"
    ]


def test_tasks_of_other_settings_are_done_again_and_the_log_says_which(tmp_path, log):
    run_step(FilesStep(tmp_path, tasks=2, relax={"smoothness": 1.0}), HERE)
    run_step(FilesStep(tmp_path, tasks=3, relax={"smoothness": 2.0}), HERE)
    assert runs_of(tmp_path) == {"z0-1": 2, "z1-2": 2, "z2-3": 1}
    assert (
        "step files: 2 tasks were done with other settings: relax.smoothness 1.0 "
        "(asked for: 2.0)"
    ) in log.text
    assert b"2.0" in outputs(tmp_path)["z0-1.txt"]


def test_a_marker_never_outlives_a_run_with_other_settings_that_died(tmp_path):
    run_step(FilesStep(tmp_path, tasks=2, px=1), HERE)
    dying = FilesStep(tmp_path, tasks=2, px=2, acts={"z1-2": "kill"})
    process = start(run_step, dying, HERE)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # z0-1 is of px=2 now, and z1-2 might be half of it.
    run_step(FilesStep(tmp_path, tasks=2, px=1), HERE)
    assert runs_of(tmp_path) == {"z0-1": 3, "z1-2": 3}
    assert all(b'"px": 1' in content for content in outputs(tmp_path).values())


def test_again_runs_finished_tasks_too(tmp_path):
    step = FilesStep(tmp_path, tasks=2)
    run_step(step, HERE)
    run_step(step, RunRequest(again=True))
    assert runs_of(tmp_path) == {"z0-1": 2, "z1-2": 2}


def test_the_folder_of_markers_is_listed_once_however_many_tasks(tmp_path, monkeypatch):
    step = FilesStep(tmp_path, tasks=500)
    run_step(step, HERE)
    listed, names = [], Notes.names
    monkeypatch.setattr(
        Notes, "names", lambda self, prefix: listed.append(1) or names(self, prefix)
    )
    assert run_step(step, HERE)
    assert len(listed) == 1


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_shards_in_any_order_write_what_one_command_writes(tmp_path, order, log):
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    run_step(FilesStep(plain, tasks=7), HERE)
    step = FilesStep(sharded, tasks=7)
    complete = [run_step(step, RunRequest(shard=f"{part}/3")) for part in order]
    assert complete == [False, False, True]
    assert outputs(sharded) == outputs(plain)
    assert runs_of(sharded) == runs_of(plain)
    mine = (3, 2, 2)[order[0]]
    assert (
        f"step files: {7 - mine} of 7 tasks belong to other shards and are not done; "
        "run them, then this command again"
    ) in log.messages


def test_a_shard_reads_the_markers_of_others_only_when_all_tasks_have_one(
    tmp_path, monkeypatch
):
    step, read, all_read = FilesStep(tmp_path, tasks=9), Notes.read, []
    monkeypatch.setattr(
        Notes, "read", lambda self, names: all_read.extend(names) or read(self, names)
    )
    for part in (0, 1):
        assert not run_step(step, RunRequest(shard=f"{part}/3"))
    assert not run_step(step, RunRequest(shard="0/3"))
    read_markers = {name for name in all_read if re.match("files/z", name)}
    assert read_markers == {f"files/z{i}-{i + 1}.json" for i in (0, 3, 6)}
    assert run_step(step, RunRequest(shard="2/3"))


def test_a_step_is_not_complete_if_others_did_it_with_other_settings(tmp_path, log):
    run_step(FilesStep(tmp_path, tasks=4, px=1), HERE)
    step = FilesStep(tmp_path, tasks=4, px=2)
    assert not run_step(step, RunRequest(shard="0/2"))
    assert "step files: 2 of 4 tasks belong to other shards" in log.text
    assert run_step(step, RunRequest(shard="1/2"))
    assert outputs(tmp_path)["z3-4.txt"] == b'["z3-4", {"px": 2}]'


def test_a_task_that_is_the_only_one_is_of_every_shard(tmp_path):
    step = FilesStep(tmp_path, tasks=1)
    assert run_step(step, RunRequest(shard="2/3"))
    assert len(outputs(tmp_path)) == 1
    assert run_step(step, RunRequest(shard="0/3"))
    assert runs_of(tmp_path) == {"z0-1": 1}


def test_a_poisoned_task_of_60_fails_by_name_and_59_are_done(tmp_path, log):
    step = FilesStep(tmp_path, tasks=60, acts={"z7-8": "raise"})
    with pytest.raises(TaskError) as caught:
        run_step(step, HERE)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(
        "step files: 1 of 60 tasks failed, each 3 times; z7-8: z7-8: a chunk is broken"
    )
    assert "step files: z7-8 failed: z7-8: a chunk is broken" in log.messages
    assert len(outputs(tmp_path)) == 59
    assert runs_of(tmp_path)["z7-8"] == 3
    failed = note(tmp_path, "files/failed/z7-8")
    assert failed["reason"] == "z7-8: a chunk is broken"
    assert failed["traceback"] == ""

    step.acts = {}
    assert run_step(step, HERE)
    assert len(outputs(tmp_path)) == 60
    assert not list((tmp_path / "tasks/files/failed").iterdir())


def test_a_bug_in_a_task_leaves_its_traceback(tmp_path):
    with pytest.raises(TaskError, match="KeyError: 'bug'"):
        run_step(FilesStep(tmp_path, acts={"z0-1": "bug"}), HERE)
    assert "in run" in note(tmp_path, "files/failed/z0-1")["traceback"]


def test_ten_failed_tasks_are_named_and_the_others_counted(tmp_path, log):
    acts = {f"z{i}-{i + 1}": "raise" for i in range(13)}
    with pytest.raises(TaskError, match="13 of 14 tasks failed"):
        run_step(FilesStep(tmp_path, tasks=14, acts=acts), HERE)
    named = [
        line for line in log.messages if " failed: z" in line and "try" not in line
    ]
    assert len(named) == 10
    assert "step files: and 3 more failed" in log.messages


def test_a_task_that_kills_its_command_is_not_tried_for_ever(tmp_path):
    step = FilesStep(tmp_path, tasks=3, acts={"z1-2": "kill"})
    for _ in range(3):
        process = start(run_step, step, HERE)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    with pytest.raises(TaskError, match="z1-2: the process that ran it was killed"):
        run_step(step, HERE)
    assert runs_of(tmp_path) == {"z0-1": 1, "z1-2": 3, "z2-3": 1}
    step.acts = {}
    assert run_step(step, HERE)


def test_processes_write_the_same_and_one_that_dies_is_replaced(tmp_path, capfd):
    plain, several = tmp_path / "plain", tmp_path / "several"
    run_step(FilesStep(plain, tasks=9), HERE)
    acts = {"z2-3": "once kill", "z5-6": "kill", "z8-9": "once raise"}
    step = FilesStep(several, tasks=9, acts=acts)
    process = start(run_step, step, RunRequest(workers=2))
    process.join()
    printed, errors = capfd.readouterr()
    assert process.exitcode == 1, errors
    assert "step files: 9 tasks; 9 to do in 2 processes" in printed
    assert re.match(
        r"error: step files: 1 of 9 tasks failed.*z5-6: exit code -9: the process that "
        r"ran it was killed .*\n$",
        errors,
    ), errors
    expected = outputs(plain)
    del expected["z5-6.txt"]
    assert outputs(several) == expected
    runs = dict.fromkeys(runs_of(plain), 1) | {"z2-3": 2, "z5-6": 3, "z8-9": 2}
    assert runs_of(several) == runs
    runners = " ".join(path.read_text() for path in (several / "runs").iterdir())
    assert len(set(runners.split())) >= 4  # four of them died


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_and_what_is_done_stays_done(
    tmp_path, number, workers, monkeypatch
):
    monkeypatch.setattr(run_tasks, "GRACE_S", 0.2)
    begun = ["z2-3", "z3-4"][:workers]
    step = FilesStep(tmp_path, tasks=5, acts=dict.fromkeys(begun, "once wait"))
    process = start(run_step, step, RunRequest(workers=workers))
    wait_until_begun(tmp_path, *begun)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    pids = {int((tmp_path / "runs" / task).read_text()) for task in begun}
    wait_for(lambda: not any(map(is_alive, pids)))
    # The interrupted tasks have all their tries left.
    assert not list((tmp_path / "tasks/files/tries").iterdir())
    assert run_step(step, HERE)
    assert runs_of(tmp_path) == {task: 1 + (task in begun) for task in step.tasks()}


def stop_early(step):
    """Run a step in two processes until a task is done; exit with 3 if one lives."""
    run_tasks.GRACE_S = 0.2
    records = TaskRecords(step.destination, step.name, step.settings)
    outcomes = run_tasks.run_in_processes(step, records, step.tasks(), 2)
    next(outcomes)
    outcomes.close()
    sys.exit(3 if multiprocessing.active_children() else 0)


def test_no_process_outlives_the_run_that_started_it(tmp_path):
    step = FilesStep(tmp_path, tasks=4, acts={"z0-1": "wait"})
    process = start(stop_early, step)
    process.join()
    assert process.exitcode == 0


def run_and_ask_for_codes(step):
    """Run a step in two processes; exit with 3 if one did not end by itself."""
    codes, end = [], run_tasks._Member.end

    def end_and_note(member):
        end(member)
        codes.append(member.process.exitcode)

    run_tasks._Member.end = end_and_note
    run_step(step, RunRequest(workers=2))
    sys.exit(0 if codes == [0, 0] else 3)


def test_processes_that_have_nothing_left_to_do_end_by_themselves(tmp_path):
    process = start(run_and_ask_for_codes, FilesStep(tmp_path, tasks=4))
    process.join()
    assert process.exitcode == 0


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_commands_cannot_write_the_same_destination(tmp_path):
    step = FilesStep(tmp_path / "dst", tasks=2)
    (tmp_path / "dst").mkdir()
    with lock(lock_path(tmp_path / "dst/tasks")):
        process = multiprocessing.current_process()
        with pytest.raises(StorageError, match=f"in use by process {process.pid}"):
            run_step(step, HERE)
        assert not (tmp_path / "dst/out").exists()
        run_step(step, RunRequest(shard="0/2"))
    assert len(outputs(tmp_path / "dst")) == 1
    assert run_step(step, HERE)
    assert not [p for p in (tmp_path / "dst").iterdir() if p.name.startswith(".")]


def test_reading_more_than_is_needed_is_a_warning(tmp_path, log, monkeypatch):
    step = FilesStep(tmp_path, tasks=2)
    monkeypatch.setattr(
        FilesStep, "run", lambda self, task: {"bytes_read": 14, "bytes_needed": 10}
    )
    run_step(step, HERE)
    assert "step files: read 1.4 times the bytes that it needed" in log.text


def test_the_log_says_after_the_first_tasks_how_long_the_others_take(tmp_path, log):
    run_step(FilesStep(tmp_path, tasks=6, seconds=0.02), HERE)
    (line,) = [line for line in log.messages if "will take" in line]
    assert re.fullmatch(r"step files: the other 4 tasks will take about 0 s", line)


def test_records_are_kept_at_any_cloud_path():
    records = TaskRecords("mem://stacks/a", "files", {"px": 1})
    step = FilesStep("/nowhere", tasks=4)
    begun = records.begin_try("z0-1")
    assert (begun.number, records.begin_try("z0-1").number) == (1, 2)
    records.write_marker(run_tasks.Outcome("z0-1", {"a": 1}, 2.0))
    found = records.look(step.tasks())
    assert found.done == {"z0-1": run_tasks.Outcome("z0-1", {"a": 1}, 2.0)}
    others = TaskRecords("mem://stacks/a", "files", {"px": 2})
    assert others.look(step.tasks()).stale == ["z0-1"]
    # Tries of other settings do not count.
    assert others.begin_try("z0-1").number == 1


def test_many_markers_are_looked_up_in_seconds(tmp_path):
    step = FilesStep(tmp_path, tasks=20_000)
    records = TaskRecords(str(tmp_path), "files", {})
    folder = tmp_path / "tasks/files"
    folder.mkdir(parents=True)
    text = f'{{"digest": "{records.digest}", "figures": {{}}, "seconds": 1}}'
    for task in step.tasks():
        (folder / f"{task}.json").write_text(text)
    started = time.process_time()
    assert len(records.look(step.tasks()).done) == 20_000
    assert time.process_time() - started < 12  # 1.3 s, 2026-11; twice on a busy one
