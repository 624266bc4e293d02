"""Compress VGG-16 of half width to half of its latency in each runtime, without labels.

    python tests/benchmarks/runtime_budgets.py FOLDER
    python tests/benchmarks/runtime_budgets.py FOLDER --report       # only the table

FOLDER is that of ``minutes.py``: weights and CIFAR-10. For each runtime it is one call of
`compress_model` with ``epochs=0``: its table is measured, ranks are chosen by it, and blocks are
trained on 512 training images. The accuracy is of the 5,000 validation images. Batch 1, one thread.

Rows are appended to docs/raw/runtime_budgets.jsonl, and the tables of README and docs/benchmarks.md
are written; runtimes that have a row for the budget are left out.
"""

import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmarks.minutes import Data
from benchmarks.runtimes import DOCS, installed
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc import compress_model

RAW = DOCS / "raw" / "runtime_budgets.jsonl"
PAGES = DOCS.parent / "README.md", DOCS / "benchmarks.md"
RUNTIMES = "torch,onnxruntime,openvino,executorch"


def row_of(runtime: str, data: Data, budget: float) -> dict[str, Any]:
    """Compress the network for a runtime, and return its figures beside the original's."""
    started = time.monotonic()
    result = compress_model(
        data.model.to(memory_format=torch.contiguous_format),
        DataLoader(TensorDataset(data.images.contiguous()), 64),
        DataLoader(TensorDataset(data.shown.contiguous(), data.truth), 100),
        budget=budget,
        epochs=0,
        allowed=data.allowed,
        runtime=runtime,
        threads=1,
        check="warn",
        verbose=True,
    )
    return {
        "runtime": runtime,
        "budget": budget,
        "original": dict(result.metrics["original"]),
        "compressed": dict(result.metrics["compressed"]),
        "timing": dict(result.timing),
        "timed": result.plan.chosen_by.get("timed"),
        "ranks": result.plan.names,
        "seconds": round(time.monotonic() - started),
        "packages": installed(),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a line for each runtime and budget."""
    columns = ("runtime", "budget, %", "original, ms", "compressed, ms", "of the original, %")
    columns += ("MACs, %", "top-1, %")
    lines = [columns, ("---",) * len(columns)]
    for row in rows:
        before, after = row["original"], row["compressed"]
        name = f"{row['runtime']} {row['packages'].get(row['runtime'], '')}".strip()
        cells = [f"{100 * row['budget']:.0f}", f"{before['latency_ms']:.2f}"]
        cells += [f"{after['latency_ms']:.2f}", f"{100 * after['measured_share']:.0f}"]
        cells += [f"{100 * after['macs'] / before['macs']:.0f}", f"{100 * after['top1']:.1f}"]
        lines.append((name, *cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(
    data: Annotated[Path, typer.Argument(help="folder of images and weights")] = Path(),
    names: Annotated[str, typer.Option("--runtimes", help="names")] = RUNTIMES,
    budget: Annotated[float, typer.Option(help="share of the latency")] = 0.5,
    out: Annotated[Path, typer.Option(help="JSON lines, appended to")] = RAW,
    report: Annotated[bool, typer.Option("--report", help="measure nothing")] = False,
) -> None:
    """Append the rows of the runtimes that have none yet, and write the table of all."""
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for name in [] if report else names.split(","):
        if all((row["runtime"], row["budget"]) != (name, budget) for row in rows):
            rows.append(row_of(name, Data("vgg16", data), budget))
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(text := table(rows))
    if out == RAW:
        pattern = re.compile(
            r"(<!-- runtime budgets -->\n).*?(<!-- end of runtime budgets -->)", re.DOTALL
        )
        for page in PAGES:
            content = page.read_text(encoding="utf-8")
            written = pattern.sub(lambda m: f"{m[1]}{text}\n{m[2]}", content)
            page.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
