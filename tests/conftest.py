"""What all tests share: a HOME of their own, and an interpreter of kernels.

modelhouse, cloud-volume and corgie write below HOME, modelhouse already when
it is imported. Triton reads when it is imported, which torch may do, whether it is to
run kernels on a CPU: TRITON_INTERPRET=0 tests them on a GPU. What torch's compiler
prepares once a machine takes longer than the networks of tests.
"""

import atexit
import logging
import os
import signal
import tempfile
from collections.abc import Iterator

import pytest

from tests.zygote import Zygote, wait_shorter

_HOME = tempfile.TemporaryDirectory(prefix="metroem-tests-")
atexit.register(_HOME.cleanup)
os.environ["HOME"] = _HOME.name
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share what takes long to make in one process of xdist.

    Those of the README come first: they take minutes, for which others would wait.
    Slow tests run without coverage: Python 3.11 traces each line at 1.2 to 1.5 times
    the cost.
    """
    items.sort(key=lambda item: item.path.name != "test_readme.py")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker("no_cover")
        folder = item.path.parent
        shared = folder if folder.name == "faults" else item.path
        item.add_marker(pytest.mark.xdist_group(str(shared)))


@pytest.fixture(autouse=True, scope="session")
def cloud_files() -> None:
    """cloud-files, which tests do not wait for longer than it takes."""
    wait_shorter()


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """What SIGTERM does, which each test leaves as it found it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def package_log() -> Iterator[logging.Logger]:
    """The package's logger, which each test leaves as it found it."""
    package = logging.getLogger("metroem")
    before = list(package.handlers), package.level, package.propagate
    package.setLevel(logging.INFO)
    yield package
    for handler in package.handlers:
        if handler not in before[0]:
            handler.close()
    package.handlers, package.level, package.propagate = before


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The process that forks commands; see tests/zygote.py."""
    process = Zygote()
    yield process
    process.close()
