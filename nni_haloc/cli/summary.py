"""The end of a command's output: a table of the result, its folder, and what may follow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from nni_haloc.runs.folder import Figures
from nni_haloc.runs.stages import all_stages
from nni_haloc.runs.summary import summary
from nni_haloc.utils.files import is_number
from nni_haloc.utils.printing import print_table

_MISSED = (
    "The budget is missed. To meet it, measure the cost table again on an idle machine, or lower "
    "the budget."
)


def print_summary(folder: Path, stages: Mapping[str, Mapping[str, float]], code: str = "") -> None:
    """Print a run's result, its folder and the next commands.

    Args:
        folder: the run's folder.
        stages: names of stages, the first one ``original``, to their figures, as
            `nni_haloc.runs.folder.RunFolder.metrics` returns them.
        code: option for commands that make the original network again.
    """
    print_networks(stages)
    if any(row.get("budget_met") == 0 for row in stages.values()):
        typer.echo(_MISSED)
    print_next(
        folder,
        {
            f"haloc report {folder}": "one HTML page on the run",
            f"haloc bench {folder}{code}": "every stage timed, in every runtime",
        },
    )


def print_networks(stages: Mapping[str, Mapping[str, float]]) -> None:
    """Print a column for each stage's network, and its change from the original's figures.

    A stage that has networks in other runtimes, such as quantizing, has a column for each.
    """
    known = {stage.name: stage for stage in all_stages()}
    networks: dict[str, Figures] = {}
    others: list[str] = []
    for name, row in stages.items():
        figures, stage = {key: v for key, v in row.items() if is_number(v)}, known.get(name)
        shown = {name: figures} if stage is None else stage.rows(figures)
        others += [title for title in shown if stage is not None and title != stage.title]
        networks |= shown
    columns, rows = summary(networks, others)
    if rows:
        print_table("", columns, rows, text={columns[0]})


def print_next(folder: Path, commands: Mapping[str, str]) -> None:
    """Print where the results are, and the commands that may follow.

    Args:
        folder: the folder of the results.
        commands: command lines to what they do.
    """
    typer.echo(f"results: {folder}")
    width = max(map(len, commands))
    for number, (command, text) in enumerate(commands.items()):
        typer.echo(f"{'' if number else 'next:':9}{command:{width}}   {text}")
