"""Choose among every pair of ranks of ResNet-18's sixteen 3x3 convolutions, by a budget of MACs.

    python tests/benchmarks/every_pair.py

Scores are drawn: they fall with both ranks, at another rate in each layer. Seconds are of the
processor. ``solver alone`` is HiGHS on all pairs that no other one beats.
"""

import time
from typing import Annotated

import numpy as np
import typer

from nni_haloc.costs.table import CostTable
from nni_haloc.plan import budget
from nni_haloc.plan.budget import Limit

SHAPES = [(64, 64, 56)] * 4 + [(64, 128, 28)] + [(128, 128, 28)] * 3
SHAPES += [(128, 256, 14)] + [(256, 256, 14)] * 3 + [(256, 512, 7)] + [(512, 512, 7)] * 3
"""Input and output channels of each layer, and the side of its output."""


def problem(seed: int) -> tuple[dict[str, dict[str, float]], CostTable]:
    """Draw the scores, and count the MACs."""
    draw = np.random.default_rng(seed)
    scores, costs = {}, {}
    for n, (inputs, outputs, side) in enumerate(SHAPES):
        r1, r2 = np.meshgrid(np.arange(1, inputs + 1), np.arange(1, outputs + 1), indexing="ij")
        macs = side**2 * (inputs * r1 + 9 * r1 * r2 + r2 * outputs)
        weight, power = draw.uniform(0.2, 5), draw.uniform(1, 3)
        loss = (1 - r1 / inputs) ** power + (1 - r2 / outputs) ** power
        loss = weight * (loss + 0.002 * draw.random(r1.shape))
        dense = 9 * inputs * outputs * side**2
        cheaper = macs < dense
        pairs = zip(r1[cheaper].tolist(), r2[cheaper].tolist(), strict=True)
        names = [f"r{a}x{b}" for a, b in pairs]
        layer = f"layer {n}"
        costs[layer] = dict(zip(names, macs[cheaper].tolist(), strict=True)) | {"dense": dense}
        scores[layer] = dict(zip(names, (-loss[cheaper]).tolist(), strict=True)) | {"dense": 0.0}
    return scores, CostTable("macs", costs, 0.0)


def main(
    seeds: int = 3,
    budgets: Annotated[str, typer.Option(help="shares of the MACs")] = "0.5,0.34,0.2",
    alone: Annotated[bool, typer.Option(help="time the solver alone, too")] = False,
) -> None:
    """Print the pairs that are left and the seconds, for each seed and budget."""
    print("| seed, budget | pairs | not beaten | worth trying | seconds | solver alone |")
    print("| --- | --- | --- | --- | --- | --- |")
    for seed in range(seeds):
        scores, table = problem(seed)
        total = sum(row["dense"] for row in table.costs.values())
        for fraction in map(float, budgets.split(",")):
            limits = [Limit(table, fraction * total)]
            started = time.process_time()
            left = budget._undominated(scores, limits)
            few = budget._worth_trying(left, limits)
            budget._best(few, limits)
            took, plain = time.process_time() - started, ""
            if alone:
                started = time.process_time()
                budget._best(left, limits)
                plain = f"{time.process_time() - started:.1f}"
            numbers = (sum(map(len, rows.values())) for rows in (scores, left, few))
            cells = [f"{seed}, {100 * fraction:.0f} %", *(f"{n:,}" for n in numbers)]
            print("| " + " | ".join([*cells, f"{took:.1f}", plain]) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
