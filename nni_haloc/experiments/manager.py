"""Start NNI's manager with patience: on a slow machine nnictl and the manager give up too soon.

`nnictl` asks its manager four times within some three seconds and then kills it; the manager gives
its tuner ten seconds to connect and then ends the experiment. Both wait longer here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_haloc.experiments.state import find_experiment, is_running, last_errors
from nni_haloc.utils.errors import SettingsError, first_line
from nni_haloc.utils.interruption import uninterrupted
from nni_haloc.utils.quiet import silent

if TYPE_CHECKING:
    from nni.experiment import Experiment

PATIENCE = 180
"""Seconds for NNI's manager to start and to answer, and for its tuner to connect."""
_PRELOADED = Path(__file__).with_name("patience.cjs")
"""What is loaded into the manager's program before its own code."""
_CONNECTED = b"Dispatcher started"
"""What the tuner writes into its log once it has connected."""


def warm_up_manager() -> None:
    """Read the files of NNI's manager once, so that the system has them in memory.

    ``nnictl`` waits for the manager for only about three seconds.
    """
    spec = find_spec("nni_node")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(folder).rglob("*"):
            if file.is_file() and (file.suffix in (".js", ".json") or file.name == "node"):
                file.read_bytes()


def create(path: str | Path, port: int = 8080) -> str:
    """Create an experiment as ``nnictl create`` does, with patience.

    Args:
        path: the experiment's file.
        port: of NNI's manager and its web page.

    Returns:
        The experiment's id.

    Raises:
        SettingsError: if it can't be started; says what NNI says.
    """
    from nni.experiment import Experiment
    from nni.experiment.config import ExperimentConfig

    experiment = Experiment(ExperimentConfig.load(path))
    _start(experiment, "create", port)
    return experiment.id


def resume(folder: Path, number: str, port: int = 8080) -> None:
    """Resume a stopped experiment as ``nnictl resume`` does, with patience.

    Args:
        folder: where NNI keeps its experiments.
        number: the experiment's id.
        port: of NNI's manager and its web page.

    Raises:
        SettingsError: if there is no such experiment, it runs, or it can't be started.
    """
    own = find_experiment(folder, number)
    if is_running(number):
        raise SettingsError(
            f"experiment {number!r}: it is running; `nnictl stop {number}` stops it"
        )
    from nni.experiment import Experiment
    from nni.experiment.launcher import get_stopped_experiment_config

    try:
        with silent("nni"):
            config = get_stopped_experiment_config(number, folder)
    except Exception as error:  # NNI's own, of whatever kind
        reason = f"its settings can't be read from {own} ({first_line(error)})"
        raise SettingsError(f"experiment {number!r}: {reason}") from None
    _start(Experiment(config, id=number), "resume", port)


def _start(experiment: Experiment, action: str, port: int) -> None:
    """Start an experiment's manager, and wait until its tuner has connected."""
    warm_up_manager()
    own = _folder(experiment)
    log = own / "log" / "dispatcher.log"
    before = log.stat().st_size if log.exists() else 0
    with silent("nni"), _patient() as started:
        try:
            _start_manager(experiment, action, port)
            wrong = _wait_for_tuner(started[0], port, log, before)
        except BaseException as error:
            for process in started:
                _kill(process.pid)
            if not isinstance(error, Exception):
                raise  # Ctrl-C
            wrong = "; ".join(last_errors(own)) or first_line(error)
            if "is not idle" in str(error):
                wrong = f"port {port} is in use; name another one by --port"
            raise SettingsError(f"NNI's manager can't be started: {wrong}") from None
    if wrong:
        _kill(started[0].pid)
        raise SettingsError(f"experiment {experiment.id!r}: {wrong}")


def _start_manager(experiment: Experiment, action: str, port: int) -> None:
    from nni.experiment import RunMode

    experiment._action = action
    experiment.start(port, run_mode=RunMode.Detach)


@contextmanager
def _patient() -> Iterator[list[Any]]:
    """Let NNI wait for its manager as long as that runs; yield the processes that it starts."""
    from nni.experiment import launcher, rest

    start, check, timeout = launcher.Popen, launcher._check_rest_server, rest.timeout
    started: list[Any] = []

    def start_manager(words: list[str], **options: Any) -> Any:
        patience = {"NNI_HALOC_PATIENCE": str(PATIENCE)}
        words = [words[0], "--require", str(_PRELOADED), *words[1:]]
        with uninterrupted():
            started.append(start(words, **options, env=os.environ | patience))
        return started[-1]

    def wait(port: int, retry: int = 0, url_prefix: str | None = None) -> None:
        end = time.monotonic() + PATIENCE
        while started[-1].poll() is None and time.monotonic() < end:
            with suppress(Exception):  # of requests: it does not answer yet
                return rest.get(port, "/check-status", url_prefix)
            time.sleep(0.5)
        raise RuntimeError("it does not answer, or has ended")

    launcher.Popen, launcher._check_rest_server, rest.timeout = start_manager, wait, PATIENCE
    with _without_proxy():
        try:
            yield started
        finally:
            launcher.Popen, launcher._check_rest_server, rest.timeout = start, check, timeout


@contextmanager
def _without_proxy() -> Iterator[None]:
    """Let requests to this machine's own ports go there, whatever proxy is set."""
    keys = [key for key in ("no_proxy", "NO_PROXY") if key in os.environ] or ["no_proxy"]
    before = {key: os.environ.get(key) for key in keys}
    for key, value in before.items():
        os.environ[key] = ",".join(filter(None, (value, "localhost,127.0.0.1")))
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key)
            else:
                os.environ[key] = value


def _wait_for_tuner(manager: Any, port: int, log: Path, before: int) -> str:
    """Wait until the tuner has connected; return what went wrong, if anything.

    Args:
        manager: the manager's process.
        port: the manager's.
        log: the tuner's log.
        before: bytes of it that were there before.
    """
    import psutil
    from nni.experiment import rest

    seen, end = False, time.monotonic() + 2 * PATIENCE
    while time.monotonic() < end:
        with suppress(OSError):
            if _CONNECTED in log.read_bytes()[before:]:
                return ""
        with suppress(Exception):  # of requests: it may answer late
            if errors := rest.get(port, "/check-status")["errors"]:
                return "; ".join(last_errors(log.parent.parent)) or str(errors[0])
        with suppress(psutil.Error):
            below = psutil.Process(manager.pid).children(recursive=True)  # a shell is between them
            tuner = any("--exp_params" in _words(process) for process in below)
            if seen and not tuner:
                return "; ".join(last_errors(log.parent.parent)) or "its tuner has ended"
            seen = seen or tuner
        if manager.poll() is not None:
            return "; ".join(last_errors(log.parent.parent)) or "NNI's manager has ended"
        time.sleep(0.3)
    return f"its tuner has not connected within {2 * PATIENCE} s"


def _words(process: Any) -> list[str]:
    import psutil

    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


def _kill(pid: int) -> None:
    """Kill a manager and what it has started."""
    import psutil

    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with suppress(psutil.Error):
                each.kill()


def _folder(experiment: Experiment) -> Path:
    config = experiment.config
    assert config is not None
    return Path(config.canonical_copy().experiment_working_directory) / experiment.id
