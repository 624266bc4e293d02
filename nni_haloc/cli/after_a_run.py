"""Commands that take a finished run: prune, quantize, export, bench, report."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from nni_haloc.cli.options import (
    AFTER,
    Code,
    Folder,
    Json,
    Resume,
    StageFolder,
    assignment,
    comma_separated,
    places_of,
    print_json,
    some_of,
    trust,
)
from nni_haloc.inputs.registries import PRUNERS, QUANTIZERS
from nni_haloc.utils.errors import as_one_line
from nni_haloc.utils.printing import print_table

after = typer.Typer()

StageChanges = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting, such as prune.lr=0.01; repeatable."
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(metavar="N", help="Epochs of the training that follows (default: as in the run)."),
]


@after.command("prune", rich_help_panel=AFTER)
def prune_command(
    folder: StageFolder,
    pruner: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"{', '.join(PRUNERS.own())} (default: as in the run)."),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the channels to remove, above 0 and below 1 (default: as in the run).",
        ),
    ] = None,
    epochs: Epochs = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the results (default: FOLDER/pruned)."),
    ] = None,
    set_: StageChanges = None,
    code: Code = None,
    resume: Resume = False,
) -> None:
    """Remove channels with a pruner of NNI's, and fine-tune.

    The network is the one of FOLDER: the fine-tuned one of a run, or a stage's.
    """
    options = {"pruner": pruner, "sparsity": sparsity, "epochs": epochs}
    _stage("prune", folder, options, out, set_, code, resume)


@after.command("quantize", rich_help_panel=AFTER)
def quantize_command(
    folder: StageFolder,
    quantizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help=f"{', '.join(QUANTIZERS.own())} (default: as in the run)."
        ),
    ] = None,
    epochs: Epochs = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the results (default: FOLDER/quantized)."),
    ] = None,
    set_: StageChanges = None,
    code: Code = None,
    resume: Resume = False,
) -> None:
    """Quantize to 8 bits: simulated by NNI, and as an ONNX file."""
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
    """Run one more stage on a finished run, and print its figures."""
    settings = {f"{stage}.{key}": value for key, value in options.items() if value is not None}
    names = {f"{stage}.{key}": f"--{key}" for key in options}
    settings |= dict(map(assignment, changes or []))
    places = places_of(changes, settings, names)
    factories = trust(code, folder)
    from nni_haloc.runs.finished import Finished, apply_stage, stage_folder
    from nni_haloc.runs.folder import RunFolder
    from nni_haloc.runs.job import logged

    Finished(folder, factories=factories)  # raises before a folder is made
    target = stage_folder(RunFolder(folder), stage, out)
    with logged(RunFolder(out or folder), target):
        apply_stage(folder, stage, settings, out, factories=factories, resume=resume, places=places)
    from nni_haloc.cli.summary import print_networks

    later = {"quantize"} if stage == "prune" else set()
    others = {k: v for k, v in RunFolder(folder).metrics().items() if k not in later}
    print_networks({**others, **target.metrics()})
    typer.echo(f"results: {target}")


@after.command("export", rich_help_panel=AFTER)
def export_command(
    folder: StageFolder,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMATS",
            help="Formats: some of onnx, program, safetensors, int8, openvino, openvino-int8, "
            "executorch, executorch-int8.",
        ),
    ] = "onnx,program,safetensors,int8",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the files (default: FOLDER/export)."),
    ] = None,
    code: Code = None,
) -> None:
    """Write the network for other runtimes, each file checked.

    The table that it prints says what was checked of each file.
    """
    factories = trust(code, folder)
    from nni_haloc.results.export import FORMATS, export

    formats = some_of("--format", format_, list(FORMATS))
    rows = [
        (name, file, f"{file.stat().st_size:,}", fact)
        for name, file, fact in export(folder, formats, out, factories=factories)
    ]
    columns = ("format", "file", "bytes", "checked")
    print_table(str(folder), columns, rows, text={"format", "file", "checked"})


@after.command("bench", rich_help_panel=AFTER)
def bench_command(
    folder: Folder,
    batch: Annotated[
        str | None,
        typer.Option(metavar="SIZES", help="Batch sizes, such as 1,128 (default: as in the run)."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Processor threads (default: as in the run).")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Images of the accuracies, val or test (default: as in the run)."
        ),
    ] = None,
    runtimes: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Runtimes, such as torch,onnxruntime,openvino (default: those installed).",
        ),
    ] = None,
    data: Annotated[
        bool,
        typer.Option(
            "--data/--no-data", metavar="", help="Read images: accuracies and int8 need them."
        ),
    ] = True,
    code: Code = None,
    json_: Json = False,
) -> None:
    """Time the original and all stages in every runtime."""
    factories = trust(code, folder)
    sizes = None if batch is None else comma_separated("--batch", batch, int, "numbers")
    names = None if runtimes is None else comma_separated("--runtimes", runtimes, str, "names")
    from nni_haloc.inputs.config import naming_places
    from nni_haloc.results.bench import bench, print_bench

    options = {"batch sizes": "--batch", "threads": "--threads"}
    options |= {"runtimes": "--runtimes", "split": "--split"}
    # standard output is for the result
    with redirect_stdout(sys.stderr), naming_places(options):
        content = bench(
            folder,
            sizes,
            threads,
            split if data else None,
            runtimes=names,
            data=data,
            factories=factories,
        )
    if json_:
        print_json(content)
    else:
        print_bench(f"{folder}: median latency, all networks timed in turn", content)


@after.command("report", rich_help_panel=AFTER)
def report_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Folder of a run, a search or a trial.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page (default: FOLDER/report.html).")
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Write the page anew whenever the run has got further, until it ends."
        ),
    ] = False,
) -> None:
    """Write one HTML page: figures, ranks, curves, settings.

    The page loads nothing from elsewhere and runs no scripts. It has the figures
    of each stage, the table of haloc bench, the rank and the remaining cost of
    every layer, the curves of the search and the trainings, the settings, the
    commands that repeat the run, and the versions that it was made with. What the
    folder does not have is left out. The page of a run that is still under way
    says how far it is; with --watch a browser loads it again by itself.
    """
    from nni_haloc.results.watched import watch_run, write_page

    def started(page: Path) -> None:
        typer.echo(f"{page}: open it in a browser; it changes until the run ends", err=True)

    with as_one_line():
        out = watch_run(folder, out, started) if watch else write_page(folder, out)
    typer.echo(out)
