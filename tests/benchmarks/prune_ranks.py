"""Compare pruning that keeps ranks with pruning that takes them like channels.

    python tests/benchmarks/prune_ranks.py FOLDER [--sparsity 0.3] [--seed 0] [--set prune.lr=0.02]

FOLDER is a finished run's. For each seed, share and way its network is pruned and fine-tuned by the
section ``prune``; a line of JSON has what is left and the top-1 (`data.score`: validation images by
default). In the end a table has the means over the seeds, and their standard errors.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from nni_haloc.cli.options import assignment
from nni_haloc.runs.finished import apply_stage
from nni_haloc.runs.folder import RunFolder


def table(rows):
    """Return the rows as a table in Markdown: means over seeds."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["ranks"], row["sparsity"]].append(row)
    lines = [
        "| `prune.ranks` | `prune.sparsity` | MACs | parameters | top-1 | standard error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (ranks, sparsity), group in sorted(groups.items(), key=lambda g: -g[1][0]["macs"]):
        top1 = [100 * row["top1"] for row in group]
        error = f"{stdev(top1) / sqrt(len(top1)):.2f}" if len(top1) > 1 else ""
        counts = (f"{group[0][key]:,}" for key in ("macs", "params"))
        cells = (f"`{ranks}`", f"{sparsity:g}", *counts, f"{mean(top1):.2f} %", error)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sparsity", type=float, action="append")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    found = []
    for seed in options.seed or [0, 1, 2]:
        for sparsity in options.sparsity or [0.2, 0.3, 0.4, 0.5]:
            for ranks in ("keep", "prune"):
                changes = {"prune.sparsity": sparsity, "prune.ranks": ranks, "seed": seed}
                changes |= dict(map(assignment, options.set))
                with tempfile.TemporaryDirectory() as out:
                    apply_stage(options.folder, "prune", changes, out)
                    (figures,) = RunFolder(out).metrics().values()
                facts = {"ranks": ranks, "sparsity": sparsity, "seed": seed}
                found.append({**facts, **figures})
                print(json.dumps(found[-1]), flush=True)
    print(table(found))
