"""The commands that make a compressed network: run, search, train, front, throughput."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from nni_haloc.cli.options import (
    COMPRESS,
    Changes,
    Code,
    Json,
    Out,
    Resume,
    RunFile,
    Scale,
    assignment,
    comma_separated,
    places_of,
    print_json,
    some_of,
    trust,
)
from nni_haloc.inputs.registries import RULES
from nni_haloc.utils.errors import InfeasibleBudget, SettingsError, expected_one_of
from nni_haloc.utils.printing import percent, print_table, short

compress = typer.Typer()

SEARCH = "search"


def _rules_with(start: str) -> list[str]:
    """List the rules that start with a text, for shell completion."""
    return [name for name in (SEARCH, *RULES) if name.startswith(start)]


Budget = Annotated[
    str | None,
    typer.Option(
        metavar="FRACTION", help="Fraction of the original's cost (default: as in RUN.yml)."
    ),
]


@compress.command("run", rich_help_panel=COMPRESS)
def run_command(
    run_file: RunFile,
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"How ranks are chosen: {SEARCH}, {', '.join(RULES)} (default: as in RUN.yml).",
            autocompletion=_rules_with,
        ),
    ] = None,
    budget: Budget = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Take the ranks of this file (haloc plan --out, ranks.json); none are chosen.",
        ),
    ] = None,
    out: Out = Path("haloc-run"),
    set_: Changes = None,
    scale: Scale = None,
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Compress a trained network: choose ranks, decompose, fine-tune.

    With --resume, the run goes on from what an interrupted run of the same
    settings left in the folder; if nothing is there, it starts anew. You may
    change settings that the choice of ranks does not use, mainly those of
    finetune: fine-tuning then starts anew. Any other change is refused by name. A
    rule that was interrupted starts anew. Without --resume, the run replaces what is
    in the folder.

    The run ends with a table of the original and the compressed network. With
    --json it prints the folder and the figures by stage, as in metrics.json.
    """
    if rule is not None:
        _check_rule(rule, (SEARCH, *RULES))
    if rule is not None and plan is not None:
        raise SettingsError(f"--plan, --rule: expected one of them, found {plan} and {rule!r}")
    given = {} if plan is None else {"rule": "plan", "plan": str(plan.absolute())}
    options = {
        "rule": rule,
        "budget.fraction": None if budget is None else _number(budget),
        **given,
    }
    _run(run_file, options, out, set_, scale, resume, json_)


@compress.command("search", rich_help_panel=COMPRESS)
def search_command(
    run_file: RunFile,
    out: Out = Path("haloc-run"),
    set_: Changes = None,
    scale: Scale = None,
    resume: Resume = False,
) -> None:
    """Search for ranks only; haloc run --rule search --resume goes on.

    That command fine-tunes the network that the search has found. With another
    rule it refuses the folder, and the search stays. Here, --resume works as in
    haloc run.
    """
    config, changes = _settings(run_file, set_, scale)
    if config.rule != SEARCH and "rule" in config.model_fields_set:
        raise SettingsError(
            f"rule: haloc search needs {SEARCH!r}, found {config.rule!r}; haloc run takes any rule"
        )
    config = config.model_copy(update={"rule": SEARCH})
    from nni_haloc.cli.summary import print_next
    from nni_haloc.runs.folder import RunFolder
    from nni_haloc.runs.job import logged
    from nni_haloc.runs.run import search_only
    from nni_haloc.utils.processes import is_first

    folder = RunFolder(out)
    with logged(folder), _naming_changes(_places(set_, changes), config, folder.costs):
        search_only(config, out, resume=resume)
    if is_first():
        following = {
            f"haloc run {run_file} --rule {SEARCH} --out {out} --resume": "fine-tune, same --set",
            f"haloc front {out} --budgets 0.6,0.5,0.4{code_of(config, run_file)}": "other budgets",
        }
        print_next(out, following)


