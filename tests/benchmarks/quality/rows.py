"""Measure accuracy at equal cost, one row after another.

    python tests/benchmarks/quality/rows.py --help

A row is one method, budget and seed: what `haloc run` does, timed in processor seconds. Where
choosing ranks takes half an epoch of fine-tuning or more, a row of the main methods and budgets
gives two lines, one for each kind of equality: fine-tuned for all epochs, and for fewer, by as many
whole epochs as the choice costs, to the nearest.
Rows that the file has already are not made again, so that a study goes on where it stopped; several
processes share one (`--part 0/4`).
"""

import copy
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from torch import nn

from nni_haloc.costs.counts import count_macs, count_params
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.inputs.config import load_config
from nni_haloc.plan.compression import compress
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages.choose_ranks import ChooseRanks
from nni_haloc.runs.stages.stage import ignore
from nni_haloc.runs.stages.training import train
from nni_haloc.space.names import parse_rank
from nni_haloc.utils.log import log_to, logger

HERE = Path(__file__).parent
RUNTIME = TorchRuntime(memory_format="channels_last", threads=1)
"""The runtime that measures the study's latencies."""
METHODS: dict[str, dict[str, Any]] = {  # settings of each; any other name is a rule's
    "haloc": {},
    "paper": {"preset": "paper", "search.epochs": 3},  # from uniform probabilities one is too few
}
MAIN = ["haloc", "uniform", "energy", "alds", "sensitivity-knapsack"]
BUDGETS = (("macs", 0.28), ("latency_ms", 0.7))
"""ResNet-20's main budgets, at which the main methods are also compared at equal compute."""
BUDGETS_OF = {"resnet20": BUDGETS, "vgg16": (("macs", 0.28), ("macs", 0.12), ("latency_ms", 0.5))}
"""The main budgets of each network."""
FILES = {"resnet20": "run.yml", "vgg16": "vgg16.yml"}
"""What the rows of each network share."""
EQUAL_TUNING, EQUAL_COMPUTE = "equal fine-tuning", "equal compute"


@dataclass(frozen=True)
class Row:
    """One row of the study.

    Attributes:
        method: ``haloc``, ``paper``, or a rule.
        metric: what the budget limits.
        fraction: the budget, of the original's cost.
        seed: the run's seed.
        decomposition: how candidates are made, as ``rank_space.decomposition``.
        afresh: take the ranks of the row without this flag, made by the default decomposition, and
            decompose the original weights again instead of keeping a search's weights.
        network: which is compressed.
    """

    method: str
    metric: str
    fraction: float
    seed: int
    decomposition: str = "auto"
    afresh: bool = False
    network: str = "resnet20"


def tier_a(seeds: int, network: str = "resnet20") -> list[Row]:
    cells = [(seed, *budget) for seed in range(seeds) for budget in BUDGETS_OF[network]]
    return [
        Row(method, metric, fraction, seed, network=network)
        for seed, metric, fraction in cells
        for method in MAIN
    ]


def tier_b(seeds: int) -> list[Row]:
    others = ["paper", "error-knapsack", "vbmf", "random", "learned", "nni-evolution", "nni-random"]
    alone = [Row("haloc", "macs", 0.28, seed, afresh=True) for seed in range(seeds)]
    return (
        [Row(method, "macs", 0.28, 0) for method in others]
        + alone
        + [Row(method, "macs", fraction, 0) for fraction in (0.45, 0.2) for method in MAIN]
    )


def tier_c(seeds: int) -> list[Row]:
    return [
        Row(method, "macs", 0.28, 0, "hosvd", afresh=True)
        for method in ("uniform", "energy", "sensitivity-knapsack")
    ]


TIERS = {"A": tier_a, "B": tier_b, "C": tier_c}


def main(
    data: Annotated[Path, typer.Option(help="folder with train/CLASS/* and test/CLASS/*")],
    weights: Annotated[Path, typer.Option(help="the trained network's")],
    val_list: Annotated[Path, typer.Option(help="file that lists the validation images")],
    score: Annotated[
        str, typer.Option(help="val while settings are being chosen; test once, at the end")
    ],
    out: Annotated[Path, typer.Option(help="JSON lines, appended to; of one score")] = HERE.parents[
        2
    ]
    / "docs"
    / "raw"
    / "quality.jsonl",
    work: Annotated[Path, typer.Option(help="folder for the runs")] = Path("quality-runs"),
    tier: Annotated[str, typer.Option(help=", ".join(TIERS))] = "A",
    seeds: int = 3,
    network: Annotated[str, typer.Option(help="resnet20, or vgg16 (tier A)")] = "resnet20",
    part: Annotated[str, typer.Option(help="which rows, 0/4 to 3/4 in four processes")] = "0/1",
    method: Annotated[list[str] | None, typer.Option(help="these alone")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="a setting of the search, as of haloc run")
    ] = None,
) -> None:
    files = {
        "data.root": str(data.absolute()),
        "weights": str(weights.absolute()),
        "data.val_list": str(val_list.absolute()),
    }
    if tier not in TIERS or any(line["score"] != score for line in read(out)):
        sys.exit(f"--tier: expected one of {', '.join(TIERS)}; --score: that of the rows in {out}")
    rows = tier_a(seeds, network) if tier == "A" else TIERS[tier](seeds)
    first, of = map(int, part.split("/"))
    with log_to(work / f"log-{first}.txt"):
        for index, row in enumerate(rows):
            if (
                index % of == first
                and (not method or row.method in method)
                and not _complete(row, read(out))
            ):
                _make(row, files | dict(_pair(text) for text in set_ or []), out, work, score)


