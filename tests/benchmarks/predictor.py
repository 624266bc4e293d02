"""Compare the predicted latency of whole networks with the measured one, on an idle machine.

    python tests/benchmarks/predictor.py resnet18 --work FOLDER

Thirty random plans over 15 to 100 % of the MACs and twenty at 40 % are timed in alternation, and
each predictor predicts them. Cost tables and networks are measured in turns, round by round; a run
that was interrupted continues with the round in which it stopped. ``--report`` prints the tables of
all raw results.
"""

import json
import random
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from scipy import stats

from nni_haloc.costs.analytic import mac_table, measure_peaks, roofline_table
from nni_haloc.costs.device.measure import measure, time_together
from nni_haloc.costs.device.runtime import Timing
from nni_haloc.costs.device.spec import draw
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.regression import complete
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.plan.budget import Limit, choose
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.space.names import parse_rank
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.files import write_json
from nni_haloc.utils.progress import progress

RAW = Path(__file__).parents[2] / "docs" / "raw" / "predictor.jsonl"
NETWORKS: dict[str, tuple[str, tuple[int, ...], AllowedRanks]] = {
    "resnet18": (
        "torchvision:resnet18",
        (1, 3, 224, 224),
        AllowedRanks(kinds=("conv",), exclude=("conv1",)),
    ),
    "resnet20": ("resnet20", (128, 3, 32, 32), AllowedRanks(kinds=("conv",), exclude=("conv1",))),
}
SAMPLED = "regression (25 %)"
SPREAD, EQUAL = "15 to 100 % of the MACs", "40 % of the MACs"


