"""Compare plans that were made for different metrics by their cost in every metric.

    python tests/benchmarks/two_costs.py FOLDER FOLDER ...

The folders hold finished runs or searches of one network, each with a metric of its own. Each plan
is looked up in every run's cost table.
"""

from pathlib import Path
from typing import Annotated

import typer

from nni_haloc.costs.table import CostTable
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import RunFolder


def main(folders: Annotated[list[Path], typer.Argument()]) -> None:
    plans = {folder: RankPlan.load(RunFolder(folder).ranks) for folder in folders}
    tables = {folder: CostTable.load(RunFolder(folder).costs) for folder in folders}
    print(
        "| plan made for | "
        + " | ".join(f"{table.metric}, % of the original" for table in tables.values())
        + " |"
    )
    print("| --- " * (1 + len(tables)) + "|")
    for folder, plan in plans.items():
        shares = (100 * table.total(plan.names) / table.original for table in tables.values())
        print(
            f"| {tables[folder].metric} | " + " | ".join(f"{share:.1f}" for share in shares) + " |"
        )


if __name__ == "__main__":
    typer.run(main)
