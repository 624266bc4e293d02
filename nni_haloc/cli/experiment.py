"""NNI experiments from outside: a check before one is created, and its results afterwards."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from nni_haloc.cli.options import NNI, Json, print_json
from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.printing import print_table

experiments = typer.Typer()

Content = dict[str, Any]

_KEYS = ("trialCommand", "trainingService", "searchSpace", "searchSpaceFile")
"""Keys that only an experiment's file has."""

_SAMPLERS = {
    "choice": 1, "randint": 2, "uniform": 2, "quniform": 3, "loguniform": 2, "qloguniform": 3,
    "normal": 2, "qnormal": 3, "lognormal": 2, "qlognormal": 3,
}  # fmt: skip
"""NNI's samplers and how many values each takes."""


@experiments.command("check", rich_help_panel=NNI)
def check_command(
    experiment_file: Annotated[
        Path,
        typer.Argument(metavar="HALOC.yml", help="An NNI experiment's file.", show_default=False),
    ],
) -> None:
    """Check an experiment's file before nnictl create.

    Finds mistakes that NNI accepts in silence or reports misleadingly. Also
    reads the files of NNI's manager once: nnictl gives the manager only about
    three seconds to start.
    """
    trials = check_experiment(experiment_file)
    warm_up_manager()
    typer.echo(f"{experiment_file}: ready ({trials})")


@experiments.command("results", rich_help_panel=NNI)
def results_command(
    experiment: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="An NNI experiment, running or stopped.", show_default=False
        ),
    ],
    folder: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where NNI keeps its experiments.")
    ] = Path("~/nni-experiments"),
    folders: Annotated[
        bool,
        typer.Option(
            "--folders",
            metavar="",
            help="Print each trial's folder, or the command that fetches it, instead.",
        ),
    ] = False,
    json_: Json = False,
) -> None:
    """Print the parameters and the results of all trials."""
    folder = folder.expanduser()
    if folders:
        places = trial_folders(folder, experiment)
        return print_json(places) if json_ else typer.echo("\n".join(places.values()))
    rows = trial_results(folder, experiment)
    if json_:
        return print_json(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(column) for column in columns] for row in rows]
    return print_table(f"experiment {experiment}", columns, cells, text={"trial", "status"})


def refuse_experiment(path: Path) -> None:
    """Raise `SettingsError` if a file is an NNI experiment's, not a run's settings."""
    from nni_haloc.inputs.yaml_files import read_yaml

    content = read_yaml(path)
    if isinstance(content, Mapping) and any(key in content for key in _KEYS):
        raise SettingsError(
            f"{path}: this is an NNI experiment's file, not a run's settings: start it with "
            f"`nnictl create --config {path}`; `haloc check {path}` checks it first"
        )


def check_experiment(path: str | Path) -> str:
    """Check an NNI experiment's file and the settings of its trials.

    If the trials run ``nni_haloc.trial``, each parameter must be a setting of their run file. If
    they run on another machine, the settings' relative paths must be inside ``trialCodeDirectory``,
    which NNI sends there; absolute ones are that machine's. NNI itself accepts an unknown ``_type``
    and reports a missing ``trainingService`` misleadingly.

    Returns:
        A few words on what the trials run.

    Raises:
        SettingsError: with one line on the first mistake.
    """
    from nni_haloc.inputs.yaml_files import read_yaml

    path = Path(path)
    content = read_yaml(path, exponents=False)
    _refuse_settings(path, content)
    for key in ("trialCommand", "trainingService"):
        if not content.get(key):
            raise SettingsError(f"{path}: {key}: missing")
    platforms = _platforms(path, content["trainingService"])
    samples = {key: _examples(path, key, entry) for key, entry in _space(path, content).items()}
    arguments = _trial_arguments(path, str(content["trialCommand"]))
    if arguments is None:
        return f"trials run {content['trialCommand']!r}"
    if arguments[:1] == ["measure"]:
        return "trials measure a cost table"
    if len(arguments) != 1:
        raise SettingsError(
            f"{path}: trialCommand: expected 'python3 -m nni_haloc.trial RUN.yml', "
            f"found {content['trialCommand']!r}"
        )
    code = path.parent / str(content.get("trialCodeDirectory") or ".")
    here = all(platform == "local" for platform in platforms)
    _check_settings(code / arguments[0], samples, None if here else code)
    return f"trials run {arguments[0]}, searching {', '.join(samples) or 'nothing'}"


