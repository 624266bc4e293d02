"""NNI experiments from outside: a check before one is created, and its results afterwards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from nni_haloc.cli.options import NNI, Json, print_json
from nni_haloc.experiments.check import check_experiment, is_of_a_run
from nni_haloc.experiments.front import COSTS, Point, draw_front, front_of, tuned_keys
from nni_haloc.experiments.manager import create, resume, warm_up_manager
from nni_haloc.experiments.results import (
    cost_metric,
    trial_folders,
    trial_results,
    why_failed,
    why_no_trials,
)
from nni_haloc.experiments.state import is_running
from nni_haloc.experiments.trials import check_settings
from nni_haloc.utils.errors import SettingsError, as_one_line, expected_one_of
from nni_haloc.utils.printing import print_table, shown

experiments = typer.Typer()

HOME = Path("~/nni-experiments")
_OWN = ("trial", "status", "default")
"""Columns that the table of trials has even where all trials are equal."""
Experiment = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="Id of an NNI experiment, running or stopped.", show_default=False
    ),
]
Folder = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of NNI's experiments.")]
Port = Annotated[int, typer.Option(metavar="N", help="Port of NNI's manager and its web page.")]


@experiments.command("check", rich_help_panel=NNI)
def check_command(
    experiment_file: Annotated[
        Path,
        typer.Argument(
            metavar="HALOC.yml",
            help="File of an NNI experiment, or of one run's settings.",
            show_default=False,
        ),
    ],
) -> None:
    """Check an experiment's file before nnictl create, or a run's.

    The command checks the keys, makes tuner and assessor, and loads what the
    trials need: settings, data, network, weights, cost tables. It reads the files
    of NNI's manager once, too: nnictl gives the manager only some three seconds to
    start.
    """
    if is_of_a_run(experiment_file):
        check_settings(experiment_file, [{}], "")
        typer.echo(f"{experiment_file}: ready (a run; haloc run starts it)")
        return
    trials = check_experiment(experiment_file)
    warm_up_manager()
    typer.echo(f"{experiment_file}: ready ({trials})")


@experiments.command("create", rich_help_panel=NNI)
def create_command(
    experiment_file: Annotated[
        Path,
        typer.Argument(metavar="HALOC.yml", help="File of an NNI experiment.", show_default=False),
    ],
    port: Port = 8080,
) -> None:
    """Check an experiment, and create it; waits on slow machines.

    It waits longer than nnictl on a slow machine: nnictl create gives NNI's manager
    some three seconds to start, and the manager gives its tuner ten; here they have
    minutes. The commands of nnictl hold for the experiment.
    """
    check_experiment(experiment_file)
    number = create(experiment_file, port)
    _print_running(number, port)


@experiments.command("resume", rich_help_panel=NNI)
def resume_command(experiment: Experiment, port: Port = 8080, folder: Folder = HOME) -> None:
    """Resume a stopped experiment, with the patience of haloc create."""
    resume(folder.expanduser(), experiment, port)
    _print_running(experiment, port)


def _print_front(
    experiment: str, points: list[Point], cost: str, picture: Path, json_: bool
) -> None:
    """Draw the front of an experiment, and print it."""
    with as_one_line(where=str(picture)):
        draw_front(points, cost, picture, f"Experiment {experiment}")
    best = [point for point in points if point.on_front]
    if json_:
        return print_json([point._asdict() for point in points])
    tuned = tuned_keys(best)
    columns = ["trial", *tuned, f"{cost}, % of the original", "top-1, %"]
    cells = [
        [
            point.trial,
            *map(point.parameters.get, tuned),
            round(100 * point.share, 1),
            round(100 * point.top1, 2),
        ]
        for point in best
    ]
    print_table(
        f"{len(best)} best of {len(points)} finished trials", columns, cells, text={"trial"}
    )
    return typer.echo(f"all trials: {picture}")


def _print_left_out(rows: list[dict[str, Any]], points: list[Point], json_: bool) -> None:
    """Say how many trials have no place in a picture, by their states."""
    placed = {point.trial for point in points}
    states = Counter(row["status"].lower() for row in rows if row["trial"] not in placed)
    if states:
        known = ", ".join(f"{number} {state or 'unknown'}" for state, number in states.items())
        typer.echo(f"left out, without figures: {known}", err=json_)


def _print_failed(folder: Path, experiment: str, *, err: bool = False) -> None:
    """Say why each failed trial failed, and where its log is."""
    for trial, (cause, log) in why_failed(folder, experiment).items():
        typer.echo(f"{trial} failed: {cause or 'no error is in its log'} ({log})", err=err)


def _check_finished(experiment: str, rows: list[dict[str, Any]]) -> None:
    """Raise `SettingsError` if no trial has reported a result yet."""
    if not any("default" in row for row in rows):
        states = Counter(row["status"].lower() for row in rows if row["status"])
        known = ", ".join(f"{number} {state}" for state, number in states.items())
        message = f"no trial has finished yet{f' ({known})' if known else ''}"
        raise SettingsError(f"experiment {experiment!r}: {message}")


def _own_cost(folder: Path, experiment: str) -> str:
    """Return the cost that an experiment's budget limits, if a front may be drawn over it."""
    own = cost_metric(folder, experiment)
    return own if own in COSTS else COSTS[0]