def _make(row: Row, changes: dict[str, Any], out: Path, work: Path, score: str) -> None:
    changes = changes | {
        "budget.fraction": row.fraction,
        "cost.metric": row.metric,
        "seed": row.seed,
        "data.score": score,
    }
    changes |= (
        {"rank_space.decomposition": row.decomposition} if row.decomposition != "auto" else {}
    )
    changes |= METHODS.get(row.method, {"rule": row.method})
    if row.metric == "latency_ms":
        changes["cost.table"] = str(HERE / f"costs-{row.network}.json")
    file = HERE / FILES[row.network]
    config = load_config(file, changes)
    job = Job(config, work / "-".join(str(value) for value in asdict(row).values()))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()
    lines = [line for line in read(out) if _key(line) == asdict(row)]
    if lines:  # its second line is to come
        first = lines.pop() | {"commit": commit}
        plan, chosen = (
            _chosen(job) if row.method in METHODS else _afresh(job, row, out)
        )  # a search's weights are not those of the ranks
    else:
        started = time.process_time()
        plan, chosen = _afresh(job, row, out) if row.afresh else _chosen(job)
        first = asdict(row) | {
            "score": score,
            "choose_s": time.process_time() - started,
            "cost_fraction": plan.chosen_by["cost"] / plan.chosen_by["original_cost"],
            "macs_fraction": count_macs(chosen, job.example) / count_macs(job.model, job.example),
            "params_fraction": count_params(chosen) / count_params(job.model),
            "ranks": plan.names,
            "factors": config.rank_space.decomposition,
            "search": config.search.model_dump() if config.rule == "search" else None,
            "commit": commit,
        }
        first |= {"table": EQUAL_TUNING} | _trained(job, chosen)
        lines.append(first)
    fewer = _epochs_left(first)
    if fewer is not None:
        config = load_config(file, changes | {"finetune.epochs": fewer})
        job = job.at(config, job.folder.path)
        lines.append(first | {"table": EQUAL_COMPUTE} | _trained(job, chosen))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _epochs_left(line: dict[str, Any]) -> int | None:
    """Return how many of a row's epochs of fine-tuning remain after the choice of ranks.

    None if the choice costs no epoch or all of them, or if the row is not compared.
    """
    compared = (
        line["method"] in MAIN
        and (line["metric"], line["fraction"]) in BUDGETS_OF[line.get("network", "resnet20")]
        and not line.get("afresh")
    )
    left = line["epochs"] - epochs_of_choice(line)
    return left if compared and 0 < left < line["epochs"] else None


def epochs_of_choice(line: dict[str, Any]) -> int:
    """Return the time of the choice of ranks in epochs of fine-tuning, to the nearest."""
    return round(line["choose_s"] / (line["finetune_s"] / line["epochs"]))


def _complete(row: Row, lines: list[dict[str, Any]]) -> bool:
    tables = {line["table"]: line for line in lines if _key(line) == asdict(row)}
    return EQUAL_COMPUTE in tables or (
        EQUAL_TUNING in tables and _epochs_left(tables[EQUAL_TUNING]) is None
    )


def _chosen(job: Job) -> tuple[RankPlan, nn.Module]:
    """Choose ranks as the settings say; return the plan and its network."""
    with job.active():
        outcome = ChooseRanks().run(job, None, ignore, resume=False)
    return outcome.plan, outcome.network


def _afresh(job: Job, row: Row, out: Path) -> tuple[RankPlan, nn.Module]:
    """Return the plan of the row that chose the ranks, and the network decomposed at them."""
    own = asdict(replace(row, decomposition="auto", afresh=False))
    line = next((line for line in read(out) if _key(line) == own), None)
    if line is None:
        sys.exit(f"{out}: expected the row whose ranks are decomposed: {own}")
    ranks = {layer: parse_rank(name, "conv") for layer, name in line["ranks"].items()}
    images = job.splits.images("plain", job.config.rank_space.calibration_images, job.config.seed)
    plan = RankPlan(ranks, {"cost": line["cost_fraction"], "original_cost": 1.0})
    return plan, compress(
        job.model, plan, *((images,) if row.decomposition == "auto" else (None, row.decomposition))
    )


def _trained(job: Job, chosen: nn.Module) -> dict[str, Any]:
    """Fine-tune a copy of the network; return its part of a line.

    ``val`` lists the validation accuracies, the first one after recalibration alone.
    """
    curve: list[float] = []
    logger.info("%s", job.folder.path.name)
    with job.active():
        started = time.process_time()
        network = train(
            job,
            copy.deepcopy(chosen),
            job.config.finetune,
            job.folder.finetuning,
            {},
            lambda metrics, place: curve.append(metrics["default"]),
            title="fine-tuning",
        )
        finetune_s = time.process_time() - started
        top1 = job.score(network)["top1"]
    return {
        "top1": top1,
        "val": curve,
        "epochs": job.config.finetune.epochs,
        "finetune_s": finetune_s,
    }


def read(out: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        if out.exists()
        else []
    )


def _key(line: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that tell rows apart."""
    earlier = {"network": "resnet20", "afresh": False}  # what rows without these keys mean
    return {key: line.get(key, earlier.get(key)) for key in Row.__dataclass_fields__}


def _pair(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)


if __name__ == "__main__":
    typer.run(main)
