"""How often does a plan that was accepted before training keep its latency budget, and how well?

    python tests/benchmarks/promise.py --runtime torch --plans 30

Plans of random scores are made for budgets from just above the cheapest network's to nine tenths of
the original's latency, by a cost table that is measured once. Each is looked at as a run does it
before training; then the accepted network is timed anew against the original. Weights are random:
a latency does not depend on them.
"""

import json
import random
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from nni_haloc.costs.device.costs_file import MEASURED
from nni_haloc.costs.device.runtime import Runtime, Timing, make_runtime
from nni_haloc.costs.latency import latency_table
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.plan.budget import Limit, cheapest, choose
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.promise import METRIC, Rounds, Verdict, keep_promise, time_rounds
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.utils.errors import BudgetMissed
from nni_haloc.utils.quiet import quiet

RAW = Path(__file__).parents[2] / "docs" / "raw" / "promise.jsonl"
DEAREST = 0.9


class Bench:
    """A network and the runtime that it is timed in.

    Args:
        name: of the network.
        shape: of its input, batch included.
        runtime: what runs it.
    """

    def __init__(self, name: str, shape: tuple[int, ...], runtime: Runtime) -> None:
        self.model, self.shape, self.runtime = build_model(name).eval(), shape, runtime
        example, allowed = torch.zeros(shape), AllowedRanks()
        self.candidates = find_layers(self.model, example, allowed).candidates(allowed)
        self.costs: CostTable = latency_table(
            self.model, example, allowed, runtime, Timing(), lambda done, of: None
        )

    def clock(self, plan: RankPlan) -> Rounds:
        """Time a plan's network and the original."""
        return time_rounds(self.model, restructure(self.model, plan), self.shape, self.runtime)

    def row(self, seed: int) -> dict[str, Any]:
        """Make a plan, look at it as a run does, and time what is accepted once more."""
        draw = random.Random(seed)
        scores = {x: {c: draw.random() for c in row} for x, row in self.candidates.items()}
        least = self.costs.total(cheapest(scores, self.costs)) / self.costs.original
        fraction = draw.uniform(min(1.02 * least, DEAREST), DEAREST)
        limit = Limit.of(self.costs, fraction)

        def make(limits: Any) -> RankPlan:
            choice = choose(scores, limits, 0.95)
            ranks = {x: self.candidates[x][c] for x, c in choice.items()}
            return RankPlan(ranks, {**limits[0].facts(choice), "also": []})

        first = Verdict.of(limit, make([limit]), self.clock(make([limit])))
        device = self.costs.identity["device"]
        started = time.perf_counter()
        try:
            plan, refused = keep_promise([limit], make, scores, self.clock, device), False
        except BudgetMissed as error:
            plan, refused = error.plan, True
        looked_s = time.perf_counter() - started
        after = Verdict.of(limit, plan, self.clock(plan))
        return {
            "seed": seed,
            "fraction": fraction,
            "by_table_alone": first.of_budget.middle,
            "refused": refused,
            "table_factor": plan.chosen_by["timed"]["table_factor"],
            "before": plan.chosen_by["timed"]["of_budget"],
            "after": after.of_budget.middle,
            "after_interval": [after.of_budget.low, after.of_budget.high],
            "share": after.share.middle,
            "looked_s": looked_s,
        }


def summary(rows: list[dict[str, Any]]) -> str:
    """Say how often the budget was kept, and by how much."""
    accepted = [row for row in rows if not row["refused"]]
    line = f"{len(rows)} plans, {len(rows) - len(accepted)} refused"
    for key, what in (("by_table_alone", "by the table alone"), ("after", "accepted, timed anew")):
        found = [row[key] for row in (rows if key == "by_table_alone" else accepted)]
        if found:
            kept = sum(value <= 1.03 for value in found) / len(found)
            line += (
                f"; {what}: {100 * kept:.0f} % within 3 % of the budget or below it, median "
                f"{median(found):.3f} of it, worst {max(found):.3f}"
            )
    return line


def main(
    network: str = "resnet20",
    input_shape: Annotated[str, typer.Option("--input", help="batch included")] = "1x3x32x32",
    runtime: str = "torch",
    memory_format: str = "contiguous",
    plans: int = 30,
    machine: Annotated[str, typer.Option(help="idle, or what else it does")] = "idle",
    out: Annotated[Path, typer.Option(help="JSON lines, appended to")] = RAW,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    timed = make_runtime(runtime, memory_format=memory_format, threads=1)
    shape = tuple(map(int, input_shape.split("x")))
    with quiet():
        bench = Bench(network, shape, timed)
    facts = {"network": network, "input": list(shape), "machine": machine, **timed.identity()}
    facts |= {"original_ms": bench.costs.original, "quality": dict(bench.costs.quality)}
    rows = []
    for seed in range(plans):
        with quiet():
            rows.append(bench.row(seed))
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**facts, **rows[-1]}) + "\n")
    print(f"{network}, {facts['runtime']}, {METRIC} in {MEASURED[METRIC]}: {summary(rows)}")


if __name__ == "__main__":
    typer.run(main)