def _refuse_settings(path: Path, content: Mapping[str, Any]) -> None:
    """Raise `SettingsError` if an experiment's file is a run's settings."""
    from nni_haloc.inputs.config import Config

    if set(content) & set(Config.model_fields) and not any(key in content for key in _KEYS):
        raise SettingsError(
            f"{path}: these are a run's settings, not an NNI experiment's file: "
            f"`haloc run {path}` runs them"
        )


def _platforms(path: Path, service: Any) -> list[str]:
    """Return where the trials run."""
    services = service if isinstance(service, list) else [service]
    if not all(isinstance(one, dict) and isinstance(one.get("platform"), str) for one in services):
        raise SettingsError(
            f"{path}: trainingService.platform: expected a name such as 'local', found {service!r}"
        )
    return [one["platform"] for one in services]


def _space(path: Path, content: Mapping[str, Any]) -> Content:
    """Return the search space, from the file itself or the one that it names."""
    from nni_haloc.inputs.yaml_files import read_search_space

    space = content.get("searchSpace")
    if space is None and "searchSpaceFile" in content:
        space = read_search_space(path.parent / str(content["searchSpaceFile"]))
    if not isinstance(space, dict):
        raise SettingsError(
            f"{path}: searchSpace: expected keys with _type and _value, "
            f"found {type(space).__name__}"
        )
    return space


def _trial_arguments(path: Path, command: str) -> list[str] | None:
    """Return the arguments of ``nni_haloc.trial``; None if the trials run something else."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise SettingsError(f"{path}: trialCommand: {error}") from None
    name = "nni_haloc.trial"
    return words[words.index(name) + 1 :] if name in words else None


def _check_settings(
    run_file: Path, samples: Mapping[str, Sequence[Any]], uploaded: Path | None
) -> None:
    """Read a run's settings with every value that the tuner may try, one at a time."""
    from nni_haloc.inputs.config import load_config

    first = {key: values[0] for key, values in samples.items()}
    for key, values in samples.items():
        for value in values:
            load_config(run_file, {**first, key: value}, uploaded=uploaded)
    if not samples:
        load_config(run_file, uploaded=uploaded)


def _examples(path: Path, key: str, entry: Any) -> list[Any]:
    """Return values that a tuner may draw for one key: all of a choice, the ends of a range."""
    where = f"{path}: searchSpace.{key}"
    kind = entry.get("_type") if isinstance(entry, Mapping) else entry
    # a list, because an entry of the file may be of a type without a hash
    if not isinstance(entry, Mapping) or kind not in list(_SAMPLERS):
        raise SettingsError(
            f"{where}: _type: expected one of {', '.join(_SAMPLERS)}, found {kind!r}"
        )
    values, count = entry.get("_value"), _SAMPLERS[kind]
    if not isinstance(values, list) or not _enough(kind, values):
        raise SettingsError(
            f"{where}: _value: expected a list of {count} or more for {kind}, found {values!r}"
        )
    if kind == "choice":
        return values
    _check_numbers(where, kind, values)
    if kind == "randint":
        return [values[0], values[1] - 1]
    if "normal" in kind:
        return [math.exp(values[0]) if "log" in kind else float(values[0])]
    return [float(values[0]), float(values[1])]


def _enough(kind: str, values: list[Any]) -> bool:
    """Tell if a sampler has as many values as it takes."""
    count = _SAMPLERS[kind]
    return len(values) >= count if kind == "choice" else len(values) == count


def _check_numbers(where: str, kind: str, values: Iterable[Any]) -> None:
    """Raise `SettingsError` unless all are numbers; NNI reads 1e-3 as text (YAML 1.1)."""
    number = int if kind == "randint" else (int, float)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, number):
            raise SettingsError(
                f"{where}: _value: expected numbers for {kind}, found {value!r}{_hint(value)}"
            )


def _hint(value: Any) -> str:
    return (
        " (NNI reads a number with an exponent only with a point, as in 1.0e-3)"
        if isinstance(value, str) and "e" in value.lower()
        else ""
    )


def warm_up_manager() -> None:
    """Read the files of NNI's manager once, so that the system has them in memory.

    ``nnictl`` waits for the manager for only about three seconds.
    """
    spec = find_spec("nni_node")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(folder).rglob("*"):
            if file.is_file() and (file.suffix in (".js", ".json") or file.name == "node"):
                file.read_bytes()


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

    database = Path(folder) / experiment / "db" / "nni.sqlite"
    if not database.is_file():
        raise SettingsError(f"experiment {experiment!r}: no such experiment in {folder}")
    connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
    try:
        return [connection.execute(query).fetchall() for query in queries]
    except sqlite3.Error as error:
        raise SettingsError(
            f"experiment {experiment!r}: {database}: no trials can be read ({error})"
        ) from None
    finally:
        connection.close()
