"""The command plan: a run's ranks layer by layer, and how to change them by hand."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from nni_haloc.cli.options import AFTER, Code, Json, print_json, trust
from nni_haloc.utils.errors import SettingsError, as_one_line

plan = typer.Typer()


@plan.command("plan", rich_help_panel=AFTER)
def plan_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Folder of a run, a search or a trial.", show_default=False
        ),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="LAYER=RANK",
            help="Give a layer this rank (24, 24x32 or dense) and refit the others within the"
            " budget; LAYER may be a pattern, such as 'layer1.*'; repeatable.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File for the changed plan, which haloc run --plan takes."
        ),
    ] = None,
    timing: Annotated[
        bool,
        typer.Option(
            "--timing/--no-timing",
            metavar="",
            help="Time the whole networks, where the budget is a latency of this device.",
        ),
    ] = True,
    picture: Annotated[
        bool,
        typer.Option(
            "--plot", metavar="", help="Draw the plan, too: plan.png in FOLDER or by FILE."
        ),
    ] = False,
    code: Code = None,
    json_: Json = False,
) -> None:
    """Show why each layer has its rank; change ranks by hand."""
    if out is not None and not set_:
        raise SettingsError("--out: expected --set LAYER=RANK beside it; nothing else is changed")
    factories = trust(code)
    from nni_haloc.costs.device.costs_file import MEASURED
    from nni_haloc.results.plan_table import (
        PlanFiles,
        change_plan,
        draw_plan,
        plan_content,
        print_change,
        print_plan,
    )
    from nni_haloc.runs.folder import hold
    from nni_haloc.utils.files import make_folder

    files = PlanFiles.read(folder)
    changed = None
    if set_:
        with redirect_stdout(sys.stderr):  # standard output is for the result
            changed, content = change_plan(files, set_, timing=timing, factories=factories)
        print_json(content) if json_ else print_change(content)
    else:
        print_json(plan_content(files)) if json_ else print_plan(files)
    if changed is not None and out is not None:
        make_folder(out.parent)
        changed.save(out)
        words = ["haloc", "run", "RUN.yml", "--plan", str(out)]
        if changed.chosen_by.get("metric") in MEASURED and files.folder.costs.is_file():
            words += ["--set", f"cost.table={files.folder.costs.resolve()}"]
        typer.echo(f"plan: {out}; fine-tune it: {shlex.join(words)}", err=json_)
    if picture:
        path = files.folder.plan_picture if out is None else out.with_suffix(".png")
        holding = hold(files.folder) if out is None else nullcontext()
        with as_one_line(), holding:
            draw_plan(files, changed, path)
        typer.echo(path, err=json_)
