"""Test workers on queues in folders and of SQS, with a small step."""

import json
import logging
import os
import random
import signal
import threading
import time

import boto3
import msgspec
import pytest

from metroem.errors import DatasetError, StorageError, TaskError, UsageError
from metroem.io import queues
from metroem.io.queues import MAX_BYTES, open_queue
from metroem.stack import queue_tasks, worker
from metroem.stack.queue_tasks import Message
from metroem.stack.requests import RunRequest, WorkerRequest
from metroem.stack.tasks import run_step
from metroem.stack.worker import run_worker
from metroem.utils.stop_request import StopRequest
from tests.cloud.servers import KEYS, s3_server
from tests.stack.steps import (
    FilesStep,
    note,
    outputs,
    provide,
    runs_of,
    start,
    wait_for,
    wait_until_begun,
)


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Wait shorter for what others do."""
    monkeypatch.setattr(worker, "IDLE_S", 0.02)
    monkeypatch.setattr(worker, "RETRY_S", 0)
    monkeypatch.setattr(queue_tasks, "POLL_S", 0.02)
    monkeypatch.setattr(queues, "_LISTEN_S", 0)


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="metroem")
    return caplog


class Stack:
    """A destination with one step, and its queue."""

    def __init__(self, folder, monkeypatch, url=None, **step):
        self.folder, self.destination = folder / "dst", f"file://{folder}/dst"
        self.folder.mkdir()
        self.url = url or f"fq://{folder}/queue"
        self.step = FilesStep(self.folder, **step)
        self.queue = open_queue(self.url)
        self.made = []
        provide(monkeypatch, self._make_step)

    def _make_step(self, destination, name):
        assert destination == self.destination
        if name != "files":
            raise UsageError(f"{name}: expected one of files")
        self.made.append(name)
        return self.step

    def put(self, tasks=None, **other):
        """Put messages as align-stack does, or about something other."""
        for task in tasks or self.step.tasks():
            message = {"step": "files", "task": task, "destination": self.destination}
            self.queue.put([json.dumps(message | other)])

    def request(self, **flags):
        return WorkerRequest(queue=self.url, dst_path=str(self.folder), **flags)


def exit_code(request):
    """Run a worker here; its exit code."""
    try:
        run_worker(request)
    except SystemExit as end:
        return end.code
    return 0


def refused(stack):
    """Reasons for which messages were set aside, sorted."""
    files = (stack.folder / "tasks/refused").glob("*.json")
    return sorted(json.loads(path.read_text())["reason"] for path in files)


def test_a_worker_does_all_tasks_of_a_queue_and_ends_with_it(
    tmp_path, monkeypatch, log
):
    stack = Stack(tmp_path, monkeypatch, tasks=5)
    stack.put()
    assert exit_code(stack.request()) == 0
    assert runs_of(stack.folder) == dict.fromkeys(stack.step.tasks(), 1)
    assert note(stack.folder, "files/z2-3")["figures"]["bytes_read"] == 12_000
    assert stack.queue.count() == 0
    assert stack.made == ["files"]
    assert sum(line.endswith(": done in 0 s") for line in log.messages) == 5
    assert log.messages[-1] == "5 tasks done, 0 failed"


def test_a_worker_that_waits_does_the_tasks_of_a_stack_that_grew(
    tmp_path, monkeypatch, log
):
    stack = Stack(tmp_path, monkeypatch, tasks=2)
    one = worker._Worker(stack.request(), stack.queue)
    for num in (2, 3):
        stack.step = FilesStep(stack.folder, tasks=num)
        stack.put()
        with StopRequest(None) as stop:
            one.run(stop)
    assert runs_of(stack.folder) == {"z0-1": 1, "z1-2": 1, "z2-3": 1}
    assert refused(stack) == []


def test_a_task_that_is_done_is_not_run_again(tmp_path, monkeypatch, log):
    stack = Stack(tmp_path, monkeypatch, tasks=2)
    stack.put()
    stack.put()
    assert exit_code(stack.request()) == 0
    assert runs_of(stack.folder) == {"z0-1": 1, "z1-2": 1}
    assert log.messages[-1] == "2 tasks done, 0 failed"


def test_a_task_that_fails_is_tried_three_times_and_the_others_are_done(
    tmp_path, monkeypatch, log
):
    acts = {"z1-2": "raise", "z3-4": "once bug"}
    stack = Stack(tmp_path, monkeypatch, tasks=6, acts=acts)
    stack.put()
    assert exit_code(stack.request()) == 1
    assert runs_of(stack.folder) == {
        "z0-1": 1, "z1-2": 3, "z2-3": 1, "z3-4": 2, "z4-5": 1, "z5-6": 1
    }  # fmt: skip
    assert note(stack.folder, "files/failed/z1-2")["reason"] == (
        "z1-2: a chunk is broken"
    )
    assert stack.queue.count() == 0
    assert log.messages[-1] == "5 tasks done, 1 failed"


POISON = {
    "pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94.",
    "not JSON": b"import os",
    "empty": b"",
    "a list": b'[["os", "system"], ["touch evil"], {}, 1]',
    "task-queue's class": b'{"payload": {"class": "PrintTask", "txt": "x"}, "id": "1"}',
    "a key more": b'{"step": "files", "task": "z0-1", "destination": "%s", "run": "x"}',
    "a key less": b'{"step": "files", "destination": "%s"}',
    "a wrong type": b'{"step": "files", "task": 1, "destination": "%s"}',
    "null": b'{"step": null, "task": "z0-1", "destination": "%s"}',
    "deep": b"[" * 5000,
    "huge": b'{"step": "files", "task": "z0-1", "destination": "' + b" " * MAX_BYTES,
    "unknown step": b'{"step": "os.system", "task": "z0-1", "destination": "%s"}',
    "unknown task": b'{"step": "files", "task": "../../x", "destination": "%s"}',
    "escape, step": b'{"step": "\\u001b[2J", "task": "z0-1", "destination": "%s"}',
    "escape": b'{"step": "files", "task": "\\u001b[2J", "destination": "%s"}',
}


def test_messages_that_are_no_tasks_are_counted_and_set_aside(
    tmp_path, monkeypatch, log
):
    stack = Stack(tmp_path, monkeypatch, tasks=3)
    stack.put()
    for index, content in enumerate(POISON.values()):
        content = content.replace(b"%s", stack.destination.encode())
        path = tmp_path / f"queue/queue/0--poison-{index}.json"
        path.write_bytes(content)
    assert exit_code(stack.request()) == 0
    # The tasks of the step were run, and nothing else.
    assert runs_of(stack.folder) == dict.fromkeys(stack.step.tasks(), 1)
    assert stack.queue.count() == 0
    assert len(refused(stack)) == len(POISON)
    assert f"3 tasks done, 0 failed, {len(POISON)} messages refused" in log.text
    assert "step files has no task '../../x'" in refused(stack)
    assert "step 'os.system': os.system: expected one of files" in refused(stack)
    assert "\x1b" not in log.text
    assert sorted(p.name for p in stack.folder.iterdir()) == ["out", "runs", "tasks"]


def test_tasks_of_another_destination_stay_in_the_queue_for_their_worker(
    tmp_path, monkeypatch, log
):
    monkeypatch.setattr(worker, "HOLD_S", 1)
    stack = Stack(tmp_path, monkeypatch, tasks=2)
    stack.put(["z0-1", "z1-2", "z2-3"], destination="file:///others/dst")
    stack.put()
    assert exit_code(stack.request()) == 0
    assert runs_of(stack.folder) == {"z0-1": 1, "z1-2": 1}
    assert stack.queue.count() == 3
    said = [line for line in log.messages if "file:///others/dst" in line]
    assert len(said) == 1 and "was not started for" in said[0]
    assert log.messages[-1].endswith("; 3 messages are left for others")
    assert wait_for(lambda: stack.queue.lease(60)) is not None


def test_a_worker_ends_after_many_tasks_of_others_in_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "HOLD_S", 0)
    monkeypatch.setattr(worker, "_MOST_HELD", 20)
    stack = Stack(tmp_path, monkeypatch, tasks=2)
    stack.put([f"z{i}-1" for i in range(30)], destination="file:///others/dst")
    assert exit_code(stack.request()) == 0
    assert stack.queue.count() == 30


def test_a_worker_makes_its_step_again_when_the_settings_change(tmp_path, monkeypatch):
    stack = Stack(tmp_path, monkeypatch)
    file = tmp_path / "px"

    def read(destination, name):
        return FilesStep(stack.folder, tasks=2, px=int(file.read_text()))

    provide(monkeypatch, read)
    file.write_text("1")
    process = start(run_worker, stack.request(wait=True))
    queued = RunRequest(queue=stack.url)
    assert run_step(read("", ""), queued)
    file.write_text("2")
    assert run_step(read("", ""), queued)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert all(b'"px": 2' in content for content in outputs(stack.folder).values())
    assert runs_of(stack.folder) == {"z0-1": 2, "z1-2": 2}


def test_tasks_wait_while_the_settings_are_not_those_they_were_queued_with(
    tmp_path, monkeypatch, log
):
    stack = Stack(tmp_path, monkeypatch, tasks=1, px=1)
    run_step(FilesStep(stack.folder, tasks=1, px=2), RunRequest())
    stack.put()
    assert exit_code(stack.request()) == 0
    assert "are not those that its tasks were put into the queue with" in log.text
    assert stack.queue.count() == 1
    assert b'"px": 2' in outputs(stack.folder)["z0-1.txt"]


def test_storage_that_fails_ends_the_worker_and_the_task_stays_in_the_queue(
    tmp_path, monkeypatch
):
    stack = Stack(tmp_path, monkeypatch, tasks=1)
    stack.put()

    def fail(destination, name):
        raise DatasetError("dst/stack.json: cannot be read")

    provide(monkeypatch, fail)
    with pytest.raises(DatasetError, match="stack.json: cannot be read"):
        run_worker(stack.request())
    assert stack.queue.lease(60) is not None


def queue_and_work(stack, **flags):
    """Run the step by its queue and one worker, which is a fork."""
    process = start(run_worker, stack.request(wait=True, **flags))
    try:
        return run_step(stack.step, RunRequest(queue=stack.url))
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.join()
        assert process.exitcode == 143


def test_align_stack_waits_for_the_markers_and_goes_on(tmp_path, monkeypatch, log):
    stack = Stack(tmp_path, monkeypatch, tasks=5)
    assert queue_and_work(stack)
    assert len(outputs(stack.folder)) == 5
    runners = {path.read_text() for path in (stack.folder / "runs").iterdir()}
    assert len(runners) == 1 and f"{os.getpid()}\n" not in runners
    assert f"5 to do by the workers of {stack.url}" in log.text
    assert queue_and_work(stack)
    assert runs_of(stack.folder) == dict.fromkeys(stack.step.tasks(), 1)


def test_align_stack_names_the_tasks_that_failed_in_a_worker(tmp_path, monkeypatch):
    stack = Stack(tmp_path, monkeypatch, tasks=4, acts={"z2-3": "raise"})
    with pytest.raises(TaskError, match="1 of 4 tasks failed.*z2-3: a chunk is broken"):
        queue_and_work(stack)
    assert len(outputs(stack.folder)) == 3


def test_tasks_that_were_lost_are_put_into_the_queue_again(tmp_path, monkeypatch, log):
    monkeypatch.setattr(queue_tasks, "LOST_S", 0.1)
    stack = Stack(tmp_path, monkeypatch, tasks=3)
    has_ended = threading.Event()

    def purge():
        while not has_ended.wait(0.01):
            if received := stack.queue.lease(60):
                stack.queue.delete(received)

    thread = threading.Thread(target=purge)
    thread.start()
    with pytest.raises(StorageError, match="3 tasks of step files are neither done"):
        run_step(stack.step, RunRequest(queue=stack.url))
    has_ended.set()
    thread.join()
    again = [line for line in log.messages if "they are put into it again" in line]
    assert len(again) == 2


def test_a_worker_killed_ten_times_beside_another_leaves_the_same_files(
    tmp_path, monkeypatch
):
    plain = FilesStep(tmp_path / "plain", tasks=30)
    run_step(plain, RunRequest())
    stack = Stack(tmp_path, monkeypatch, tasks=30, seconds=0.1)
    stack.put()
    request = stack.request(lease_s=1)
    steady = start(run_worker, request)
    chance, killed = random.Random(0), []
    for _ in range(10):
        victim = start(run_worker, request)
        # Within a task, and not one that others died of: three deaths are a failure.
        task = wait_until_running(stack, victim.pid, killed)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        killed.append(task)
    steady.join(60)
    assert steady.exitcode == 0
    assert stack.queue.count() == 0
    assert outputs(stack.folder) == outputs(plain.destination)
    assert sum(runs_of(stack.folder).values()) > 30
    tries = stack.folder / "tasks/files/tries"
    assert not [path for path in tries.iterdir() if not path.name.startswith(".")]


def wait_until_running(stack, pid, killed):
    """Wait until a process runs a task that no two died of; its name."""
    return wait_for(lambda: running(stack, pid, killed))


def running(stack, pid, killed):
    """The task that a process has begun, if no two processes died of it."""
    for path in (stack.folder / "tasks/files/tries").glob("z*.json"):
        try:
            about = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        if about["pid"] == pid and killed.count(path.stem) < 2:
            return path.stem
    return None


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_a_worker_end_its_task(tmp_path, monkeypatch, number, code):
    stack = Stack(tmp_path, monkeypatch, tasks=3, seconds=0.5)
    stack.put()
    process = start(run_worker, stack.request())
    wait_for(lambda: runs_of(stack.folder))
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    assert len(outputs(stack.folder)) == 1
    assert stack.queue.count() == 2


def test_a_task_that_does_not_end_after_a_signal_is_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "GRACE_S", 0.3)
    stack = Stack(tmp_path, monkeypatch, tasks=1, acts={"z0-1": "once wait"})
    stack.put()
    process = start(run_worker, stack.request())
    wait_until_begun(stack.folder, "z0-1")
    started = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    assert time.monotonic() - started < 20  # it waits for 30 s
    # It is there at once, with all its tries.
    assert not list((stack.folder / "tasks/files/tries").iterdir())
    assert exit_code(stack.request()) == 0
    assert runs_of(stack.folder) == {"z0-1": 2}


def test_a_waiting_worker_ends_at_once_with_a_signal(tmp_path, monkeypatch):
    stack = Stack(tmp_path, monkeypatch, tasks=1)
    stack.put()
    process = start(run_worker, stack.request(wait=True))
    wait_for(lambda: not stack.queue.count())
    time.sleep(0.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143


def test_the_lease_of_a_task_that_takes_long_is_renewed(tmp_path, monkeypatch):
    stack = Stack(tmp_path, monkeypatch, tasks=1, seconds=4.5)
    stack.put()
    processes = [start(run_worker, stack.request(lease_s=2)) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert runs_of(stack.folder) == {"z0-1": 1}


def test_workers_of_sqs_write_the_same_files(tmp_path, monkeypatch):
    plain = FilesStep(tmp_path / "plain", tasks=25)
    run_step(plain, RunRequest())
    with s3_server() as url:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": url}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        client = boto3.client("sqs", endpoint_url=url, region_name="us-east-1")
        address = client.create_queue(QueueName="stack")["QueueUrl"]
        acts = {"z3-4": "once raise"}
        stack = Stack(tmp_path, monkeypatch, "sqs://stack", tasks=25, acts=acts)
        for body in ("import os", "[1, 2]", '{"class": "PrintTask"}'):
            client.send_message(QueueUrl=address, MessageBody=body)
        assert queue_and_work(stack)
        assert stack.queue.count() == 0
    assert outputs(stack.folder) == outputs(plain.destination)
    assert len(refused(stack)) == 3


def test_a_lease_that_sqs_does_not_give_is_refused(tmp_path):
    with pytest.raises(UsageError, match="SQS leases for 43200 s at most"):
        run_worker(
            WorkerRequest(queue="sqs://a", dst_path=str(tmp_path), lease_s=50_000)
        )


def test_a_message_is_parsed_as_it_was_written():
    message = Message("files", "z0-1", "gs://bucket/é")
    assert Message.parse(message.encode().encode()) == message
    assert set(msgspec.json.decode(message.encode())) == {"step", "task", "destination"}
