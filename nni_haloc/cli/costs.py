"""Commands about cost tables: measure, predict, spec, steps."""

from __future__ import annotations

import argparse
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nni_haloc.cli.options import COSTS, Batch, Model, RankSpace, Shape
from nni_haloc.inputs.registries import PREDICTORS
from nni_haloc.utils.errors import SettingsError, as_one_line
from nni_haloc.utils.printing import percent, print_table
from nni_haloc.utils.progress import progress

costs = typer.Typer()

Table = Annotated[Path, typer.Option(metavar="FILE", help="The cost table.")]


@costs.command(
    "measure",
    rich_help_panel=COSTS,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def measure_command(context: typer.Context) -> None:
    """Measure each layer's cost at each rank on this device."""
    from nni_haloc.costs.measure import measure_main, measure_parser

    parser = measure_parser()
    if {"-h", "--help"} & set(context.args):
        as_app(parser)(["--help"], prog_name=parser.prog, standalone_mode=False)
    else:
        with as_one_line():
            measure_main(context.args)


def as_app(parser: argparse.ArgumentParser) -> typer.Typer:
    """Return a command whose help is an argparse parser's, in the style of the other commands.

    Devices that measure have no typer, so argparse declares and reads the options of `measure`.
    """

    def command(**values: Any) -> None:
        pass

    command.__signature__ = Signature(  # type: ignore[attr-defined]
        [_parameter(action) for action in parser._actions if action.dest != "help"]
    )
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(help=parser.description)(command)
    return app


def _parameter(action: argparse.Action) -> Parameter:
    """Turn an argparse option into a parameter that typer shows."""
    metavar = "" if action.nargs == 0 else str(action.metavar)
    metavar += "..." if action.nargs == "+" else ""
    if action.nargs == 0:
        kind: Any = bool
    elif action.choices:
        kind = Literal[tuple(action.choices)]
    else:
        kind = action.type or str
    help_ = (action.help or "").replace("%%", "%")
    option = typer.Option(*action.option_strings, help=help_, metavar=metavar)
    return Parameter(
        action.dest,
        Parameter.KEYWORD_ONLY,
        default=action.default,
        annotation=Annotated[kind if action.default is not None else kind | None, option],
    )


def _predictors_with(start: str) -> list[str]:
    """List the predictors that start with a text, for shell completion."""
    names = dict.fromkeys(["analytic", "eyeriss", *PREDICTORS])
    return [name for name in names if name.startswith(start)]


@costs.command("predict", rich_help_panel=COSTS)
def predict_command(
    predictor: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="analytic (counts), eyeriss (an array's cycles or energy), roofline (latency), "
            "or a predictor that another package adds.",
            show_default=False,
            autocompletion=_predictors_with,
        ),
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Analytic: macs (default), params, activation_bytes. "
            "Eyeriss: cycles (default), energy_pj. Roofline: latency_ms.",
        ),
    ] = None,
    model: Model = None,
    input_: Shape = None,
    batch: Batch = 1,
    rank_space: RankSpace = None,
    out: Table = Path("costs.json"),
    flops: Annotated[
        float | None,
        typer.Option(
            metavar="RATE", help="Roofline: operations a second (default: measured here)."
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Roofline: bytes a second (default: measured here)."),
    ] = None,
) -> None:
    """Count or model each layer's cost at each rank."""
    with as_one_line():
        from nni_haloc.costs.device.measured_file import refuse_to_overwrite
        from nni_haloc.costs.measure import model_of, predicted_table

        named = model_of(model, input_, batch, rank_space)
        table = predicted_table(*named, predictor, metric, flops=flops, bandwidth=bandwidth)
        refuse_to_overwrite(out)
        table.save(out)
    typer.echo(f"{out}: the network costs {table.original:.6g} {table.metric}")


@costs.command("spec", rich_help_panel=COSTS)
def spec_command(
    model: Model = None,
    input_: Shape = None,
    batch: Batch = 1,
    rank_space: RankSpace = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The specification.")] = Path(
        "spec.json"
    ),
    onnx: Annotated[
        bool,
        typer.Option("--onnx", metavar="", help="Add ONNX models, for devices with ONNX Runtime."),
    ] = False,
    models: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also write model files and run.sh, which times them by the runtime's own "
            "benchmark program: for phones and boards without Python.",
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --models: openvino (benchmark_app), executorch (executor_runner), "
            "tensorrt (trtexec), or one that another package adds.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="With --models: processor threads (default: the program's)."
        ),
    ] = None,
) -> None:
    """List what another device has to measure.

    There, haloc measure --spec reads the list; it needs no NNI and no Lightning. A device without
    Python gets --models, and haloc measure --from-log reads what was printed there.
    """
    with as_one_line():
        from nni_haloc.costs.device.benchmark_logs import LOG, SCRIPT, write_models
        from nni_haloc.costs.measure import model_of, specification

        if (models is None) != (runtime is None) or (models is None and threads is not None):
            raise SettingsError(
                "--models, --runtime, --threads: expected a folder and a runtime, or none of them"
            )
        named = model_of(model, input_, batch, rank_space)
        spec = specification(*named, str(model), onnx=onnx)
        if models is not None and runtime is not None:
            count = write_models(spec, named[0], models, runtime, threads, progress("written"))
        spec.save(out)
    typer.echo(f"{out}: {len(spec.layers)} layers, {len(spec.entries)} entries to measure")
    if models is not None:
        typer.echo(
            f"{models}: {count} models; copy the folder to the device, run sh {SCRIPT} there, "
            f"fetch {LOG}, then haloc measure --spec {out} --from-log {LOG}"
        )


@costs.command("steps", rich_help_panel=COSTS)
def steps_command(
    table: Annotated[
        Path,
        typer.Argument(
            metavar="COSTS.json",
            help="A cost table of a rank space with step: 1.",
            show_default=False,
        ),
    ],
) -> None:
    """Show the ranks at which a device's cost jumps.

    With rank_space.step: auto, a run chooses among the ranks just below the jumps.
    """
    from nni_haloc.costs.stairs import rank_stairs
    from nni_haloc.costs.table import CostTable

    if not table.exists():
        raise SettingsError(f"{table}: no such file")
    with as_one_line():
        stairs = rank_stairs(CostTable.load(table))
    if not stairs:
        raise SettingsError(
            f"{table}: no layer has eight equal ranks or more; "
            "measure with step: 1 in the rank space"
        )
    rows = []
    for layer, stair in stairs.items():
        shares = (percent(stair.rise, 0), percent(stair.explained, 0))
        rows.append((layer, *((stair.width, *shares) if stair.width > 1 else ("no steps",))))
    columns = ("layer", "ranks cost more above multiples of", "by, of the dense layer", "explained")
    print_table(f"{table}: rank_space.step: auto uses these", columns, rows, text={"layer"})
