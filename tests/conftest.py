"""What all tests share: a HOME of their own.

modelhouse, cloud-volume and corgie write below HOME, modelhouse already when
it is imported.
"""

import logging
import os
import tempfile
from collections.abc import Iterator

import pytest

_HOME = tempfile.TemporaryDirectory(prefix="metroem-tests-")
os.environ["HOME"] = _HOME.name


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
