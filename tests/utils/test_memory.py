"""Freed memory goes back to the system when it is asked for, unless the user has said otherwise."""

import subprocess
import sys

import pytest

SIZES = """
import resource, sys
from nni_haloc.utils.memory import give_back_freed, keep_freed

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize() / 2**20

kept = keep_freed()
blocks = [bytearray(2**20) for _ in range(200)]
last = bytearray(64)
full = resident()
del blocks
before = resident()
given = give_back_freed()
print(kept, given, full - before, before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize(
    ("environment", "gives"),
    [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "100000"}, False)],
)
def test_what_is_kept_is_given_back(environment, gives):
    """Of 200 MiB that were freed, the system has all of them back, or none."""
    done = subprocess.run(
        [sys.executable, "-c", SIZES],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", **environment},
    )
    kept, given, at_once, later = done.stdout.split()
    if kept != "True":
        pytest.skip("no glibc")
    assert given == str(gives)
    assert float(at_once) < 50
    assert (float(later) > 150) == gives
