"""The results of an experiment's trials, read from its database, running or stopped."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from nni_haloc.experiments.program import trial_arguments
from nni_haloc.experiments.state import (
    find_experiment,
    is_running,
    last_errors,
    last_lines,
    why_nothing,
)
from nni_haloc.utils.errors import SettingsError, first_line, printable

Content = dict[str, Any]

_ERROR = re.compile(
    r"(?:\d\d:\d\d:\d\d ERROR |haloc: )(.+)"
    r"|((?:[A-Za-z_]\w*\.)*[A-Za-z_]*(?:Error|Exception|Interrupt)\b.*)"
)
"""A line of a trial's log, or of its standard error, that says what went wrong."""


def trial_results(folder: str | Path, experiment: str) -> list[dict[str, Any]]:
    """Return a row for each trial of an experiment, running or stopped.

    The rows come from the experiment's database. A final result is joined to its parameters by the
    parameter id that came with it, never by the trial's id: NNI may hand a trial other parameters
    than those it lists for it.

    Args:
        folder: where NNI keeps its experiments.
        experiment: the experiment's id.

    Returns:
        Dicts of ``trial``, ``status``, the trial's parameters and its final metrics, in the order
        in which the parameters were made.

    Raises:
        SettingsError: if there is no such experiment, or its database can't be read.
    """
    events, finals = _select(
        folder,
        experiment,
        "SELECT trialJobId, event, data FROM TrialJobEvent ORDER BY rowid",
        "SELECT trialJobId, parameterId, data FROM MetricData WHERE type = 'FINAL' ORDER BY rowid",
    )
    try:
        return _joined(events, finals)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise SettingsError(
            f"experiment {experiment!r}: its database holds other values than NNI's ({reason})"
        ) from None


