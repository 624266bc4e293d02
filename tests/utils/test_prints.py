"""What is silenced, and what is not."""

import os
import subprocess
import sys
import threading

import pytest

from nni_haloc.utils.quiet import without_prints

PRINTS = """
import ctypes
from nni_haloc.utils.quiet import without_prints
c = ctypes.CDLL(None)
c.printf(b"before\\n")
with without_prints():
    c.printf(b"within\\n")
print("after")
"""


@pytest.mark.parametrize("unbuffered", [True, False])
def test_what_c_prints_is_dropped_for_the_block_alone(unbuffered):
    """Into a pipe, where C keeps what it prints until the end."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONUNBUFFERED": "1"} if unbuffered else {}
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["before", "after"]


def test_a_block_that_fails_gives_the_output_back(capfd):
    with pytest.raises(ValueError, match="within"), without_prints():
        raise ValueError("within")
    print("after", end="")
    assert capfd.readouterr().out == "after"


def test_blocks_of_two_threads_may_overlap(capfd):
    entered, leave = threading.Event(), threading.Event()

    def other():
        with without_prints():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with without_prints():
        thread.start()
        entered.wait()
    os.write(1, b"still within ")
    leave.set()
    thread.join()
    os.write(1, b"after")
    assert capfd.readouterr().out == "after"


@pytest.mark.parametrize("output", [None, "closed"])
def test_a_process_without_standard_output_goes_on(output, monkeypatch, tmp_path):
    file = (tmp_path / "closed").open("w")
    file.close()
    monkeypatch.setattr(sys, "stdout", None if output is None else file)
    with without_prints():
        done = True
    assert done
