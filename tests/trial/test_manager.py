"""`haloc create` on a slow machine: NNI's manager and its tuner are held up, and it waits for them.

They are held up by a signal, for longer than NNI itself waits.
"""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from helpers.nni_experiments import (
    DIGITS,
    environment,
    free_port,
    get,
    nnictl,
    parent_of_orphans,
    reaping,
    until_done,
    wait_for,
)

from nni_haloc.experiments import manager
from nni_haloc.experiments.results import trial_results
from nni_haloc.experiments.state import is_running
from nni_haloc.utils.errors import SettingsError

TRIAL = "python3 -c 'import nni; nni.report_final_result(nni.get_next_parameter()[\"seed\"])'"
MANAGER_WAITS, TUNER_WAITS = 6, 12
"""Seconds: nnictl asks its manager four times, a second apart, and that gives its tuner ten."""


@pytest.fixture
def file(tmp_path):
    """An experiment of one trial that takes no time, with a private home."""
    content = yaml.safe_load((DIGITS / "haloc.yml").read_text())
    content |= {"trialCommand": TRIAL, "maxTrialNumber": 1}
    content["searchSpace"] = {"seed": {"_type": "choice", "_value": [7]}}
    file = tmp_path / "haloc.yml"
    file.write_text(yaml.safe_dump(content))
    yield file
    if (tmp_path / "nni-experiments" / ".experiment").exists():
        with reaping():  # a manager may be this process's child
            nnictl(tmp_path, "stop", "--all", check=False)
    # NNI reads HOME when it is imported: one that this process resumed is in another list.
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(tmp_path / "nni-experiments") in words and any(w.endswith("main.js") for w in words):
            process.kill()


def started(program, *words, home):
    """Start a command line of ours or of NNI's."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, words)],
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


HALOC = "from nni_haloc.cli.main import main; main()"
NNICTL = "from nni.tools.nnictl.nnictl import parse_args; parse_args()"


def child(pid, word):
    """Wait for a descendant of a process that has a word, or a file, in its command line."""

    def found():
        for process in psutil.Process(pid).children(recursive=True):
            try:
                if any(each.rpartition("/")[2] == word for each in process.cmdline()):
                    return process
            except psutil.Error:
                continue
        return None

    return wait_for(found, 120, 0.01)


def held_up(process, seconds):
    process.suspend()
    time.sleep(seconds)
    process.resume()


def test_a_slow_manager_and_a_slow_tuner_come_up_and_are_resumed_after_a_kill(
    file, tmp_path, monkeypatch
):
    """The killed manager is a zombie, as in a container without an init process."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder, port = tmp_path / "nni-experiments", free_port()
    with parent_of_orphans():
        with started(HALOC, "create", file, "--port", port, home=tmp_path) as create:
            node = child(create.pid, "main.js")
            held_up(node, MANAGER_WAITS)
            held_up(child(node.pid, "--exp_params"), TUNER_WAITS)
            printed, said = create.communicate(timeout=300)
        assert (create.returncode, said) == (0, "")
        number = get(port, "experiment")["id"]
        assert printed.startswith(f"experiment {number}: http://127.0.0.1:{port}\n")
        until_done(port)
        (row,) = trial_results(folder, number)
        assert (row["status"], row["seed"], row["default"]) == ("SUCCEEDED", 7, 7)
        with pytest.raises(SettingsError, match=f"running; `nnictl stop {number}` stops it$"):
            manager.resume(folder, number)
        node.kill()
        wait_for(lambda: node.status() == psutil.STATUS_ZOMBIE, 20)
        port = free_port()
        manager.resume(folder, number, port)
        assert get(port, "experiment")["id"] == number
        os.waitpid(node.pid, 0)


def test_a_tuner_that_ends_is_quoted(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    content = yaml.safe_load(file.read_text())
    content["tuner"] = {"name": "TPE", "classArgs": {"optimize_mode": "max"}}
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(SettingsError, match="its tuner: ValueError: 'max' is not a valid Opt"):
        manager.create(file, free_port())
    assert not is_running((tmp_path / "nni-experiments" / "_latest").readlink().name)


def test_nnictl_itself_gives_its_manager_up(file, tmp_path):
    """So that a changed NNI shows itself: the patience here would then not be needed."""
    words = ["create", "--config", file, "--port", free_port()]
    with started(NNICTL, *words, home=tmp_path) as create:
        child(create.pid, "main.js").suspend()
        assert create.wait(100) != 0


def test_ctrl_c_while_it_waits_leaves_no_manager(file, tmp_path):
    with started(HALOC, "create", file, "--port", free_port(), home=tmp_path) as create:
        child(create.pid, "main.js").suspend()
        number = (tmp_path / "nni-experiments" / "_latest").readlink().name
        assert is_running(number)
        os.kill(create.pid, signal.SIGINT)
        _, said = create.communicate(timeout=100)
    assert create.returncode == 130, said
    wait_for(lambda: not is_running(number), 20)


def test_a_port_in_use_is_one_line(file, tmp_path, monkeypatch):
    import socket

    monkeypatch.setenv("HOME", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            SettingsError, match=f"port {port} is in use; name another one by --port$"
        ):
            manager.create(file, port)