def _joined(events: list[tuple[Any, ...]], finals: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Join the events of trials to their final results."""
    status: dict[str, str] = {}
    parameters: dict[str, dict[str, Any]] = {}
    listed: dict[str, str] = {}
    for trial, event, data in events:
        status[trial] = event
        if data:
            record = json.loads(data)
            number = str(record["parameter_id"])
            parameters[number], listed[number] = record["parameters"], trial
    reported = {
        str(number): (trial, json.loads(json.loads(data))) for trial, number, data in finals
    }
    rows = []
    for number in sorted({*parameters, *reported}, key=lambda n: (len(n), n)):
        trial, metrics = reported.get(number, (listed.get(number, ""), {}))
        metrics = metrics if isinstance(metrics, dict) else {"default": metrics}
        rows.append(
            {
                "trial": trial,
                "status": status.get(trial, ""),
                **parameters.get(number, {}),
                **metrics,
            }
        )
    return rows


def why_no_trials(folder: str | Path, experiment: str) -> str | None:
    """Return why an experiment has no trials, if anything is wrong; None where it has just begun.

    Args:
        folder: where NNI keeps its experiments.
        experiment: the experiment's id.

    Raises:
        SettingsError: if there is no such experiment.
    """
    errors = last_errors(find_experiment(Path(folder), experiment))
    if errors:
        return f"no trial has begun; {'; '.join(errors)}"
    return None if is_running(experiment) else "it was stopped before a trial had begun"


def trial_folders(folder: str | Path, experiment: str) -> dict[str, str]:
    """Return where each trial left its results, by its id.

    A place is a folder or, because NNI fetches only logs from another machine, the command that
    fetches the folder.

    Args:
        folder: where NNI keeps its experiments.
        experiment: the experiment's id.

    Raises:
        SettingsError: if there is no such experiment, or its database can't be read.
    """
    paths, profiles = _select(
        folder,
        experiment,
        "SELECT trialJobId, logPath FROM TrialJobEvent WHERE logPath <> '' ORDER BY rowid",
        "SELECT params FROM ExperimentProfile ORDER BY revision DESC LIMIT 1",
    )
    machines = _machines(profiles[0][0]) if profiles else {}
    places = {}
    for trial, path in paths:
        host, _, there = path.partition(":~/")  # NNI's form for a folder of another machine
        remote = host in machines
        places[trial] = _fetch(machines[host], there, trial) if remote else f"{path}/haloc"
    return places


def cost_metric(folder: str | Path, experiment: str) -> str | None:
    """Return ``cost.metric`` of an experiment's run file; None where it can't be read here."""
    from nni_haloc.inputs.yaml_files import read_yaml

    try:
        (profiles,) = _select(
            folder,
            experiment,
            "SELECT params FROM ExperimentProfile ORDER BY revision DESC LIMIT 1",
        )
        profile = json.loads(profiles[0][0])
        arguments = trial_arguments(Path(experiment), str(profile["trialCommand"]))
        file = Path(profile.get("trialCodeDirectory") or ".") / (arguments or [""])[0]
        metric = read_yaml(file)["cost"]["metric"]
    except (SettingsError, ValueError, LookupError, TypeError):
        return None
    return metric if isinstance(metric, str) else None


def why_failed(folder: str | Path, experiment: str) -> dict[str, tuple[str, str]]:
    """Return why each failed trial failed, by its id.

    Args:
        folder: where NNI keeps its experiments.
        experiment: the experiment's id.

    Returns:
        The last error that the trial's log or its standard error tells of, empty if there is none,
        and the place of the log.

    Raises:
        SettingsError: if there is no such experiment, or its database can't be read.
    """
    events, paths = _select(
        folder,
        experiment,
        "SELECT trialJobId, event FROM TrialJobEvent ORDER BY rowid",
        "SELECT trialJobId, logPath FROM TrialJobEvent WHERE logPath <> '' ORDER BY rowid",
    )
    status, places = dict(events), dict(paths)
    return {
        trial: _last_error(places.get(trial, "")) for trial in status if status[trial] == "FAILED"
    }


def _last_error(place: str) -> tuple[str, str]:
    """Return the last error of a trial's folder, and the file that tells of it."""
    logs = [f"{place}/haloc/log.txt", f"{place}/trial.stderr", f"{place}/stderr"]
    for log in logs:
        errors = [
            match[1] or match[2] for line in last_lines(Path(log)) if (match := _ERROR.match(line))
        ]
        if errors:
            return printable(errors[-1]), log
    there = [log for log in logs if Path(log).is_file()]
    return "", (there or [place])[-1]


def _machines(profile: str) -> dict[str, Content]:
    """Return the remote machines of an experiment by their hosts."""
    service = json.loads(profile)["trainingService"]
    services = service if isinstance(service, list) else [service]
    return {
        machine["host"]: machine for one in services for machine in one.get("machineList") or []
    }


def _fetch(machine: Content, there: str, trial: str) -> str:
    """Return the command that fetches a trial's folder from another machine."""
    key = ["-i", machine["sshKeyFile"]] if machine.get("sshKeyFile") else []
    source = f"{machine['user']}@{machine['host']}:{there}/haloc"
    return shlex.join(["scp", "-r", "-P", str(machine["port"]), *key, source, trial])


def _select(folder: str | Path, experiment: str, *queries: str) -> list[list[tuple[Any, ...]]]:
    """Return the rows of each query to an experiment's database."""
    import sqlite3

    own = find_experiment(Path(folder), experiment)
    database = own / "db" / "nni.sqlite"
    if not database.is_file():
        raise SettingsError(f"experiment {experiment!r}: {why_nothing(own, 'no database')}")
    connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
    try:
        return [connection.execute(query).fetchall() for query in queries]
    except sqlite3.Error as error:
        if "no such table" in str(error):
            raise SettingsError(
                f"experiment {experiment!r}: {why_nothing(own, str(error))}"
            ) from None
        raise SettingsError(
            f"experiment {experiment!r}: {database}: no trials can be read ({error})"
        ) from None
    finally:
        connection.close()
