"""Accuracy at equal cost, one row after another: python tests/benchmarks/quality/rows.py --help

A row is one method, budget and seed: what `haloc run` and `haloc baseline` do, timed in processor seconds. A searched row gives two lines,
one for each kind of equality: fine-tuned for as many epochs as the rules' networks, and for fewer, by as many whole epochs as
the search costs, to the nearest.
Rows that the file has already are not made again, so that a study goes on where it stopped; several processes share one (`--part 0/4`).
"""

import copy
import json
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from torch import nn

from nni_haloc.config import load_config
from nni_haloc.job import Job
from nni_haloc.log import log_to, logger
from nni_haloc.predictors import TorchRuntime, count_macs
from nni_haloc.predictors.analytic import count_params
from nni_haloc.ranks import RankPlan
from nni_haloc.run import choose_ranks, train

HERE = Path(__file__).parent
RUNTIME = TorchRuntime(memory_format="channels_last", threads=1)
"""What the latency of the study is measured with."""
METHODS: dict[str, dict[str, Any]] = {  # settings of each; any other name is a rule's
    "haloc": {},
    "paper": {"preset": "paper", "search.epochs": 3},  # from uniform probabilities one is too few
}
MAIN = ["haloc", "uniform", "energy", "alds", "sensitivity-knapsack"]
EQUAL_TUNING, EQUAL_COMPUTE = "equal fine-tuning", "equal compute"


@dataclass(frozen=True)
class Row:
    method: str
    metric: str
    fraction: float
    seed: int
    decomposition: str = "auto"


def tier_a(seeds: int) -> list[Row]:
    cells = [(seed, metric, fraction) for seed in range(seeds) for metric, fraction in (("macs", 0.28), ("latency_ms", 0.7))]
    return [Row(method, metric, fraction, seed) for seed, metric, fraction in cells for method in MAIN]


def tier_b() -> list[Row]:
    others = ["paper", "error-knapsack", "vbmf", "random", "learned", "nni-evolution", "nni-random"]
    return [Row(method, "macs", 0.28, 0) for method in others] + [
        Row(method, "macs", fraction, 0) for fraction in (0.45, 0.2) for method in MAIN
    ]


def tier_c() -> list[Row]:
    return [Row(method, "macs", 0.28, 0, decomposition="hosvd") for method in ("uniform", "energy", "sensitivity-knapsack")]


def main(
    data: Annotated[Path, typer.Option(help="folder with train/CLASS/* and test/CLASS/*")],
    weights: Annotated[Path, typer.Option(help="the trained network's")],
    val_list: Annotated[Path, typer.Option(help="file that lists the validation images")],
    out: Annotated[Path, typer.Option(help="JSON lines, appended to")] = HERE.parents[2] / "docs" / "raw" / "quality.jsonl",
    work: Annotated[Path, typer.Option(help="folder for the runs")] = Path("quality-runs"),
    tier: str = "A",
    seeds: int = 3,
    part: Annotated[str, typer.Option(help="which rows, 0/4 to 3/4 in four processes")] = "0/1",
    score: Annotated[str, typer.Option(help="val while settings are being chosen; test once, at the end")] = "val",
    method: Annotated[list[str] | None, typer.Option(help="these alone")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="a setting of the search, as of haloc run")] = None,
) -> None:
    files = {"data.root": str(data.absolute()), "weights": str(weights.absolute()), "data.val_list": str(val_list.absolute())}
    rows = {"A": tier_a(seeds), "B": tier_b(), "C": tier_c()}[tier]
    first, of = map(int, part.split("/"))
    log_to(work / f"log-{first}.txt")
    for index, row in enumerate(rows):
        if index % of == first and (not method or row.method in method) and not _known(out, row):
            _make(row, files | dict(_pair(text) for text in set_ or []), out, work, score)


def _make(row: Row, changes: dict[str, Any], out: Path, work: Path, score: str) -> None:
    changes = changes | {"budget.fraction": row.fraction, "cost.metric": row.metric, "seed": row.seed, "data.score": score}
    changes |= {"rank_space.decomposition": row.decomposition} if row.decomposition != "auto" else {}
    changes |= METHODS.get(row.method, {"rule": row.method})
    if row.metric == "latency_ms":
        changes["cost.table"] = str(HERE / "costs.json")
    config = load_config(HERE / "run.yml", changes)
    job = Job(config, work / "-".join(str(value) for value in asdict(row).values()))
    started = time.process_time()
    plan, chosen = choose_ranks(job)
    choose_s = time.process_time() - started
    shared = asdict(row) | {
        "score": score,
        "choose_s": choose_s,
        "cost_fraction": plan.chosen_by["cost"] / plan.chosen_by["original_cost"],
        "macs_fraction": count_macs(chosen, job.example) / count_macs(job.model, job.example),
        "params_fraction": count_params(chosen) / count_params(job.model),
        "ranks": plan.names,
        "search": config.search.model_dump() if config.rule == "search" else None,
        "commit": subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE).stdout.strip(),
    }
    lines = [shared | {"table": EQUAL_TUNING} | _trained(job, plan, chosen)]
    fewer = config.finetune.epochs - round(choose_s / (lines[0]["finetune_s"] / config.finetune.epochs))
    if config.rule == "search" and fewer > 0:
        job.config = load_config(HERE / "run.yml", changes | {"finetune.epochs": fewer})
        lines.append(shared | {"table": EQUAL_COMPUTE} | _trained(job, plan, chosen))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _trained(job: Job, plan: RankPlan, chosen: nn.Module) -> dict[str, Any]:
    """One line's share: a copy of the network is fine-tuned; ``val``: its accuracies, the first one after recalibration alone."""
    curve: list[float] = []
    logger.info("%s", job.folder.name)
    started = time.process_time()
    network = train(job, plan, copy.deepcopy(chosen), lambda metrics: curve.append(metrics["default"]))
    finetune_s = time.process_time() - started
    (top1,) = job.accuracy(network, job.loader(job.config.data.score))
    return {"top1": top1, "val": curve, "epochs": job.config.finetune.epochs, "finetune_s": finetune_s}


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def _known(out: Path, row: Row) -> bool:
    return any({key: line[key] for key in asdict(row)} == asdict(row) for line in read(out))


def _pair(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)


if __name__ == "__main__":
    typer.run(main)
