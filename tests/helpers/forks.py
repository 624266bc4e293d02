"""Serve processes that need not import the package: it is imported once and then forked.

    python -m helpers.forks

Each line of standard input is a request in JSON, each line of standard output its answer: the id
of the process for what to ``start``; an exit status, or null while the process runs, for an id to
``poll``.
"""

import atexit
import gc
import json
import os
import pkgutil
import runpy
import signal
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from importlib import import_module

import nni_haloc


def import_all() -> None:
    """Import the package's modules; the trial's is left, which always runs as the main one."""
    for module in pkgutil.walk_packages(nni_haloc.__path__, "nni_haloc."):
        if module.name != "nni_haloc.trial":
            with suppress(ImportError):  # a command that needs it will say so
                import_module(module.name)


def serve() -> dict | None:
    """Answer requests to the end; in each process that is forked, return what it is to do."""
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if not answer:
                return request["start"]
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)
    return None


def become(job: dict) -> None:
    """Make this process one like any other: its streams, folder, variables and arguments."""
    for number, name in enumerate(("/dev/null", job["stdout"], job["stderr"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    if job["quiet"]:
        warnings.simplefilter("ignore")
    sys.argv = [job["module"] or "-c", *job["words"]]


def run(job: dict) -> None:
    """Run a module, as ``python -m`` does, or the command line."""
    if job["module"]:
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
    else:
        from nni_haloc.cli.main import main

        main()


def status_of(error: SystemExit) -> int:
    """Print what an exit says, and tell its status."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    import_all()
    gc.freeze()  # what is imported stays shared with the processes
    if (job := serve()) is not None:
        become(job)
        status = 1
        try:
            run(job)
            status = 0
        except SystemExit as error:
            status = status_of(error)
        except BaseException:
            traceback.print_exc()
        # What Python does at its end, but for the seconds in which it frees what is imported:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
