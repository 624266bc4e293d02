"""Real NNI experiments for the tests: created by nnictl on a private home and port, watched through its REST API, always stopped."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import yaml

from nni_haloc.experiment import warm_up_manager

EXAMPLES = Path(__file__).parents[1] / "examples"
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
    """Run nnictl with a private home; a manager that did not start in the few seconds that nnictl gives it is tried again."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | {"HOME": str(home), "PATH": path}
    for attempt in range(4):
        if words[0] in ("create", "resume"):
            warm_up_manager()
        done = subprocess.run(
            [sys.executable, "-m", "nni.tools.nnictl.nnictl", *map(str, words)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
        if done.returncode == 0 or not check:
            return done
        time.sleep(5 * attempt)
    raise AssertionError(done.stdout + done.stderr)


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
    """Whether the experiment came to its first trial. On a busy machine its tuner may miss the ten seconds that NNI's manager gives it."""

    def state():
        answer = get(port, "check-status")
        return (answer["status"] == "ERROR" and answer["errors"]) or get(port, "trial-jobs")

    found = wait_for(state, every=0.5)
    if isinstance(found[0], str):
        assert "Tuner did not connect" in found[0], found
        return False
    return True


@contextmanager
def created(home, file):
    """The experiment of a file, running: its port and id."""
    try:
        for _ in range(4):
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
    """The digits example with fewer epochs and one trial a budget, when it is DONE: its port and id."""
    with finished(home, with_budgets(digits_code(home / "digits") / "haloc.yml", budgets)) as found:
        yield found