def _print_results(experiment: str, rows: list[dict[str, Any]]) -> None:
    """Print a table of trials, and below it the figures that all finished ones have in common."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    finished = [row for row in rows if "default" in row]
    common = {
        key: value
        for key, value in (finished[0] if len(finished) > 1 else {}).items()
        if key not in _OWN and all(row.get(key) == value for row in finished)
    }
    columns = [column for column in columns if column not in common]
    cells = [[row.get(column) for column in columns] for row in rows]
    print_table(f"experiment {experiment}", columns, cells, text={"trial", "status"})
    if common:
        figures = ", ".join(f"{key} {shown(value)}" for key, value in common.items())
        typer.echo(f"the same in all finished trials: {figures}")


def _print_running(number: str, port: int) -> None:
    typer.echo(f"experiment {number}: http://127.0.0.1:{port}")
    typer.echo(f"results: haloc results {number}; end: nnictl stop {number}")


@experiments.command("results", rich_help_panel=NNI)
def results_command(
    experiment: Experiment,
    folder: Folder = HOME,
    folders: Annotated[
        bool,
        typer.Option(
            "--folders",
            metavar="",
            help="Print each trial's folder, or the command that fetches it, instead.",
        ),
    ] = False,
    pareto: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw accuracy over cost into this picture (front.png) or page (front.html), and"
            " print the trials that no other trial beats.",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="COST",
            help=f"Cost of --pareto: {', '.join(COSTS)} (default: the experiment's own).",
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Print the parameters and the results of all trials.

    If there are none, the command says why; below the table it says why trials
    failed, and where their logs are.
    """
    if by is not None and by not in COSTS:
        raise SettingsError(f"--by: {expected_one_of(COSTS, by)}")
    folder = folder.expanduser()
    if pareto is not None:
        results = trial_results(folder, experiment)
        _check_finished(experiment, results)
        cost = by or _own_cost(folder, experiment)
        points = front_of(results, cost)
        _print_front(experiment, points, cost, pareto, json_)
        _print_left_out(results, points, json_)
        return _print_failed(folder, experiment, err=json_)
    places = trial_folders(folder, experiment) if folders else {}
    rows = [] if folders else trial_results(folder, experiment)
    if not rows and not places:
        why = why_no_trials(folder, experiment)
        if why is not None:
            raise SettingsError(f"experiment {experiment!r}: {why}")
        if not json_:
            return typer.echo(f"experiment {experiment}: no trial has begun yet")
    if json_:
        return print_json(places if folders else rows)
    if folders:
        return typer.echo("\n".join(places.values()))
    _print_results(experiment, rows)
    _print_failed(folder, experiment)
    if any(row["status"] == "RUNNING" for row in rows) and not is_running(experiment):
        goes_on = f"haloc resume {experiment} goes on with trials that were RUNNING"
        typer.echo(f"the experiment is not running on this machine; {goes_on}", err=True)
    return None
