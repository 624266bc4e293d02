"""NNI experiments seen from outside: a check before one is created, its results afterwards."""

from __future__ import annotations

import json
import math
import shlex
import sqlite3
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.yaml_files import read_yaml
from nni_haloc.utils.errors import SettingsError

_SAMPLERS = {
    "choice": 1, "randint": 2, "uniform": 2, "quniform": 3, "loguniform": 2, "qloguniform": 3, "normal": 2, "qnormal": 3, "lognormal": 2,
    "qlognormal": 3,
}  # fmt: skip


def check_experiment(path: str | Path) -> str:
    """Check an NNI experiment's file and, for trials that run ``nni_haloc.trial``, that each parameter is a setting of their run file.

    Where trials run on another machine, the settings' relative paths must be inside ``trialCodeDirectory``, which NNI sends there; absolute
    ones are that machine's. NNI itself accepts an unknown ``_type`` and reports a missing ``trainingService`` misleadingly. Raises
    `SettingsError` with one line; returns a few words on what will run.
    """
    path = Path(path)
    content = read_yaml(path, exponents=False)
    for key in ("trialCommand", "trainingService"):
        if not content.get(key):
            raise SettingsError(f"{path}: {key}: missing")
    service = content["trainingService"]
    services = service if isinstance(service, list) else [service]
    if not all(isinstance(one, dict) and isinstance(one.get("platform"), str) for one in services):
        raise SettingsError(
            f"{path}: trainingService.platform: expected a name such as 'local', found {service!r}"
        )
    space = content.get("searchSpace")
    if space is None and "searchSpaceFile" in content:
        space = read_yaml(path.parent / str(content["searchSpaceFile"]))
    if not isinstance(space, dict):
        raise SettingsError(
            f"{path}: searchSpace: expected keys with _type and _value, found {type(space).__name__}"
        )
    samples = {key: _examples(path, key, entry) for key, entry in space.items()}
    try:
        words = shlex.split(str(content["trialCommand"]))
    except ValueError as error:
        raise SettingsError(f"{path}: trialCommand: {error}") from None
    if "nni_haloc.trial" not in words:
        return f"trials run {content['trialCommand']!r}"
    arguments = words[words.index("nni_haloc.trial") + 1 :]
    if arguments[:1] == ["measure"]:
        return "trials measure a cost table"
    if len(arguments) != 1:
        raise SettingsError(
            f"{path}: trialCommand: expected 'python3 -m nni_haloc.trial RUN.yml', found {content['trialCommand']!r}"
        )
    code = path.parent / str(content.get("trialCodeDirectory") or ".")
    run_file = code / arguments[0]
    here = all(one["platform"] == "local" for one in services)
    uploaded = None if here else code
    first = {key: values[0] for key, values in samples.items()}
    for key, values in samples.items():
        for value in values:
            load_config(run_file, {**first, key: value}, uploaded=uploaded)
    if not samples:
        load_config(run_file, uploaded=uploaded)
    return f"trials run {arguments[0]}, searching {', '.join(samples) or 'nothing'}"


def _examples(path: Path, key: str, entry: Any) -> list[Any]:
    """Values that a tuner may draw for one key: all of a choice, the ends of a range."""
    where = f"{path}: searchSpace.{key}"
    if not isinstance(entry, Mapping) or entry.get("_type") not in list(
        _SAMPLERS
    ):  # a list: the type may be anything
        found = entry.get("_type") if isinstance(entry, Mapping) else entry
        raise SettingsError(
            f"{where}: _type: expected one of {', '.join(_SAMPLERS)}, found {found!r}"
        )
    values, kind = entry.get("_value"), entry["_type"]
    if (
        not isinstance(values, list)
        or len(values) < _SAMPLERS[kind]
        or (kind != "choice" and len(values) != _SAMPLERS[kind])
    ):
        raise SettingsError(
            f"{where}: _value: expected a list of {_SAMPLERS[kind]} or more for {kind}, found {values!r}"
        )
    if kind == "choice":
        return values
    number = int if kind == "randint" else (int, float)
    for value in values:  # NNI's own reader takes 1e-3 for text: YAML 1.1 wants 1.0e-3
        if isinstance(value, bool) or not isinstance(value, number):
            raise SettingsError(
                f"{where}: _value: expected numbers for {kind}, found {value!r}" + _hint(value)
            )
    if kind == "randint":
        return [values[0], values[1] - 1]
    if "normal" in kind:
        return [math.exp(values[0]) if "log" in kind else float(values[0])]
    return [float(values[0]), float(values[1])]


def _hint(value: Any) -> str:
    return (
        " (NNI reads a number with an exponent only with a point, as in 1.0e-3)"
        if isinstance(value, str) and "e" in value.lower()
        else ""
    )


def warm_up_manager() -> None:
    """Read the files of NNI's manager once, so that the system has them in memory: nnictl waits for it for about three seconds only."""
    spec = find_spec("nni_node")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(folder).rglob("*"):
            if file.is_file() and (file.suffix in (".js", ".json") or file.name == "node"):
                file.read_bytes()


def trial_results(folder: str | Path, experiment: str) -> list[dict[str, Any]]:
    """One row a trial: ``trial``, ``status``, its parameters and its final metrics, in the order of the parameters.

    Read from the experiment's database, running or stopped. A final result is joined to its parameters by the parameter id that came with
    it, never by the trial's id: NNI may hand a trial other parameters than those it lists for it. Raises `SettingsError` for an unknown id.
    """
    events, finals = _select(
        folder,
        experiment,
        "SELECT trialJobId, event, data FROM TrialJobEvent ORDER BY rowid",
        "SELECT trialJobId, parameterId, data FROM MetricData WHERE type = 'FINAL' ORDER BY rowid",
    )
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


def trial_folders(folder: str | Path, experiment: str) -> dict[str, str]:
    """Where each trial left its results, by its id: a folder, or the command that fetches it from the machine on which the trial ran.

    NNI fetches logs alone. Raises `SettingsError` for an unknown id.
    """
    paths, profiles = _select(
        folder,
        experiment,
        "SELECT trialJobId, logPath FROM TrialJobEvent WHERE logPath <> '' ORDER BY rowid",
        "SELECT params FROM ExperimentProfile ORDER BY revision DESC LIMIT 1",
    )
    service = json.loads(profiles[0][0])["trainingService"]
    services = service if isinstance(service, list) else [service]
    machines = {
        machine["host"]: machine for each in services for machine in each.get("machineList") or []
    }
    found = {}
    for trial, path in paths:
        host, _, there = path.partition(":~/")  # so NNI writes a remote one
        if host in machines:
            machine = machines[host]
            key = ["-i", machine["sshKeyFile"]] if machine.get("sshKeyFile") else []
            words = [
                "scp",
                "-r",
                "-P",
                str(machine["port"]),
                *key,
                f"{machine['user']}@{host}:{there}/haloc",
                trial,
            ]
            found[trial] = shlex.join(words)
        else:
            found[trial] = f"{path}/haloc"
    return found


def _select(folder: str | Path, experiment: str, *queries: str) -> list[list[tuple[Any, ...]]]:
    database = Path(folder) / experiment / "db" / "nni.sqlite"
    if not database.is_file():
        raise SettingsError(f"experiment {experiment!r}: no such experiment in {folder}")
    connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
    try:
        return [connection.execute(query).fetchall() for query in queries]
    finally:
        connection.close()
