"""Real NNI experiments for the tests.

Each is created with a private home and port, watched through its REST API, and always stopped by
nnictl.
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
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import yaml

from helpers.paths import ROOT

MANAGER = "import sys; from pathlib import Path; from nni_haloc.experiments import manager\n"
CREATE = MANAGER + "print(manager.create(sys.argv[1], int(sys.argv[2])))"
RESUME = MANAGER + "manager.resume(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))"

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


def environment(home):
    """The variables of a user whose home is ``home``, without a proxy."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"HOME": str(home), "PATH": path}
    return {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | own


def python(home, *words, check=True):
    """Run Python with a private home."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def nnictl(home, *words, check=True):
    """Run nnictl with a private home."""
    program = "from nni.tools.nnictl.nnictl import parse_args; parse_args()"
    return python(home, "-c", program, *words, check=check)


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


def resume(home, number, port):
    python(home, "-c", RESUME, home / "nni-experiments", number, port)


@contextmanager
def created(home, file):
    """The experiment of a file, running: its port and id."""
    try:
        port = free_port()
        number = python(home, "-c", CREATE, file, port).stdout.strip()
        yield port, number
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
def parent_of_orphans():
    """Make this process the parent of what its descendants leave behind."""
    subreaper, libc = 36, ctypes.CDLL(None)  # PR_SET_CHILD_SUBREAPER
    assert libc.prctl(subreaper, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(subreaper, 0, 0, 0, 0)


@contextmanager
def reaping():
    """Make this process the parent of what its descendants leave behind, and reap that.

    `nnictl` leaves its manager to init, and takes a killed manager for a running one until somebody
    reaps it; some containers have nobody.
    """
    over = threading.Event()

    def reap():
        before = set()
        while not over.wait(0.2):
            ended = set()
            for child in psutil.Process().children():
                with suppress(psutil.Error):
                    if child.status() == psutil.STATUS_ZOMBIE:
                        ended.add(child.pid)
            for pid in ended & before:  # a child of `subprocess` is not there that long
                with suppress(ChildProcessError):
                    os.waitpid(pid, 0)
            before = ended - before

    with parent_of_orphans():
        thread = threading.Thread(target=reap)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
