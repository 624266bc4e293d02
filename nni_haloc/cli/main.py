"""The command line, ``haloc``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import typer

from nni_haloc.cli.finished import assignment, finished
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.schema import Rule
from nni_haloc.utils.errors import HalocError, SettingsError, reason_of
from nni_haloc.utils.interruption import stoppable
from nni_haloc.utils.printing import percent, print_table

app = typer.Typer(
    help="Hardware-aware low-rank compression of convolutional networks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(finished)

RULES = get_args(Rule)[1:]
"""All but the search."""
RunFile = Annotated[Path, typer.Argument(help="settings of the run (YAML)")]
Out = Annotated[Path, typer.Option(help="folder for the results")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change a setting, e.g. budget.fraction=0.3"),
]
Scale = Annotated[
    float | None,
    typer.Option(
        help="share of the work: its root is taken of all epochs and of the images, for a first try"
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="go on from the state that an interrupted run of these settings left there"
    ),
]


@app.command("run")
def run_command(
    run_file: RunFile,
    out: Out = Path("haloc-run"),
    set_: Changes = None,
    scale: Scale = None,
    resume: Resume = False,
) -> None:
    """Search, compress and fine-tune without an NNI experiment."""
    config, changes = _start(run_file, set_, scale)
    from nni_haloc.runs.job import job_in
    from nni_haloc.runs.run import run

    with job_in(out):
        run(config, out, parameters=changes, resume=resume)


@app.command("train")
def train_command(
    run_file: RunFile, set_: Changes = None, scale: Scale = None, resume: Resume = False
) -> None:
    """Train the original network where there is none yet, and write the file of weights that the settings name."""
    config, _ = _start(run_file, set_, scale, training=True)
    from nni_haloc.runs.job import job_in
    from nni_haloc.runs.original import train_original, training_folder

    with job_in(training_folder(config)):
        train_original(config, resume=resume)


@app.command("baseline")
def baseline_command(
    run_file: RunFile,
    rule: Annotated[str, typer.Option(help=f"how ranks are chosen: {', '.join(RULES)}")],
    budget: Annotated[
        float | None,
        typer.Option(help="fraction of the original's cost (default: the file's budget)"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for the results (default: haloc-baseline-RULE)")
    ] = None,
    set_: Changes = None,
    scale: Scale = None,
    resume: Resume = False,
) -> None:
    """As `run`, with ranks by a rule of thumb or a strategy of NNI's in the place of the search: something to compare with."""
    if rule not in RULES:
        raise SettingsError(f"--rule: expected one of {', '.join(RULES)}, found {rule!r}")
    fraction = [] if budget is None else [f"budget.fraction={budget}"]
    run_command(
        run_file,
        out or Path(f"haloc-baseline-{rule}"),
        [*(set_ or []), f"rule={rule}", *fraction],
        scale,
        resume,
    )


@app.command("search")
def search_command(
    run_file: RunFile,
    out: Out = Path("haloc-run"),
    set_: Changes = None,
    scale: Scale = None,
    resume: Resume = False,
) -> None:
    """Search alone; `haloc run --resume` with the same settings fine-tunes what it found."""
    config, _ = _start(run_file, set_, scale)
    if config.rule != "search":
        raise SettingsError(
            f"rule: `haloc search` is for 'search', found {config.rule!r}: `haloc baseline --rule {config.rule}`"
        )
    from nni_haloc.runs.job import Job, job_in
    from nni_haloc.runs.run import search
    from nni_haloc.utils.log import logger

    with job_in(out):
        job = Job(config, out)
        logger.info(
            "original: %.2f %% top-1 (validation)",
            100 * job.accuracy(job.model, job.loader("val"))[0],
        )
        search(job, resume=resume)


def _start(
    run_file: Path, assignments: list[str] | None, scale: float | None, *, training: bool = False
) -> tuple[Any, dict[str, Any]]:
    changes = dict(assignment(text) for text in assignments or [])
    changes |= {} if scale is None else {"scale": scale}
    config = load_config(run_file, changes, training=training)
    sys.path.insert(
        0, str(run_file.parent.absolute())
    )  # for a model's factory beside the file, as in a trial
    return config, changes


@app.command("throughput")
def throughput_command(
    run_file: RunFile,
    on: Annotated[
        str | None, typer.Option(help="of torch, onnxruntime, eyeriss, cuda (default: all at hand)")
    ] = None,
    out: Out = Path("haloc-throughput"),
    set_: Changes = None,
    scale: Scale = None,
    resume: Resume = False,
) -> None:
    """Compress once for each device at hand, and print accuracy, MACs and images a second of each (the paper's Table 3)."""
    config, _ = _start(run_file, set_, scale)
    from nni_haloc.runs.devices import DEVICES, at_hand, print_throughput, throughput
    from nni_haloc.runs.job import job_in

    devices = list(dict.fromkeys(on.split(","))) if on is not None else at_hand()
    if unknown := [device for device in devices if device not in DEVICES]:
        raise SettingsError(f"--on: expected some of {', '.join(DEVICES)}, found {unknown[0]!r}")
    with job_in(out):
        print_throughput(
            f"{out}: a plan for each device", throughput(config, out, devices, resume=resume)
        )


