"""Start NNI's manager with patience: on a slow machine nnictl and the manager give up too soon.

`nnictl` asks its manager four times within some three seconds and then kills it; the manager gives
its tuner ten seconds to connect and then ends the experiment. The first limit is waited out here;
after the second one the manager is started again, for the same experiment.
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
from nni_haloc.utils.log import logger
from nni_haloc.utils.quiet import silent

if TYPE_CHECKING:
    from nni.experiment import Experiment

PATIENCE = 180
"""Seconds for NNI's manager to start, and to answer a request."""
STARTS = 6
"""How often the manager is started where its tuner is too late."""
_LATE = "Tuner did not connect"
_TUNER = 30
"""Seconds after which a tuner that the manager still waits for is there: it gives up after ten."""
_ENDING = 20


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
    """Start an experiment's manager; start it again where its tuner did not connect in time."""
    warm_up_manager()
    for attempt in range(STARTS):
        manager = _start_once(experiment, action, port)
        errors = _wait_for_tuner(port)
        if not errors:
            return
        _stop(experiment, manager)
        if _LATE not in errors[0]:
            raise SettingsError(f"{experiment.id}: NNI's manager ends: {errors[0]}")
        logger.warning("NNI's manager gave up waiting for its tuner; start %d", attempt + 2)
        action = "resume"
    said = "; ".join(last_errors(_folder(experiment))) or "its tuner never connected"
    raise SettingsError(f"experiment {experiment.id!r}: tried {STARTS} times; {said}")


def _start_once(experiment: Experiment, action: str, port: int) -> Any:
    """Start the manager, and wait until it has taken the experiment; return its process."""
    from nni.experiment import RunMode

    experiment._action = action
    with silent("nni"), _patient() as started:
        try:
            experiment.start(port, run_mode=RunMode.Detach)
        except BaseException as error:
            for process in started:
                _kill(process.pid)
            if not isinstance(error, Exception):
                raise  # Ctrl-C
            said = "; ".join(last_errors(_folder(experiment))) or first_line(error)
            if "is not idle" in str(error):
                said = f"port {port} is in use; name another one by --port"
            raise SettingsError(f"NNI's manager can't be started: {said}") from None
    return started[0]


@contextmanager
def _patient() -> Iterator[list[Any]]:
    """Let NNI wait for its manager as long as that runs; yield the processes that it starts."""
    from nni.experiment import launcher, rest

    start, check, timeout = launcher._start_rest_server, launcher._check_rest_server, rest.timeout
    exempt = [key for key in ("no_proxy", "NO_PROXY") if key in os.environ] or ["no_proxy"]
    proxies = {key: os.environ.get(key) for key in exempt}
    started: list[Any] = []

    def start_noted(*args: Any) -> Any:
        started.append(start(*args))
        return started[-1]

    def wait(port: int, retry: int = 0, url_prefix: str | None = None) -> None:
        end = time.monotonic() + PATIENCE
        while started[-1].poll() is None and time.monotonic() < end:
            with suppress(Exception):  # of requests: it does not answer yet
                return rest.get(port, "/check-status", url_prefix)
            time.sleep(0.5)
        raise RuntimeError("it does not answer, or has ended")

    launcher._start_rest_server, launcher._check_rest_server = start_noted, wait
    rest.timeout = PATIENCE
    for key, value in proxies.items():  # a proxy cannot reach this machine's own ports
        os.environ[key] = ",".join(filter(None, (value, "localhost,127.0.0.1")))
    try:
        yield started
    finally:
        launcher._start_rest_server, launcher._check_rest_server = start, check
        rest.timeout = timeout
        for key, value in proxies.items():
            if value is None:
                os.environ.pop(key)
            else:
                os.environ[key] = value


def _wait_for_tuner(port: int) -> list[str]:
    """Wait until a trial is there, or the tuner surely is; return what went wrong until then."""
    from nni.experiment import rest

    begin, found = time.monotonic(), None
    while time.monotonic() - begin < (_TUNER if found else PATIENCE):
        with suppress(Exception), _patient():  # it may answer late
            found = rest.get(port, "/check-status")
            if found["errors"]:
                return list(found["errors"])
            if found["status"] not in ("INITIALIZED", "RUNNING") or rest.get(port, "/trial-jobs"):
                return []
        time.sleep(0.3)
    return [] if found else ["it does not answer"]


def _stop(experiment: Experiment, manager: Any) -> None:
    """Stop the manager, and what it has started: an old tuner would answer the next manager."""
    import psutil

    processes = []
    with suppress(psutil.Error):
        processes = psutil.Process(manager.pid).children(recursive=True)
    with silent("nni"), _patient():
        experiment._stop_nni_manager()
        experiment._stop_logging()
    for process in psutil.wait_procs(processes, timeout=_ENDING)[1]:
        _kill(process.pid)


def _kill(pid: int) -> None:
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
