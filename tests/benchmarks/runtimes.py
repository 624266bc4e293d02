"""Time ResNet-18 and its networks of 588 M MACs in every runtime at hand.

    python tests/benchmarks/runtimes.py                           # the original and uniform ranks
    python tests/benchmarks/runtimes.py --plans openvino,torch    # and each one's fastest plan
    python tests/benchmarks/runtimes.py --report                  # only the table

It appends rows to docs/raw/runtimes.jsonl and writes the table of docs/benchmarks.md. All passes
of all runtimes are timed in alternation, on one thread, for one image of 224 x 224. Weights are
random, which changes no time. The fastest plan is that of the lowest latency at the MACs, by a cost
table that is measured in the runtime.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import torch
import typer
from benchmarks.latency_plans import fastest, uniform

from nni_haloc.costs.analytic import mac_table
from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.device.measure import measure, time_together
from nni_haloc.costs.device.measured_file import spread
from nni_haloc.costs.device.runtime import Run, Runtime, Timing, make_runtime
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.registries import RUNTIMES
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.results.bench import Clocks
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.progress import progress

DOCS = Path(__file__).parents[2] / "docs"
PACKAGES = ("torch", "onnxruntime", "openvino", "nncf", "executorch")
SHAPE = (1, 3, 224, 224)
Row = Mapping[str, Any]


def main(
    names: Annotated[str, typer.Option("--runtimes", help="names (default: those here)")] = "",
    plans: Annotated[str, typer.Option(help="runtimes whose fastest plan is timed, too")] = "",
    work: Annotated[Path, typer.Option(help="folder for the tables")] = Path("runtimes"),
    rounds: Annotated[int, typer.Option(help="of five passes or more of each network")] = 5,
    out: Annotated[Path, typer.Option(help="JSON lines")] = DOCS / "raw" / "runtimes.jsonl",
    report: Annotated[bool, typer.Option("--report", help="measure nothing")] = False,
) -> None:
    """Append the rows of one alternating run to the raw file, and write the table of all."""
    if not report:
        own = [name for name in plans.split(",") if name]
        rows = timed(names.split(",") if names else RUNTIMES.own(), own, work, rounds)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    text = table([json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()])
    print(text)
    if out.parent == DOCS / "raw":
        page = DOCS / "benchmarks.md"
        pattern = re.compile(r"(<!-- runtimes -->\n).*?(<!-- end of runtimes -->)", re.DOTALL)
        content = page.read_text(encoding="utf-8")
        page.write_text(pattern.sub(lambda m: f"{m[1]}{text}\n{m[2]}", content), encoding="utf-8")


def timed(names: Sequence[str], own: Sequence[str], work: Path, rounds: int) -> list[Row]:
    """Return a row for each network, runtime and precision, all timed in alternation."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, example = build_model("torchvision:resnet18").eval(), torch.randn(2, *SHAPE[1:])
    allowed = AllowedRanks(step=8, kinds=("conv",), exclude=("conv1",))
    images, same = torch.randn(16, *SHAPE[1:]), uniform(model, example[:1], allowed)
    common = {"original": RankPlan({}), "uniform": same}
    made_of_common = {"original": model, "uniform": restructure(model, same).eval()}
    rows: list[dict[str, Any]] = []
    runs: dict[str, Run] = {}
    clocks: dict[int, Runtime] = {}
    with TemporaryDirectory() as folder:
        for name in names:
            plans, networks = dict(common), dict(made_of_common)
            try:
                runtime = make_runtime(name, threads=1)
            except ValueError as error:
                print(f"without {name}: {error}")
                continue
            if name in own:
                plans["fastest"] = fastest_in(runtime, name, model, allowed, work)
                networks["fastest"] = restructure(model, plans["fastest"]).eval()
            for network, made in networks.items():
                stem = Path(folder) / (f"{network}-{name}" if network == "fastest" else network)
                for precision in runtime.precisions:
                    start = time.perf_counter()
                    calibration = images if precision == "int8" else None
                    run = runtime.deploy(made, example, stem, calibration).ready(SHAPE)
                    runs[str(len(rows))], clocks[id(run)] = run, runtime
                    rows.append(
                        {
                            "network": network,
                            "name": name,
                            "precision": precision,
                            "macs": count_macs(made, example[:1]),
                            "made_s": round(time.perf_counter() - start, 1),
                            "plan": plans[network].names,
                            "identity": runtime.identity(),
                        }
                    )
                    print(network, name, precision, flush=True)
        with make_runtime("torch", threads=1).pinned():
            found = [time_together(runs, cast(Runtime, Clocks(clocks)), 0.2) for _ in range(rounds)]
    packages = installed()
    for i, row in enumerate(rows):
        times = [1e3 * each[str(i)] for each in found]
        row |= {"latency_ms": median(times), "spread_ms": spread(times), "rounds": rounds}
        row |= {"date": time.strftime("%Y-%m-%d"), "packages": packages}
    return rows


def fastest_in(
    runtime: Runtime, name: str, model: torch.nn.Module, allowed: AllowedRanks, work: Path
) -> RankPlan:
    """Return the plan of the lowest latency by the runtime's own table, which ``work`` keeps."""
    work.mkdir(parents=True, exist_ok=True)
    example, file = torch.randn(SHAPE), work / f"{name}.json"
    spec = specify(model, example, allowed, "resnet18", program=False)
    timing = Timing(rounds=3)
    measure(runtime.prepare(spec, model), runtime, file, timing, progress(f"{name}: measured"))
    return fastest(CostTable.load(file), mac_table(model, example, allowed))


def installed() -> dict[str, str]:
    """Return the versions of the packages that were timed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(rows: Sequence[Row]) -> str:
    """Return the newest rows as a Markdown table: a line for each runtime and precision."""
    newest = {(row["name"], row["precision"], row["network"]): row for row in rows}
    columns = ("runtime", "precision", "original, ms", "uniform ranks, ms", "times as fast")
    columns += ("fastest plan, ms", "under uniform, %")
    lines = [columns, ("---",) * len(columns)]
    for name, precision in dict.fromkeys((name, precision) for name, precision, _ in newest):
        original, same, own = (
            newest.get((name, precision, network)) for network in ("original", "uniform", "fastest")
        )
        if original is None or same is None:
            continue
        before, after = original["latency_ms"], same["latency_ms"]
        plan = ("", "")
        if own is not None:
            plan = (ms(own), f"{100 * (1 - own['latency_ms'] / after):.0f}")
        told = original["identity"]["runtime"].partition("+")[0]
        lines.append((told, precision, ms(original), ms(same), f"{before / after:.2f}", *plan))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ms(row: Row) -> str:
    """Write a row's latency and its spread, with more digits below 10 ms."""
    digits = 1 if row["latency_ms"] >= 10 else 2
    return f"{row['latency_ms']:.{digits}f} ± {row['spread_ms'] / 2:.{digits}f}"


if __name__ == "__main__":
    typer.run(main)