@compress.command("train", rich_help_panel=COMPRESS)
def train_command(
    run_file: RunFile, set_: Changes = None, scale: Scale = None, resume: Resume = False
) -> None:
    """Train the original network, if you have no weights yet.

    The settings say how, in the section train, and where to, by the key weights.
    """
    config, _ = _settings(run_file, set_, scale, training=True)
    from nni_haloc.runs.folder import RunFolder
    from nni_haloc.runs.job import logged
    from nni_haloc.runs.stages.pretrain import train_original, training_folder

    with logged(RunFolder(training_folder(config))):
        train_original(config, resume=resume)


@compress.command("front", rich_help_panel=COMPRESS)
def front_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Folder of a finished search or run.", show_default=False
        ),
    ],
    budgets: Annotated[
        str,
        typer.Option(
            metavar="FRACTIONS",
            help="Fractions of the original's cost, such as 0.6,0.5,0.4.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for front.json, front.png and the networks (default: FOLDER/front).",
        ),
    ] = None,
    code: Code = None,
) -> None:
    """Make plans for many budgets from one finished search.

    Budgets are fractions of the original's cost in the metric of the settings.
    The folder gets front.json, front.png and, for each budget, a folder that
    nni_haloc.load takes. Nothing is fine-tuned.
    """
    fractions = comma_separated("--budgets", budgets, float, "fractions")
    factories = trust(code, folder)
    from nni_haloc.inputs.config import naming_places
    from nni_haloc.results.front import pareto_front

    with naming_places({"budgets": "--budgets"}):
        content = pareto_front(folder, fractions, out, factories=factories)
    original = content["original"]
    rows: list[Any] = [
        ("original", short(original["cost"]), percent(1), None, percent(original["top1"], 2), None)
    ]
    for point in content["points"]:
        shares = (percent(point["cost_fraction"] / whole) for whole in (1, point["fraction"]))
        place = (out or folder / "front") / point["folder"]
        top1 = percent(point["top1"], 2)
        rows.append((point["fraction"], short(point["cost"]), *shares, top1, place))
    rows += [(point["fraction"], *[None] * 4, point["reason"]) for point in content["infeasible"]]
    columns = ("budget", content["metric"], "of the original", "of the budget", "top-1", "network")
    title = f"{folder}: top-1 on validation images, not fine-tuned"
    print_table(title, columns, rows, text={"network"})


@compress.command("throughput", rich_help_panel=COMPRESS)
def throughput_command(
    run_file: RunFile,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICES",
            help="Devices, such as torch,openvino: runtimes as in haloc measure, eyeriss, cuda "
            "(default: all that are here).",
        ),
    ] = None,
    out: Out = Path("haloc-throughput"),
    set_: Changes = None,
    scale: Scale = None,
    resume: Resume = False,
) -> None:
    """Compress for each device here and compare speed (Table 3).

    Each device gets a folder with a run of its own, whose budget.fraction is of
    what the original costs there. throughput.json has a row for each device. A
    later call replaces the rows of the devices that it measures and keeps the
    others. An interrupted cost table goes on by itself; --resume goes on with the
    runs.
    """
    config, _ = _settings(run_file, set_, scale)
    from nni_haloc.runs.devices import at_hand, known_devices, print_throughput, throughput
    from nni_haloc.runs.folder import RunFolder
    from nni_haloc.runs.job import logged

    named = None if on is None else some_of("--on", on, known_devices())
    with logged(RunFolder(out)):
        devices = at_hand() if named is None else named
        rows = throughput(config, out, devices, resume=resume)
        print_throughput(f"{out}: a plan for each device", rows)


