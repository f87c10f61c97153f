"""Test two runs on the same files."""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from metroem.errors import StorageError
from metroem.io.files import lock, lock_path
from tests.faults.places import contents, counted

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from metroem.io.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
# What a run keeps to itself, and the command that wants it.
LOCKS = {
    "download_image": "out/.x0_y0_z1_MIP1.h5.lock",
    "download_field": "out/.field_0_x0_y0_z1_MIP1_ck.h5.lock",
    "make-dataset": "out/.x144_y32_z12_MIP0.h5.lock",
    "training": "one/.train/.ck.lock",
    "generation": "data/.field_ck.lock",
}


@contextmanager
def another_process(lock):
    """A process that holds a lock; yields it."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCKS)
def test_a_second_run_is_refused_until_the_first_is_dead(zygote, place, name):
    folder, calm = place.fresh(name), place.calm[name]
    before = contents(folder)
    with another_process(folder / LOCKS[name]) as first, counted("second run", name):
        done = zygote.run(folder, calm.command)
        assert done["status"] == 1 and "Traceback" not in done["output"]
        who = f"in use by process {first.pid} on {socket.gethostname()}, since 20"
        assert f"{LOCKS[name]}: {who}" in done["output"]
        assert contents(folder) == before
        first.kill()
        first.wait()
        # The file is still there, but nobody holds it.
        assert json.loads((folder / LOCKS[name]).read_text())["pid"] == first.pid
        done = zygote.run(folder, calm.command)
        assert done["status"] == 0, done["output"]
        assert contents(folder) == calm.contents


def test_a_lock_is_not_kept_by_children_of_a_dead_process(tmp_path):
    path = tmp_path / ".lock"
    script = HOLD.replace(
        '    print("held", flush=True)\n    sys.stdin.read()',
        "    import os, time\n    if os.fork():\n"
        '        print("held", flush=True)\n    time.sleep(60)',
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=f"process {first.pid} on"):
            with lock(path):
                pass
        first.kill()
        first.wait()
        with lock(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert not path.exists()
        os.killpg(first.pid, 9)


def test_a_lock_lies_hidden_beside_what_it_stands_for(tmp_path):
    path = tmp_path / "new" / "a.h5"
    with lock(lock_path(path)):
        assert [p.name for p in path.parent.iterdir()] == [".a.h5.lock"]
    assert list(path.parent.iterdir()) == []


def test_a_lock_file_that_may_not_be_used_is_named(tmp_path, monkeypatch):
    # As one that another account left in a folder where all may write.
    def fail(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", fail)
    with pytest.raises(StorageError, match="Permission denied"):
        with lock(tmp_path / ".lock"):
            pass


def test_storage_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def fail(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", fail)
    with lock(tmp_path / ".lock"):
        pass
    assert "this storage has no locks" in caplog.text
