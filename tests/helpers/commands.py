"""Run the command line in a process of its own, forked from a server or started anew."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from helpers.paths import ROOT


class Server:
    """The server of forks, which is started when it is first asked."""

    def __init__(self):
        words = [sys.executable, "-m", "helpers.forks"]
        folders = [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))},
        )

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@cache
def server():
    return Server()


def end_server():
    """End the server, if there is one."""
    if server.cache_info().currsize:
        server().process.stdin.close()
        assert server().process.wait(60) == 0
        server.cache_clear()


class Fork:
    """A process, as `subprocess.Popen` has it.

    One that has ended keeps its id until it is asked for its status.
    """

    def __init__(self, *words, module=None, cwd=ROOT, environment=None, quiet=False, files=None):
        self.files = files or [Path(tempfile.mkstemp()[1]) for _ in range(2)]
        self.returncode = None
        stdout, stderr = map(str, self.files)
        self.pid = server().ask(
            start={
                "words": [str(word) for word in words],
                "module": module,
                "cwd": str(cwd),
                "environment": {**os.environ, **(environment or {})},
                "quiet": quiet,
                "stdout": stdout,
                "stderr": stderr,
            }
        )

    def poll(self):
        if self.returncode is None:
            self.returncode = server().ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout=300):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired("haloc", timeout)
            time.sleep(0.002)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    @property
    def stdout(self):
        return self.files[0].read_text()

    @property
    def stderr(self):
        return self.files[1].read_text()

    def remove(self):
        """Remove what it printed."""
        for file in self.files:
            file.unlink(missing_ok=True)


def _started(*words, timeout, module=None, cwd=ROOT, environment=None):
    program = ["-m", module] if module else ["-c", "from nni_haloc.cli.main import main; main()"]
    return subprocess.run(
        [sys.executable, *program, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
    )


def haloc(*words, fresh=False, timeout=300, **options):
    """Run a command, or a ``module``, to its end; return its status and what it printed.

    ``fresh``: in a process that imports everything by itself, and that Python takes apart.
    """
    if fresh:
        return _started(*words, timeout=timeout, **options)
    fork = Fork(*words, **options)
    try:
        status = fork.wait(timeout)
        return subprocess.CompletedProcess(words, status, fork.stdout, fork.stderr)
    finally:
        fork.remove()


class Commands:
    """Commands whose output, of both streams, is in one file, which may be killed at a moment."""

    def __init__(self, output):
        self.output = output

    def start(self, *words):
        self.output.write_text("")
        return Fork(*words, files=[self.output, self.output])

    def done(self, *words):
        """Run a command to its end; the seconds that it takes."""
        fork, begin = self.start(*words), time.monotonic()
        assert fork.wait() == 0, self.output.read_text()
        return time.monotonic() - begin

    def refused(self, *words):
        """The lines that a command leaves which ends with status 2."""
        assert self.start(*words).wait() == 2, self.output.read_text()
        return self.output.read_text().splitlines()

    def killed(self, folder, delay, writing, *words):
        """Kill a command after a delay, or once a file is being written after that.

        Returns whether it was still running.
        """
        fork, end = self.start(*words), time.monotonic() + delay
        time.sleep(delay)
        while writing and not list(folder.rglob("*.part")) and time.monotonic() < end + delay:
            pass
        fork.kill()
        status = fork.wait()
        assert status in (0, -signal.SIGKILL), self.output.read_text()
        return status != 0
