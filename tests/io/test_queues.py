"""Test queues in folders and of SQS, and that task-queue's own tools work on them."""

import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import pytest
from taskqueue import TaskQueue

from metroem.errors import DatasetError, StorageError, UsageError
from metroem.io import queues
from metroem.io.queues import MAX_BYTES, open_queue
from tests.cloud.servers import KEYS, s3_server
from tests.stack.steps import wait_for


@pytest.fixture(scope="module")
def sqs():
    """A client of an SQS server, to which queues of this process go."""
    with s3_server() as url, pytest.MonkeyPatch.context() as patched:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": url}.items():
            patched.setenv(name, value)
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patched.delenv("AWS_SESSION_TOKEN", raising=False)
        patched.setattr(queues, "_LISTEN_S", 0)
        # werkzeug's line for every request.
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        yield boto3.client("sqs", endpoint_url=url, region_name="us-east-1")


@pytest.fixture(params=["fq", "sqs"])
def queue(request, tmp_path):
    """An empty queue of each kind."""
    if request.param == "fq":
        return open_queue(f"fq://{tmp_path}/queue")
    name = f"queue-{time.monotonic_ns()}"
    request.getfixturevalue("sqs").create_queue(QueueName=name)
    return open_queue(f"sqs://{name}")


def lease_all(queue, seconds=60):
    """Lease messages until none is left."""
    found = []
    while received := queue.lease(seconds):
        found.append(received)
    return found


def test_each_message_is_leased_once_and_comes_as_it_was_put(queue):
    texts = [f'{{"task": "z{i} é"}}' for i in range(23)] + ["no json", "[1]", "null"]
    queue.put(texts)
    assert queue.count() == 26
    found = lease_all(queue)
    assert sorted(one.content.decode() for one in found) == sorted(texts)
    assert queue.count() == 26
    for one in found:
        queue.delete(one)
    assert queue.count() == 0


def test_a_message_comes_back_when_its_lease_ends_or_is_given_back(queue):
    queue.put(["a"])
    assert queue.lease(1) is not None
    assert queue.lease(1) is None
    again = wait_for(lambda: queue.lease(60), 3)
    assert again.content == b"a"
    queue.renew(again, 0)
    assert queue.lease(60) is not None


def test_a_lease_that_is_renewed_does_not_end(queue):
    queue.put(["a"])
    received = queue.lease(1)
    queue.renew(received, 60)
    time.sleep(2.1)
    assert queue.lease(60) is None
    queue.delete(received)
    assert queue.count() == 0


def test_of_a_huge_message_only_the_beginning_is_read(queue):
    queue.put(["x" * (MAX_BYTES + 5000)])
    assert len(queue.lease(60).content) == MAX_BYTES + 1


def test_a_message_in_a_folder_is_leased_by_one_of_many(tmp_path):
    url = f"fq://{tmp_path}/queue"
    open_queue(url).put([str(i) for i in range(300)])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lease_all, [open_queue(url) for _ in range(8)]))
    contents = [int(one.content) for part in found for one in part]
    assert sorted(contents) == list(range(300))


def test_tools_of_task_queue_work_on_a_folder(tmp_path):
    url = f"fq://{tmp_path}/queue"
    ours, theirs = open_queue(url), TaskQueue(url, progress=False)
    ours.put(["a", "b", "c"])
    received = ours.lease(60)
    assert (theirs.enqueued, theirs.leased) == (3, 1)
    theirs.release_all()
    assert theirs.leased == 0
    assert len(lease_all(ours)) == 3
    ours.delete(received)
    assert theirs.enqueued == 2
    theirs.purge()
    assert ours.count() == 0


def test_other_files_in_the_folder_of_a_queue_are_passed_over(tmp_path):
    queue = open_queue(f"fq://{tmp_path}/queue")
    for name in ("evil.json", "x--1.json", "0--a.b.json", "0--a.json.gz"):
        (tmp_path / "queue/queue" / name).write_text("a")
    queue.put(["b"])
    assert [one.content for one in lease_all(queue)] == [b"b"]
    assert queue.count() == 1


def test_a_queue_that_cannot_be_used_is_one_line(sqs, tmp_path, monkeypatch, capsys):
    with pytest.raises(DatasetError, match="sqs://none: there is no such queue"):
        open_queue("sqs://none")
    assert capsys.readouterr().out == ""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        open_queue(f"fq://{tmp_path}/file")
    monkeypatch.setitem(sys.modules, "taskqueue", None)
    with pytest.raises(UsageError, match=r"pip install 'metroem\[queue\]'"):
        open_queue(f"fq://{tmp_path}/queue")


def test_messages_that_sqs_refuses_are_an_error(sqs, monkeypatch):
    sqs.create_queue(QueueName="busy")
    queue: Any = open_queue("sqs://busy")
    answer = {"Failed": [{"Id": "1", "Code": "Throttled", "Message": "too many"}]}
    monkeypatch.setattr(queue._api.sqs, "send_message_batch", lambda **_: answer)
    expected = r"sqs://busy: refused 1 of 2 messages \(too many\)"
    with pytest.raises(DatasetError, match=expected):
        queue.put(["a", "b"])


def test_a_message_that_another_was_faster_to_take_is_passed_over(
    tmp_path, monkeypatch
):
    queue: Any = open_queue(f"fq://{tmp_path}/queue")
    queue.put(["a"])
    names = [("0--gone.json", "gone"), *queue._free()]
    monkeypatch.setattr(queue, "_free", lambda: names)
    assert queue.lease(60).content == b"a"
