"""Networks and data shared by the tests: small, random, seeded; and processes for commands."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.networks import SmallNet
from helpers.paths import ROOT
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)  # the networks here are too small to share out


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = SmallNet()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def images():
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def loaders(images, labels):
    data = TensorDataset(images, labels)
    return tuple(
        DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 4)
    )


@pytest.fixture(scope="session")
def experiment(tmp_path_factory):
    """Port, id and home of a real NNI experiment of two trials, DONE."""
    from helpers.nni_experiments import digits_experiment

    home = tmp_path_factory.mktemp("home")
    with digits_experiment(home, [0.5, 0.3]) as (port, number):
        yield port, number, home


SERVER = """
import json, os, sys, traceback
import nni_haloc.runs.run, nni_haloc.costs.measure, nni_haloc.costs
import nni_haloc.results.figures, nni_haloc.results.front, nni_haloc.runs.devices, nni_haloc.runs.original
from nni_haloc.cli.main import main
for line in sys.stdin:
    words, output = json.loads(line)
    pid = os.fork()
    if not pid:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv, status = ["haloc", *words], 1
        try:
            main()
            status = 0
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(pid, flush=True)
    sys.stdin.readline()  # a process that has ended keeps its number until it is asked for
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""A process for each command, without the seconds that importing takes."""


class Commands:
    def __init__(self, output):
        self.output = output
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def start(self, *words):
        self.server.stdin.write(
            json.dumps([[str(word) for word in words], str(self.output)]) + "\n"
        )
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def status(self):
        self.server.stdin.write("\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def done(self, *words):
        """Run a command to its end; the seconds that it takes."""
        self.start(*words)
        begin = time.monotonic()
        assert self.status() == 0, self.output.read_text()
        return time.monotonic() - begin

    def refused(self, *words):
        """The lines that a command leaves which ends with status 2."""
        self.start(*words)
        assert self.status() == 2, self.output.read_text()
        return self.output.read_text().splitlines()

    def killed(self, folder, delay, writing, *words):
        """Run a command and kill it after a delay, or once a file is being written after that; whether it was still running."""
        pid, end = self.start(*words), time.monotonic() + delay
        time.sleep(delay)
        while writing and not list(folder.rglob("*.part")) and time.monotonic() < end + delay:
            pass
        os.kill(pid, signal.SIGKILL)
        status = self.status()
        assert status in (0, -signal.SIGKILL), self.output.read_text()
        return status != 0


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    found = Commands(tmp_path_factory.mktemp("output") / "output.txt")
    yield found
    found.server.stdin.close()
    found.server.wait(60)
