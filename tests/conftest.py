"""What all tests share: a HOME of their own, and an interpreter of kernels.

modelhouse, cloud-volume and corgie write below HOME, modelhouse already when
it is imported. Triton reads when it is imported, which torch may do, whether it is to
run kernels on a CPU: TRITON_INTERPRET=0 tests them on a GPU.
"""

import logging
import os
import tempfile
from collections.abc import Iterator

import pytest

_HOME = tempfile.TemporaryDirectory(prefix="metroem-tests-")
os.environ["HOME"] = _HOME.name
os.environ.setdefault("TRITON_INTERPRET", "1")


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