@app.command("check")
def check_command(
    experiment_file: Annotated[Path, typer.Argument(help="an NNI experiment's file (haloc.yml)")],
) -> None:
    """Check an experiment's file and the settings of its trials, and make NNI's manager ready to start.

    Catches what NNI accepts in silence or reports misleadingly. Reading the manager's files once also spares the first `nnictl create` on a
    machine its time-out: nnictl gives the manager about three seconds.
    """
    from nni_haloc.cli.experiment import check_experiment, warm_up_manager

    trials = check_experiment(experiment_file)
    warm_up_manager()
    typer.echo(f"{experiment_file}: ready ({trials})")


@app.command("results")
def results_command(
    experiment: Annotated[str, typer.Argument(help="id of an NNI experiment, running or stopped")],
    folder: Annotated[Path, typer.Option(help="where NNI keeps its experiments")] = Path.home()
    / "nni-experiments",
    folders: Annotated[
        bool,
        typer.Option(
            "--folders", help="print each trial's folder, or the command that fetches it, instead"
        ),
    ] = False,
) -> None:
    """Print an experiment's trials: the parameters that each was given, and what it reported for them."""
    from nni_haloc.cli.experiment import trial_folders, trial_results

    if folders:
        return typer.echo("\n".join(trial_folders(folder, experiment).values()))

    rows = trial_results(folder, experiment)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print_table(
        f"experiment {experiment}",
        columns,
        [[row.get(c) for c in columns] for row in rows],
        text={"trial", "status"},
    )


@app.command("steps")
def steps_command(
    costs: Annotated[
        Path, typer.Argument(help="a cost table at many ranks, of a rank space with step: 1")
    ],
) -> None:
    """Print which ranks a device rewards: the width of the stairs that each layer's cost climbs."""
    from nni_haloc.costs.stairs import rank_stairs
    from nni_haloc.costs.table import CostTable

    try:
        stairs = rank_stairs(CostTable.load(costs))
    except (OSError, ValueError) as error:
        raise SettingsError(str(error)) from None
    if not stairs:
        raise SettingsError(
            f"{costs}: no layer has eight equal ranks or more; measure with step: 1 in the rank space"
        )
    rows = [
        (
            layer,
            *(
                (found.width, percent(found.rise, 0), percent(found.explained, 0))
                if found.width > 1
                else ("no stairs",)
            ),
        )
        for layer, found in stairs.items()
    ]
    columns = ("layer", "ranks cost more above multiples of", "by, of the dense layer", "explained")
    print_table(f"{costs}: rank_space.step: auto uses these", columns, rows, text={"layer"})


_FORWARDED = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def _forward(name: str, module: str, text: str) -> None:
    """A command whose options stand where a device without typer finds them."""

    def command(context: typer.Context) -> None:
        try:
            getattr(import_module(f"nni_haloc.{module}"), f"{name}_main")(context.args)
        except ValueError as error:
            raise SettingsError(str(error)) from None
        except ModuleNotFoundError as error:
            raise SettingsError(
                f"{name}: needs the package {error.name}, which is not installed"
            ) from None

    app.command(name, context_settings=_FORWARDED, help=f"{text} (--help: the options).")(command)


_forward(
    "measure", "costs.measure", "Measure what every candidate of every layer costs on this device"
)
_forward("predict", "costs.measure", "Count or model what every candidate of every layer costs")
_forward("heatmap", "cli.heatmap", "Draw what every pair of ranks of one layer costs")
_forward(
    "plot",
    "cli.plot",
    "Draw a search: loss, parameters, ranks; or a layer's error over the difference of its ranks",
)
_forward("report", "cli.report", "Write a finished run's report, one HTML page")
_forward(
    "table",
    "cli.table",
    "Count a model: layers, rank space, multiply-accumulates and parameters, before and after a plan",
)
_forward(
    "spec", "costs.measure", "Write what another device has to measure, without model or weights"
)


def main() -> None:
    """Entry point: an error that the user can mend is one line, with exit status 2; so is a signal, with the shell's status for it."""
    try:
        with stoppable("haloc"):
            app(standalone_mode=False)  # which would print a usage error in several lines
    except HalocError as error:
        _leave(str(error))
    except (
        OSError
    ) as error:  # a full disk, a folder that is read-only: what was there before is still there
        _leave(reason_of(error))
    except Exception as error:
        if not hasattr(
            error, "format_message"
        ):  # click's errors; where click is, depends on typer's version
            raise
        _leave(error.format_message())


def _leave(message: str) -> NoReturn:
    print(
        f"haloc: {message}" if "\n" not in message else message, file=sys.stderr
    )  # the help, where there are no arguments
    sys.exit(2)
