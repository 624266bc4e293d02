"""Ctrl-C and SIGTERM end a command with one line and the shell's exit status, and what is done is kept."""

import signal
import subprocess
import sys
import time

import pytest
from helpers.paths import DIGITS, ROOT

from nni_haloc.utils.interruption import stoppable

MANY = ["--set", "search.epochs=1000", "--set", "finetune.epochs=1000"]


def ended(program, ready, number):
    """Sends a signal to a process as soon as it is ``ready``; its exit status, and what it says after."""
    child = subprocess.Popen(
        program, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    try:
        until = time.monotonic() + 100
        while not ready(child):
            assert child.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        child.send_signal(number)
        _, rest = child.communicate(timeout=60)
    finally:
        child.kill()
    return child.returncode, rest


@pytest.mark.parametrize(
    ("line", "number", "status", "name", "kept"),
    [
        ("iterations, 1000 epochs", signal.SIGINT, 130, "Ctrl-C", "no epoch is done"),
        (
            "fine-tuning epoch 1",
            signal.SIGTERM,
            143,
            "SIGTERM",
            "{out} keeps the checkpoint; --resume goes on from it",
        ),
    ],
)
def test_a_run_that_is_stopped_ends_with_one_line(tmp_path, line, number, status, name, kept):
    epochs = MANY if not line.startswith("fine") else ["--set", "search.epochs=1", *MANY[2:]]
    arguments = [
        "run",
        DIGITS,
        "--out",
        tmp_path,
        "--set",
        "search.start=uniform",
        "--set",
        "data.share=0.2",
        *epochs,
    ]
    program = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        "from nni_haloc.cli.main import main; main()",
        *map(str, arguments),
    ]
    found, rest = ended(program, lambda child: line in child.stderr.readline(), number)
    assert found == status, rest
    assert rest.splitlines()[-1] == f"haloc: stopped by {name}; {kept.format(out=tmp_path)}"
    assert "Traceback" not in rest
    assert "failed" not in rest


def test_a_measurement_that_is_stopped_ends_with_one_line(tmp_path):
    arguments = [
        "--model",
        "digits_cnn",
        "--input",
        "1x8x8",
        "--out",
        tmp_path / "costs.json",
        "--rounds",
        "100000",
    ]
    table = tmp_path / "costs.json"
    program = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "nni_haloc.costs.measure",
        *map(str, arguments),
    ]
    found, rest = ended(program, lambda child: table.exists(), signal.SIGINT)
    assert (found, rest.splitlines()[-1]) == (
        130,
        f"haloc measure: stopped by Ctrl-C; {table} keeps what is measured; the same command goes on",
    )
    assert "Traceback" not in rest


def test_what_follows_a_signal_is_its_consequence_and_other_errors_are_not(capsys):
    """Lightning makes `sys.exit(1)` of Ctrl-C; Python's own handlers are back afterwards."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def lightning():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGTERM)  # of a launcher that misses its other process
            sys.exit(1)

    with (
        pytest.raises(SystemExit) as left,
        stoppable("haloc"),
        stoppable("haloc run", lambda: "all is kept"),
    ):
        lightning()
    assert left.value.code == 130
    assert capsys.readouterr().err == "haloc run: stopped by Ctrl-C; all is kept\n"
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), stoppable("haloc"):
            raise error
    assert capsys.readouterr().err == ""
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