@compress.command("baseline", hidden=True)
def baseline_command(
    run_file: RunFile,
    rule: Annotated[str, typer.Option(metavar="NAME", help="How ranks are chosen.")],
    budget: Budget = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results (default: haloc-baseline-RULE).")
    ] = None,
    set_: Changes = None,
    scale: Scale = None,
    resume: Resume = False,
) -> None:
    """Run with a rule instead of the search: the former name of haloc run --rule."""
    _check_rule(rule, RULES.names())
    typer.echo(f"haloc baseline is deprecated: use haloc run --rule {rule}", err=True)
    out = out or Path(f"haloc-baseline-{rule}")
    options = {"rule": rule, "budget.fraction": None if budget is None else _number(budget)}
    _run(run_file, options, out, set_, scale, resume, json_=False)


def _check_rule(rule: str, names: Sequence[str]) -> None:
    if rule not in names:
        raise SettingsError(f"--rule: {expected_one_of(names, rule)}")


def _number(text: str) -> float | str:
    """Return the number that a text is; another text as it is, for the settings to refuse."""
    try:
        return float(text) if "." in text or not text.isdigit() else int(text)
    except ValueError:
        return text


@contextmanager
def _naming_changes(places: Mapping[str, str], config: Any, table: Path) -> Iterator[None]:
    """Let errors in what the command line has set begin with the option.

    Where the cost table of a refused budget was measured, the error ends with how to take it again.

    Args:
        places: what to call each setting that the command line changes.
        config: the settings.
        table: where the run leaves its cost table.
    """
    from nni_haloc.inputs.config import naming_places

    try:
        with naming_places(places):
            yield
    except InfeasibleBudget as error:
        measured = error.costs is not None and "runtime" in error.costs.identity
        if measured and error.first and config.cost.table is None and table.is_file():
            error = error.kept(str(table))
        keys = [key for key in ("budget.fraction", "budget.absolute", "budget") if key in places]
        raise error.where(places[keys[0]]) if keys and error.first else error from None


def _run(
    run_file: Path,
    options: Mapping[str, Any],
    out: Path,
    assignments: list[str] | None,
    scale: float | None,
    resume: bool,
    json_: bool,
) -> None:
    given = {key: value for key, value in options.items() if value is not None}
    config, changes = _settings(run_file, assignments, scale, given)
    from nni_haloc.cli.summary import print_summary
    from nni_haloc.runs.folder import RunFolder
    from nni_haloc.runs.job import logged
    from nni_haloc.runs.run import run
    from nni_haloc.utils.processes import is_first

    folder = RunFolder(out)
    places = _places(assignments, changes)
    with logged(folder), redirect_stdout(sys.stderr), _naming_changes(places, config, folder.costs):
        run(config, out, parameters=changes, resume=resume)
    if is_first():
        stages = folder.metrics()
        if json_:
            print_json({"folder": str(out), "stages": stages})
        else:
            print_summary(out, stages, code_of(config, run_file))


def code_of(config: Any, run_file: Path) -> str:
    """Return the option that later commands need to call a network's factory, or nothing."""
    from nni_haloc.inputs.models import is_factory

    return f" --code {run_file.parent}" if is_factory(config.model.name) else ""


def _places(assignments: Iterable[str] | None, changes: Iterable[str]) -> dict[str, str]:
    """Return what to call each setting that the command line changes."""
    options = {"rule": "--rule", "budget.fraction": "--budget", "plan": "--plan"}
    return places_of(assignments, changes, {**options, "scale": "--scale"})


def _settings(
    run_file: Path,
    assignments: list[str] | None,
    scale: float | None,
    options: Mapping[str, Any] = {},
    *,
    training: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Read a run's file; return its settings and what the command line changes in them."""
    from nni_haloc.experiments.check import refuse_experiment
    from nni_haloc.inputs.config import load_config
    from nni_haloc.inputs.models import add_code, is_factory

    changes = dict(assignment(text) for text in assignments or [])
    changes |= {**options, **({} if scale is None else {"scale": scale})}
    refuse_experiment(run_file)
    places = _places(assignments, changes)
    config = load_config(run_file, changes, training=training, places=places)
    if is_factory(config.model.name):  # it may lie beside the file
        add_code(run_file.parent)
    return config, changes
