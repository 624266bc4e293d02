"""Compare uniform ranks with the fastest ones by a cost table, ResNet-18 at 588 M MACs.

    python tests/benchmarks/latency_plans.py

The settings are batch 1 and 8, each in the default and the channels-last format, on one thread. In
each setting a table is measured (an interrupted one is continued), and the plans of the lowest
latency within 2 % of those MACs are taken from it, with and without dense layers. Then the original
and the three networks are timed in alternation: as they are; with the normalisation folded into the
convolutions, as for deployment; and, in the default format, with channels-last weights, without and
with the folding. Best run on an idle machine. The weights are untrained, so this says nothing about
accuracy.
"""

import json
from collections.abc import Collection
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.fx.experimental.optimization import fuse

from nni_haloc.costs.analytic import mac_table
from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.device.measure import measure, time_together
from nni_haloc.costs.device.runtime import Timing
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.plan.budget import Limit, choose
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.space.modules import copy_of
from nni_haloc.space.names import parse_rank
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.utils.progress import progress

RAW = Path(__file__).parents[2] / "docs" / "raw" / "latency_plans.jsonl"
MACS, NEAR = 588e6, 0.02
SETTINGS = [(batch, form) for form in ("contiguous", "channels_last") for batch in (1, 8)]
NETWORKS = ("original", "uniform", "fastest", "fastest without dense")
FORMS: dict[str, Any] = {
    "as they are": lambda network: network,
    "normalisation folded": lambda network: fuse(network.eval()),
    "channels-last weights": lambda network: copy_of(network).to(memory_format=torch.channels_last),
    "both": lambda network: fuse(network.eval()).to(memory_format=torch.channels_last),
}


def main(
    work: Annotated[Path, typer.Option(help="folder for the tables")] = Path("latency-plans"),
    rounds: Annotated[int, typer.Option(help="of five passes or more of each network")] = 9,
    step: Annotated[int, typer.Option(help="distance between candidate ranks")] = 8,
    out: Annotated[Path, typer.Option(help="JSON lines, appended to")] = RAW,
    report: Annotated[
        bool, typer.Option(help="print the table of all raw results, measure nothing")
    ] = False,
) -> None:
    for batch, form in () if report else SETTINGS:
        line = compare(work, batch, form, rounds, step)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    print(table([json.loads(line) for line in out.read_text().splitlines()]))


def compare(work: Path, batch: int, form: Any, rounds: int, step: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, shape = build_model("torchvision:resnet18").eval(), (batch, 3, 224, 224)
    example, allowed = (
        torch.randn(shape),
        AllowedRanks(step=step, kinds=("conv",), exclude=("conv1",)),
    )
    runtime = TorchRuntime(memory_format=form, threads=1)
    file = work / f"{form}-{batch}-step{step}.json"
    work.mkdir(parents=True, exist_ok=True)
    measure(
        runtime.prepare(specify(model, example, allowed, "resnet18", program=False), model),
        runtime,
        file,
        Timing(rounds=3),
        progress(f"{form}, batch {batch}"),
    )
    times, macs = CostTable.load(file), mac_table(model, example, allowed)
    plans = {"uniform": uniform(model, example, allowed)}
    for name, skipped in (("fastest", ()), ("fastest without dense", ("dense",))):
        plans[name] = fastest(times, macs, skipped)
    networks = {"original": model} | {
        name: restructure(model, plan) for name, plan in plans.items()
    }
    counts = {name: count_macs(network, example) for name, network in networks.items()}
    assert all(abs(counts[name] / MACS - 1) <= NEAR + 1e-6 for name in plans), counts
    with runtime.pinned():
        runs = {
            (form_, name): runtime.ready(change(network), shape, copied=False)
            for form_, change in list(FORMS.items())[: 4 if form == "contiguous" else 2]
            for name, network in networks.items()
        }
        found = [time_together(runs, runtime, 0.2) for _ in range(rounds)]
    milliseconds = {
        form_: {name: [1e3 * times_[form_, name] for times_ in found] for name in networks}
        for form_, _ in runs
    }
    return {
        "batch": batch,
        "memory_format": form,
        "identity": times.identity,
        "milliseconds": milliseconds,
        "predicted": {
            name: times.total(plan.names) for name, plan in plans.items() if name != "uniform"
        },
        "macs": counts,
        "plans": {name: plan.names for name, plan in plans.items()},
    }


def fastest(times: CostTable, macs: CostTable, skipped: Collection[str] = ()) -> RankPlan:
    """Return the plan of the lowest cost in ``times`` at `MACS`, without the candidates skipped."""
    scores = {
        layer: {c: -cost for c, cost in row.items() if c not in skipped}
        for layer, row in times.costs.items()
    }
    return ranks(choose(scores, [Limit(macs, (1 + NEAR) * MACS)], (1 - NEAR) / (1 + NEAR)))


def ranks(choice: dict[str, str]) -> RankPlan:
    return RankPlan({layer: parse_rank(name, "conv") for layer, name in choice.items()})


def uniform(model: nn.Module, example: torch.Tensor, allowed: AllowedRanks) -> RankPlan:
    """Keep one fraction of the channels in every layer, the one that comes nearest to the MACs.

    r1 is that fraction of the output channels, r2 of the input channels.
    """
    specs = find_layers(model, example, allowed).specs
    candidates = [
        RankPlan(
            {
                n: (round(f / 512 * s.out_channels) or 1, round(f / 512 * s.in_channels) or 1)
                for n, s in specs.items()
            }
        )
        for f in range(32, 512)
    ]
    return min(
        candidates, key=lambda plan: abs(count_macs(restructure(model, plan), example[:1]) - MACS)
    )


def table(lines: list[dict[str, Any]]) -> str:
    last = {(line["batch"], line["memory_format"]): line for line in lines}
    columns = [
        "batch, format",
        "networks",
        *(f"{n}, ms" for n in NETWORKS),
        "uniform",
        "fastest",
        "without dense",
        "under uniform",
    ]
    result = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for (batch, form), line in last.items():
        for number, (form_, times) in enumerate(line["milliseconds"].items()):
            cells = ["" if number else f"{batch}, {form}", form_]
            for name in NETWORKS:
                low, middle, high = quantiles(times[name])
                cells.append(f"{middle:.1f} ({low:.1f} to {high:.1f})")
            for name in NETWORKS[1:]:
                pairs = zip(times["original"], times[name], strict=True)
                cells.append(f"{median(a / b for a, b in pairs):.2f} x")
            pairs = zip(times["fastest"], times["uniform"], strict=True)
            cells.append(f"{100 * median(1 - a / b for a, b in pairs):.0f} %")
            result.append("| " + " | ".join(cells) + " |")
    return "\n".join(result)


if __name__ == "__main__":
    typer.run(main)
