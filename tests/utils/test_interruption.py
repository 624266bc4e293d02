"""Ctrl-C and SIGTERM end a command with one line and the shell's exit status; its work is kept."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from helpers.commands import Fork
from helpers.paths import DIGITS

from nni_haloc.utils.interruption import _Signals, stoppable, uninterrupted

MANY = ["--set", "search.epochs=1000", "--set", "finetune.epochs=1000"]


def ended(number, ready, *words, module=None):
    """Send a signal to a command as soon as it is ``ready``; its status and what it says then."""
    child = Fork(*words, module=module, quiet=True)
    try:
        until = time.monotonic() + 100
        while not ready(child):
            assert child.poll() is None, child.stderr
            assert time.monotonic() < until
            time.sleep(0.01)
        before = len(child.stderr)
        child.send_signal(number)
        return child.wait(60), child.stderr[before:]
    finally:
        child.kill()
        child.wait()
        child.remove()


@pytest.mark.parametrize(
    ("line", "number", "status", "name", "kept"),
    [
        (
            "search: 1000 epochs of",
            signal.SIGINT,
            130,
            "Ctrl-C",
            "no epoch is done; --set cost.table={out}/costs.json takes the costs again",
        ),
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
    found, rest = ended(number, lambda child: line in child.stderr, *arguments)
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
    found, rest = ended(
        signal.SIGINT, lambda child: table.exists(), *arguments, module="nni_haloc.costs.measure"
    )
    kept = f"{table} keeps what is measured; the same command goes on"
    assert (found, rest.splitlines()[-1]) == (130, f"haloc measure: stopped by Ctrl-C; {kept}")
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


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")]
)
def test_a_signal_that_falls_into_a_destructor_stops_all_the_same(number, name, capsys):
    """Python drops what a destructor raises, and tells it with a traceback."""
    hook = sys.unraisablehook

    class Interrupted:
        def __del__(self):
            signal.raise_signal(number)

    def work():
        Interrupted()
        time.sleep(10)

    with pytest.raises(SystemExit) as left, stoppable("haloc", lambda: "all is kept"):
        work()
    assert left.value.code == 128 + number
    assert capsys.readouterr().err == f"haloc: stopped by {name}; all is kept\n"
    assert sys.unraisablehook is hook


def test_what_a_destructor_raises_without_a_signal_is_told(monkeypatch):
    class Broken:
        def __del__(self):
            raise ValueError("broken")

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_value))
    with stoppable("haloc"):
        Broken()
    assert [str(error) for error in told] == ["broken"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_a_process_that_is_started_is_known(number):
    """Otherwise it would go on, and nobody would know whom to end."""
    known = []

    def started_and_lost():
        signal.raise_signal(number)
        return "a process"

    def start():
        with uninterrupted():
            known.append(started_and_lost())
        known.append("not reached")

    with pytest.raises(KeyboardInterrupt), stopping():
        start()
    assert known == ["a process"]


@contextmanager
def stopping():
    """What a command does about signals."""
    signals = _Signals()
    try:
        yield
    finally:
        signals.restore()


def test_in_another_thread_signals_are_left_alone():
    def same_handler():
        before = signal.getsignal(signal.SIGINT)
        with uninterrupted():
            return signal.getsignal(signal.SIGINT) is before

    with ThreadPoolExecutor() as pool:
        assert pool.submit(same_handler).result()


@pytest.mark.parametrize(
    ("status", "ends"), [(130, -signal.SIGINT), (143, -signal.SIGTERM), (2, 2), (None, 0)]
)
def test_a_stopped_trial_ends_by_the_signal_itself(status, ends):
    """So NNI's manager sees no exit status, and calls the trial stopped, not failed."""
    code = "import sys; from nni_haloc.utils.interruption import end_by_signal\n"
    code += f"print('closed'); end_by_signal({status}); sys.exit({status})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (ends, "closed\n")
