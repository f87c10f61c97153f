"""Test that freed memory is kept, in its own process since it cannot be undone."""

import platform
import subprocess
import sys

import pytest

# Allocate and free 64 MiB repeatedly: the system has to provide the pages each time.
SCRIPT = """
import resource
from metroem.utils.memory import keep_freed_memory
keeps = {keep} and keep_freed_memory()
import numpy as np
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**23)
before = faults()
for _ in range(20):
    np.ones(2**23)
print(keeps, faults() - before)
"""


def run(keep):
    command = [sys.executable, "-c", SCRIPT.format(keep=keep)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_was_freed_is_not_asked_for_again():
    (kept, few), (_, many) = run(True), run(False)
    assert kept and few < many / 10
