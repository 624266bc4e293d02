"""Measure the real latency of the studied networks, on an otherwise idle machine.

    python tests/benchmarks/quality/latency.py

Every distinct plan of the study's rows and the original are timed in alternation: batch 128,
channels-last, one thread. No weights are needed.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rows import HERE, RUNTIME, read

from nni_haloc.costs.latency import measure_latency
from nni_haloc.inputs.models import build_model
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.space.names import parse_rank

RAW = HERE.parents[2] / "docs" / "raw"


def main(
    raw: Annotated[Path, typer.Argument(help="the rows")] = RAW / "quality.jsonl",
    out: Annotated[Path, typer.Option(help="JSON, replaced")] = RAW / "quality-latency.json",
    rounds: int = 9,
) -> None:
    model = build_model("resnet20", {}).eval()
    networks = {"original": model}
    for line in read(raw):
        plan = RankPlan({layer: parse_rank(name, "conv") for layer, name in line["ranks"].items()})
        networks.setdefault(json.dumps(line["ranks"]), restructure(model, plan))
    found = measure_latency(networks, torch.randn(128, 3, 32, 32), RUNTIME, rounds=rounds)
    out.write_text(
        json.dumps({name: round(value, 2) for name, value in found.items()}, indent=0) + "\n",
        encoding="utf-8",
    )
    print(f"{len(found) - 1} networks; original {found['original']:.1f} ms")


if __name__ == "__main__":
    typer.run(main)
