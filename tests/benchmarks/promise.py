"""How often does a plan that was accepted before training keep its latency budget, and how well?

    python tests/benchmarks/promise.py --runtime torch --plans 30
    python tests/benchmarks/promise.py --report                      # only the table

It goes on where it stopped: with the cost table in ``--work``, and the plans that are not in the
raw file yet. It writes the table of docs/benchmarks.md. Plans of random scores are made for budgets
from just above the cheapest network's to nine tenths of the original's latency, by a cost table
that is measured once. Each is looked at as a run does it before training; then the accepted network
is timed anew against the original. Weights are random: a latency does not depend on them.
"""

import json
import random
import re
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from nni_haloc.costs.device.measure import measure
from nni_haloc.costs.device.runtime import Runtime, Timing, make_runtime
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.plan.budget import Limit, cheapest, choose
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.kept import TOLERANCE
from nni_haloc.runs.promise import Rounds, Verdict, keep_promise, time_rounds
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.utils.errors import BudgetMissed
from nni_haloc.utils.progress import progress
from nni_haloc.utils.quiet import quiet

DOCS = Path(__file__).parents[2] / "docs"
RAW, PAGE = DOCS / "raw" / "promise.jsonl", DOCS / "benchmarks.md"
DEAREST = 0.9


class Bench:
    """A network and the runtime that it is timed in.

    Args:
        name: of the network.
        shape: of its input, batch included.
        runtime: what runs it.
        file: keeps the cost table.
        timing: how that is measured.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        runtime: Runtime,
        file: Path,
        timing: Timing | None = None,
    ) -> None:
        self.model, self.shape, self.runtime = build_model(name).eval(), shape, runtime
        example, allowed = torch.zeros(shape), AllowedRanks()
        self.candidates = find_layers(self.model, example, allowed).candidates(allowed)
        spec = specify(self.model, example, allowed, name, program=False)
        measure(
            runtime.prepare(spec, self.model),
            runtime,
            file,
            timing or Timing(),
            progress("measured"),
        )
        self.costs = CostTable.load(file)

    def clock(self, plan: RankPlan) -> Rounds:
        """Time a plan's network and the original."""
        return time_rounds(self.model, restructure(self.model, plan), self.shape, self.runtime)

    def row(self, seed: int, dearest: float = DEAREST) -> dict[str, Any]:
        """Make a plan, look at it as a run does, and time what is accepted once more."""
        draw = random.Random(seed)
        scores = {x: {c: draw.random() for c in row} for x, row in self.candidates.items()}
        least = self.costs.total(cheapest(scores, self.costs)) / self.costs.original
        fraction = draw.uniform(min(1.02 * least, dearest), dearest)
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


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: how often the budget was kept in each runtime, and by how much."""
    columns = ("network, batch", "runtime", "plans", "refused", "kept by the table alone")
    columns += ("median, worst", "kept when accepted", "median, worst")
    columns += ("within 3 %: before, after", "seconds")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        network, batch = row["network"].rpartition(":")[2], row["input"][0]
        told = row["runtime"].partition("+")[0]
        told += ", CUDA graph" if row.get("graph") else ""
        told += ", channels-last" if row["memory_format"] == "channels_last" else ""
        groups.setdefault((f"{network}, {batch}", told), []).append(row)
    lines = [columns, ("---",) * len(columns)]
    for group, found in groups.items():
        accepted = [row for row in found if not row["refused"]]
        alone = kept([row["by_table_alone"] for row in found])
        anew = kept([row["after"] for row in accepted])
        near = f"{within([row['by_table_alone'] for row in found])}, "
        near += within([row["after"] for row in accepted])
        looked = f"{median(row['looked_s'] for row in found):.0f}"
        refused = len(found) - len(accepted)
        lines.append((*group, str(len(found)), str(refused), *alone, *anew, near, looked))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def within(shares: list[float]) -> str:
    """Say how many times are within 3 % of the budget, above it or below."""
    near = sum(abs(value - 1) <= TOLERANCE - 1 for value in shares)
    return f"{100 * near / len(shares):.0f} %" if shares else ""


def kept(shares: list[float]) -> tuple[str, str]:
    """Say how many times are within 3 % of the budget or below it; and the median and worst."""
    if not shares:
        return "", ""
    share = sum(value <= TOLERANCE for value in shares) / len(shares)
    return f"{100 * share:.0f} %", f"{median(shares):.3f}, {max(shares):.3f}"


def main(
    network: str = "resnet20",
    input_shape: Annotated[str, typer.Option("--input", help="batch included")] = "1x3x32x32",
    runtime: str = "torch",
    memory_format: str = "contiguous",
    plans: int = 30,
    machine: Annotated[str, typer.Option(help="idle, or what else it does")] = "idle",
    work: Annotated[Path, typer.Option(help="folder for the tables")] = Path("promise"),
    out: Annotated[Path, typer.Option(help="JSON lines, appended to")] = RAW,
    report: Annotated[bool, typer.Option("--report", help="measure nothing")] = False,
) -> None:
    """Append a row for each plan to the raw file, and write the table of all."""
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    if not report:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        timed = make_runtime(runtime, memory_format=memory_format, threads=1)
        shape = tuple(map(int, input_shape.split("x")))
        facts = {"network": network, "input": list(shape), "machine": machine, **timed.identity()}
        work.mkdir(parents=True, exist_ok=True)
        told = network.rpartition(":")[2], input_shape, runtime, memory_format
        with quiet():
            bench = Bench(network, shape, timed, work / f"{'-'.join(told)}.json")
        done = {row["seed"] for row in rows if facts.items() <= row.items()}
        about = {"original_ms": bench.costs.original, "quality": dict(bench.costs.quality)}
        for seed in sorted(set(range(plans)) - done):
            with quiet():
                rows.append({**facts, **about, **bench.row(seed)})
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    text = table(rows)
    print(text)
    if out == RAW:
        content = PAGE.read_text(encoding="utf-8")
        pattern = re.compile(r"(<!-- promise -->\n).*?(<!-- end of promise -->)", re.DOTALL)
        written = pattern.sub(lambda m: f"{m[1]}{text}\n{m[2]}", content)
        PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
