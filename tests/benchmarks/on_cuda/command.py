"""The command: its options, the order of its parts, its end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmarks.on_cuda.bench import Bench, TimeIsUp
from benchmarks.on_cuda.budgets import budgets
from benchmarks.on_cuda.speed import speed
from benchmarks.on_cuda.tables import tables
from benchmarks.on_cuda.tests import tests
from benchmarks.study.long import long
from benchmarks.study.short import short

from nni_haloc.utils.log import log_to
from nni_haloc.utils.placement import working_on
from nni_haloc.utils.quiet import quiet

PARTS: dict[str, Callable[[Bench], None]] = {
    "tests": tests,
    "speed": speed,
    "tables": tables,
    "budgets": budgets,
    "short": short,
    "long": long,
}


def main(
    data: Annotated[Path, typer.Option(help="folder of the images and weights")],
    out: Annotated[Path, typer.Option(help="folder of cuda.jsonl, appended to")],
    minutes: Annotated[float, typer.Option(help="after which the command ends")] = 8.0,
    device: str = "cuda",
    scale: Annotated[float, typer.Option(help="share of the work, for a dry run")] = 1.0,
    part: Annotated[list[str] | None, typer.Option(help=f"some of {', '.join(PARTS)}")] = None,
    jobs: Annotated[int, typer.Option(help="processes that share the device in the studies")] = 6,
    epochs: Annotated[int, typer.Option(help="of training, in ``long``")] = 100,
    work: Annotated[Path, typer.Option(help="folder for what the runs leave")] = Path("/tmp/haloc"),
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    data, work = data.absolute(), work.absolute()
    bench = Bench(
        data, out / "cuda.jsonl", work, device, scale, time.monotonic() + 60 * minutes, jobs, epochs
    )

    def stop(*_: Any) -> None:
        raise TimeIsUp

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        with working_on(device), quiet(), log_to(out / "cuda-log.txt"):
            for name in part or PARTS:
                PARTS[name](bench)
    except TimeIsUp:
        print("the minutes are over; the same command makes the rows that are missing")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    failed = [row for row in bench.rows() if "error" in row]
    print(f"{bench.out}: {len(bench.rows())} rows, {len(failed)} of them with an error")
