"""Real NNI experiments for the tests.

Each is created by nnictl with a private home and port, watched through its REST API, and always
stopped.
"""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml

from helpers.paths import ROOT

NNICTL = (
    "from nni.experiment import launcher; launcher._check_rest_server.__defaults__ = (90, None)\n"
    "from nni.tools.nnictl.nnictl import parse_args; parse_args()"
)
"""nnictl, which gives its manager a minute and a half to start and not three seconds.

A test does not depend on how busy the machine is.
"""

EXAMPLES = ROOT / "examples"
DIGITS = EXAMPLES / "digits"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def get(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/nni/{path}", timeout=10) as answer:
        return json.load(answer)


def digits_code(folder, epochs=2):
    """A copy of the digits example with fewer epochs."""
    shutil.copytree(DIGITS, folder)
    run = folder / "run.yml"
    run.write_text(run.read_text().replace("epochs: 10", f"epochs: {epochs}"))
    return folder


def with_budgets(file, budgets, **changes):
    """Set the budgets of an experiment's file, one trial each, and other keys."""
    content = yaml.safe_load(file.read_text()) | {"maxTrialNumber": len(budgets)} | changes
    content["searchSpace"]["budget.fraction"]["_value"] = budgets
    file.write_text(yaml.safe_dump(content))
    return file


def nnictl(home, *words, check=True):
    """Run nnictl with a private home."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | {
        "HOME": str(home),
        "PATH": path,
    }
    done = subprocess.run(
        [sys.executable, "-c", NNICTL, *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def wait_for(found, seconds=300, every=0.05):
    """The first true value of ``found()``."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every)
    return value


def until_done(port):
    def end():
        status = get(port, "check-status")["status"]
        return status if status in ("DONE", "ERROR") else None

    assert wait_for(end, 600, 2) == "DONE"


def begun(port):
    """Tell whether a trial runs.

    On a busy machine the tuner may miss the ten seconds that NNI's manager gives it.
    """

    def state():
        answer = get(port, "check-status")
        if answer["status"] == "ERROR":
            return answer["errors"]
        return [
            trial["status"]
            for trial in get(port, "trial-jobs")
            if trial["status"] not in ("WAITING", "UNKNOWN")
        ]

    found = wait_for(state, every=0.2)
    if "Tuner did not connect" in found[0]:
        return False
    assert found[0].isupper(), found
    return True


def resume(home, number, port):
    for _ in range(6):
        nnictl(home, "resume", number, "--port", port)
        if begun(port):
            return
        nnictl(home, "stop", number)
    raise AssertionError("the tuner never came in time")


@contextmanager
def created(home, file):
    """The experiment of a file, running: its port and id."""
    try:
        for _ in range(6):
            port = free_port()
            done = nnictl(home, "create", "--config", file, "--port", port)
            assert f"http://127.0.0.1:{port}" in done.stdout + done.stderr
            if begun(port):
                break
            nnictl(home, "stop", "--all", check=False)
        yield port, get(port, "experiment")["id"]
    finally:
        nnictl(home, "stop", "--all", check=False)


@contextmanager
def finished(home, file):
    """The experiment of a file when it is DONE: its port and id."""
    with created(home, file) as (port, number):
        until_done(port)
        yield port, number


@contextmanager
def digits_experiment(home, budgets):
    """Yield port and id of the digits example, DONE: with fewer epochs, one trial a budget."""
    with finished(home, with_budgets(digits_code(home / "digits") / "haloc.yml", budgets)) as found:
        yield found


def manager_of(home, number):
    """The manager's process; nnictl keeps its id."""
    return psutil.Process(
        json.loads((home / "nni-experiments" / ".experiment").read_text())[number]["pid"]
    )


def folders(home, number):
    """Where the trials of an experiment on this machine leave their results, by their ids."""
    return {
        path.parent.name: path
        for path in (home / "nni-experiments" / number).glob("environments/*/trials/*/haloc")
    }


@contextmanager
def reaping():
    """Make this process the parent of what its descendants leave behind, and reap that.

    `nnictl` leaves its manager to init, and takes a killed manager for a running one until somebody
    reaps it; some containers have nobody.
    """
    subreaper = 36  # PR_SET_CHILD_SUBREAPER
    libc, over = ctypes.CDLL(None), threading.Event()

    def reap():
        before = set()
        while not over.wait(0.2):
            ended = {
                child.pid
                for child in psutil.Process().children()
                if child.status() == psutil.STATUS_ZOMBIE
            }
            for pid in ended & before:  # a child of `subprocess` is not there that long
                os.waitpid(pid, 0)
            before = ended - before

    assert libc.prctl(subreaper, 1, 0, 0, 0) == 0
    thread = threading.Thread(target=reap)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        libc.prctl(subreaper, 0, 0, 0, 0)
