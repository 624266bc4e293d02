"""The commands of ``haloc`` that take a finished run's folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from nni_haloc.inputs.yaml_files import parse_yaml
from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.printing import percent, print_table

finished = typer.Typer()
Code = Annotated[
    Path | None, typer.Option(help="folder of your model's factory, where the settings name one")
]


@finished.command("front")
def front_command(
    folder: Annotated[
        Path,
        typer.Argument(help="folder of a finished search (haloc search, haloc run, or a trial's)"),
    ],
    budgets: Annotated[
        str, typer.Option(help="fractions of the original's cost, e.g. 0.6,0.5,0.4")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="folder for front.json, front.png and the networks (default: FOLDER/front)"
        ),
    ] = None,
    code: Code = None,
) -> None:
    """Plan for many budgets from one finished search: a table and a plot of accuracy against cost, without searching again."""
    try:
        fractions = [float(text) for text in budgets.split(",")]
    except ValueError:
        raise SettingsError(
            f"--budgets: expected fractions separated by commas, found {budgets!r}"
        ) from None
    factories = _trusted(code)
    from nni_haloc.results.front import front

    found = front(folder, fractions, out, factories=factories)
    original = found["original"]
    rows: list[Any] = [
        ("original", original["cost"], percent(1), None, percent(original["top1"], 2), None)
    ]
    for point in found["points"]:
        shares = (percent(point["cost_fraction"] / whole) for whole in (1, point["fraction"]))
        rows.append(
            (
                point["fraction"],
                point["cost"],
                *shares,
                percent(point["top1"], 2),
                (out or folder / "front") / point["folder"],
            )
        )
    rows += [(point["fraction"], *[None] * 4, point["reason"]) for point in found["infeasible"]]
    columns = ("budget", found["metric"], "of the original", "of the budget", "top-1", "network")
    print_table(
        f"{folder}: top-1 on validation images, not fine-tuned", columns, rows, text={"network"}
    )


@finished.command("export")
def export_command(
    folder: Annotated[
        Path, typer.Argument(help="folder of a finished run, or of one of its stages")
    ],
    format_: Annotated[
        str, typer.Option("--format", help="of onnx, program, safetensors, int8")
    ] = "onnx,program,safetensors,int8",
    out: Annotated[
        Path | None, typer.Option(help="folder for the files (default: FOLDER/export)")
    ] = None,
    code: Code = None,
) -> None:
    """Write the compressed network for other runtimes, each file checked: ONNX, torch's exported program, safetensors, ONNX in int8."""
    factories = _trusted(code)
    from nni_haloc.results.export import FORMATS, export

    formats = list(dict.fromkeys(format_.split(",")))
    if unknown := [name for name in formats if name not in FORMATS]:
        raise SettingsError(
            f"--format: expected some of {', '.join(FORMATS)}, found {unknown[0]!r}"
        )
    rows = [
        (name, file, f"{file.stat().st_size:,}", fact)
        for name, file, fact in export(folder, formats, out, factories=factories)
    ]
    print_table(
        f"{folder}",
        ("format", "file", "bytes", "checked"),
        rows,
        text={"format", "file", "checked"},
    )


@finished.command("bench")
def bench_command(
    folder: Annotated[Path, typer.Argument(help="folder of a finished run")],
    batch: Annotated[
        str | None,
        typer.Option(help="batch sizes, e.g. 1,128 (default: the settings' cost.batch_size)"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="processor threads (default: the settings' cost.threads)")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="images of the accuracies, val or test (default: the settings' data.score)"
        ),
    ] = None,
    data: Annotated[
        bool, typer.Option("--data/--no-data", help="without data neither accuracies nor int8")
    ] = True,
    code: Code = None,
) -> None:
    """Time the original and every stage of a run side by side, in torch and ONNX Runtime, int8 too; leaves bench.json in FOLDER."""
    factories = _trusted(code)
    from nni_haloc.results.bench import bench, print_bench

    try:
        sizes = None if batch is None else [int(text) for text in batch.split(",")]
    except ValueError:
        raise SettingsError(
            f"--batch: expected numbers separated by commas, found {batch!r}"
        ) from None
    found = bench(folder, sizes, threads, split if data else None, data=data, factories=factories)
    print_bench(f"{folder}: passes in alternation", found)


Epochs = Annotated[
    int | None, typer.Option(help="of the training that follows (default: the settings')")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change a setting, e.g. prune.lr=0.01"),
]
StageOf = Annotated[Path, typer.Argument(help="folder of a finished run, or of one of its stages")]
StageResume = Annotated[
    bool,
    typer.Option(
        "--resume", help="go on from the state that an interrupted stage of these settings left"
    ),
]


@finished.command("prune")
def prune_command(
    folder: StageOf,
    pruner: Annotated[str | None, typer.Option(help="of l1, fpgm, taylor")] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="share of the channels to take out, above 0 and below 1")
    ] = None,
    epochs: Epochs = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for the results (default: FOLDER/pruned)")
    ] = None,
    set_: Changes = None,
    code: Code = None,
    resume: StageResume = False,
) -> None:
    """Prune a finished run's network by a pruner of NNI's, take the pruned channels out, and fine-tune it."""
    _stage(
        "prune",
        folder,
        {"pruner": pruner, "sparsity": sparsity, "epochs": epochs},
        out,
        set_,
        code,
        resume,
    )


@finished.command("quantize")
def quantize_command(
    folder: StageOf,
    quantizer: Annotated[str | None, typer.Option(help="of ptq, qat, lsq")] = None,
    epochs: Epochs = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for the results (default: FOLDER/quantized)")
    ] = None,
    set_: Changes = None,
    code: Code = None,
    resume: StageResume = False,
) -> None:
    """Quantize a finished run's network to 8 bits: as a quantizer of NNI's simulates it, and as an ONNX file that runs in int8."""
    _stage("quantize", folder, {"quantizer": quantizer, "epochs": epochs}, out, set_, code, resume)


def _stage(
    stage: str,
    folder: Path,
    options: dict[str, Any],
    out: Path | None,
    changes: list[str] | None,
    code: Path | None,
    resume: bool,
) -> None:
    settings = {
        f"{stage}.{key}": value for key, value in options.items() if value is not None
    } | dict(map(assignment, changes or []))
    factories = _trusted(code)
    from nni_haloc.runs.chain_stages import stage_folder, stage_of
    from nni_haloc.runs.finished import Finished
    from nni_haloc.runs.job import job_in

    Finished(folder, factories=factories)  # before a folder is made
    with job_in(out or folder, stage_folder(folder, stage, out)):
        metrics = stage_of(folder, stage, settings, out, factories=factories, resume=resume)
    print_table(str(out or folder), ("metric", "value"), list(metrics.items()), text={"metric"})


def assignment(text: str) -> tuple[str, Any]:
    """Of ``--set``: the key and the value of ``KEY=VALUE``."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SettingsError(f"--set: expected KEY=VALUE, found {text!r}")
    try:
        return key, parse_yaml(value)
    except yaml.YAMLError:
        raise SettingsError(f"--set {key}: not a YAML value: {value!r}") from None


def _trusted(code: Path | None) -> bool:
    """Whether a model's own factory may be called; it is then found in the folder ``code``."""
    if code is not None:
        sys.path.insert(0, str(code.absolute()))
    return code is not None