def plans(costs: CostTable, seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Draw both sets of plans by a knapsack of random scores that uses 98 % or more of a budget."""
    generator = random.Random(seed)

    def within(fraction: float) -> dict[str, str]:
        scores = {
            layer: {name: generator.random() for name in row} for layer, row in costs.costs.items()
        }
        return choose(scores, [Limit(costs, fraction * costs.original)], 0.98)

    spread = [within(float(fraction)) for fraction in np.linspace(0.15, 0.99, 29)] + [
        dict.fromkeys(costs.costs, "dense")
    ]
    return {SPREAD: spread, EQUAL: [within(0.4) for _ in range(20)]}


def main(
    network: Annotated[str, typer.Argument(help=" or ".join(NETWORKS))] = "resnet18",
    work: Annotated[Path, typer.Option(help="folder for the tables")] = Path("predictor-tables"),
    memory_format: str = "contiguous",
    threads: int = 1,
    rounds: Annotated[
        int, typer.Option(help="passes over the tables, and tenths of the passes over the networks")
    ] = 5,
    min_run_time: float = Timing.min_run_time,
    out: Annotated[Path, typer.Option(help="JSON lines, appended to")] = RAW,
    report: Annotated[
        Path | None, typer.Option(help="folder for plots; prints the tables, measures nothing")
    ] = None,
) -> None:
    if report is not None:
        _report(out, report)
        return
    name, shape, allowed = NETWORKS[network]
    torch.manual_seed(0)
    model, example = build_model(name).eval(), torch.randn(shape)
    runtime = TorchRuntime(memory_format=memory_format, threads=threads)
    spec = runtime.prepare(specify(model, example, allowed, network, program=False), model)
    work.mkdir(parents=True, exist_ok=True)
    tables = {"MACs": mac_table(model, example, allowed)}
    with runtime.pinned():
        tables["roofline"] = roofline_table(
            model,
            example,
            allowed,
            **dict(zip(("flops", "bandwidth"), measure_peaks(runtime), strict=True)),
        )
    sets = plans(tables["MACs"])
    nets = {
        f"{kind} {i}": restructure(
            model, RankPlan({layer: parse_rank(rank, "conv") for layer, rank in plan.items()})
        )
        for kind, found in sets.items()
        for i, plan in enumerate(found)
    }
    stem = f"{network}-{memory_format}-{threads}"
    files = {where: work / f"{stem}-{where}.json" for where in ("alone", "in-place")}
    kept = work / f"{stem}-networks.json"
    done: dict[str, Any] = (
        json.loads(kept.read_text())
        if kept.exists()
        else {"starts": 0, "seconds": dict.fromkeys(files, 0.0), "rounds": []}
    )
    done["starts"] += len(done["rounds"]) < rounds
    with runtime.pinned():
        ready = {key: runtime.ready(net, shape) for key, net in nets.items()}
        # Tables and networks take turns, so that an hour in which the machine is slow affects both.
        while len(done["rounds"]) < rounds:
            for where, file in files.items():
                started = time.perf_counter()
                measure(
                    spec,
                    runtime,
                    file,
                    Timing(where, len(done["rounds"]) + 1, min_run_time),
                    progress("measured"),
                )
                done["seconds"][where] += time.perf_counter() - started
            # five passes each
            done["rounds"].append([time_together(ready, runtime, 0) for _ in range(2)])
            write_json(kept, done)
    times = [found for pair in done["rounds"] for found in pair]
    measured = {key: 1e3 * median(found[key] for found in times) for key in nets}
    tables |= {where: CostTable.load(file) for where, file in files.items()}
    state = json.loads(files["alone"].read_text())
    known = set(draw(spec, 0.25))
    sampled = {home for index, home in spec.first_users().items() if index in known}
    runs = {
        layer: {c: v for c, v in row.items() if (layer, c) in sampled}
        for layer, row in state["runs"].items()
    }
    content = complete(spec, {**state, "runs": runs})
    tables[SAMPLED] = CostTable(
        "latency_ms", content["costs"], content["fixed"], content["identity"]
    )
    held_out = [home for home in spec.first_users().values() if home not in sampled]
    apart = [
        abs(content["costs"][layer][c] / tables["alone"].costs[layer][c] - 1)
        for layer, c in held_out
    ]
    line: dict[str, Any] = {
        "network": network,
        "identity": tables["alone"].identity,
        "seconds": done["seconds"] if done["starts"] == 1 else None,
        "entries": len(spec.entries),
        "regression": {
            "held out": len(apart),
            "median error": median(apart),
            "said": tables[SAMPLED].identity["median_error"],
        },
        "sets": {
            kind: [
                {
                    "measured": measured[f"{kind} {i}"],
                    **{predictor: table.total(plan) for predictor, table in tables.items()},
                }
                for i, plan in enumerate(found)
            ]
            for kind, found in sets.items()
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file_:
        file_.write(json.dumps(line) + "\n")
    print(_table([line]))


def errors(rows: list[dict[str, float]], predictor: str) -> tuple[float, float]:
    """Return a predictor's mean absolute percentage error and Spearman's correlation.

    MACs are scaled to milliseconds first, by least squares in the logarithm.
    """
    measured, predicted = (np.array([row[key] for row in rows]) for key in ("measured", predictor))
    if predictor == "MACs":
        predicted = predicted * np.exp(np.mean(np.log(measured / predicted)))
    return 100 * float(np.mean(np.abs(predicted / measured - 1))), float(
        stats.spearmanr(measured, predicted)[0]
    )


def _table(lines: list[dict[str, Any]]) -> str:
    result = [
        "| network | plans | predictor | error, % (mean) | Spearman |",
        "| --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        identity = line["identity"]
        name = (
            f"{line['network']}, batch {identity['input'][0]}, {identity['memory_format']}, "
            f"{identity['threads']} thread(s)"
        )
        for kind, rows in line["sets"].items():
            for predictor in [key for key in rows[0] if key != "measured"]:
                error, rank = errors(rows, predictor)
                result.append(f"| {name} | {kind} | {predictor} | {error:.1f} | {rank:.3f} |")
    for line in lines:
        facts, spent = line["regression"], line["seconds"]
        took = (
            f", alone in {spent['alone']:.0f} s, in place in {spent['in-place']:.0f} s"
            if spent
            else ""
        )
        result.append(
            f"\n{line['network']}: {line['entries']} entries{took}. The {facts['held out']} entries"
            " that were not measured are predicted"
            f" within {100 * facts['median error']:.1f} % (median;"
            f" {100 * facts['said']:.1f} % by cross-validation on the measured ones)."
        )
    return "\n".join(result)


def _stem(line: dict[str, Any]) -> str:
    return "-".join(
        str(value)
        for value in (
            line["network"],
            line["identity"]["memory_format"],
            line["identity"]["threads"],
        )
    )


def _report(raw: Path, plots: Path) -> None:
    lines = {_stem(line): line for line in map(json.loads, raw.read_text().splitlines())}
    print(_table(list(lines.values())))
    plots.mkdir(parents=True, exist_ok=True)
    for stem, line in lines.items():
        figure = Figure(figsize=(9, 4), layout="constrained")

        for axes, (kind, rows) in zip(figure.subplots(1, 2), line["sets"].items(), strict=True):
            measured = [row["measured"] for row in rows]
            for predictor, marker in (("alone", "o"), ("in-place", "x"), (SAMPLED, "+")):
                axes.plot(
                    measured,
                    [row[predictor] for row in rows],
                    marker,
                    label=predictor,
                    fillstyle="none",
                )
            axes.plot(
                [min(measured), max(measured)], [min(measured), max(measured)], "k-", linewidth=0.5
            )
            axes.set(xlabel="measured, ms", ylabel="predicted, ms", title=kind)
            axes.legend(fontsize=8)
        figure.savefig(plots / f"predictor-{stem}.png", dpi=150)


if __name__ == "__main__":
    typer.run(main)
