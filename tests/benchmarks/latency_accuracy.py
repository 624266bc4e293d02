"""Compare the accuracies of ranks that are made for latency and of others.

    python tests/benchmarks/latency_accuracy.py RUN.yml TABLE.json --set ...

Four plans of one trained network are decomposed for the data and fine-tuned alike. Three are at the
budget's fraction of the MACs: uniform ranks, the search's ranks, and those of the lowest latency by
a cost table (`haloc measure`). The fourth is the search's within the latency that the third has by
that table, with no limit on MACs. Accuracy is measured as the settings' ``data.score`` says. Rows
that are in the raw file already are not repeated; ``--report`` times all of them in alternation.
"""

import json
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from nni_haloc.costs.analytic import mac_table
from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.device.measure import time_together
from nni_haloc.costs.from_settings import allowed_ranks_of, latency_input, runtime_of
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import Config, load_config
from nni_haloc.inputs.yaml_files import parse_yaml
from nni_haloc.plan.budget import Limit, choose
from nni_haloc.plan.compression import compress, restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages.choose_ranks import ChooseRanks
from nni_haloc.runs.stages.stage import ignore
from nni_haloc.runs.stages.training import train
from nni_haloc.space.names import parse_rank
from nni_haloc.utils.log import log_to

RAW = Path(__file__).parents[2] / "docs" / "raw" / "latency_accuracy.jsonl"
NEAR = 0.98
ROWS = {
    "uniform": {"rule": "uniform"},
    "search": {"rule": "search"},
    "fastest": {},
    "search within the fastest's latency": {"rule": "search"},
}


def main(
    run_file: Path,
    table: Annotated[Path, typer.Argument(help="latencies of the settings' rank space")],
    set_: Annotated[list[str] | None, typer.Option("--set")] = None,
    seed: int = 0,
    rows: Annotated[str, typer.Option(help="which, by their numbers")] = "0,1,2,3",
    work: Path = Path("latency-accuracy"),
    out: Path = RAW,
    report: Annotated[
        bool, typer.Option(help="time and print what is there, train nothing")
    ] = False,
) -> None:
    changes = {
        key: parse_yaml(value) for key, _, value in (text.partition("=") for text in set_ or [])
    }
    config = load_config(run_file, {**changes, "seed": seed})
    known = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    with log_to(work / "log.txt"):
        for number in () if report else map(int, rows.split(",")):
            name = list(ROWS)[number]
            if not any((line["name"], line["seed"]) == (name, seed) for line in known):
                line = {
                    "name": name,
                    "seed": seed,
                    **one(name, config, table, work / f"{number}-{seed}"),
                }
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    if report:
        print(
            printed(Job(config, work), [json.loads(line) for line in out.read_text().splitlines()])
        )


def one(name: str, config: Config, file: Path, folder: Path) -> dict[str, Any]:
    if "rule" in ROWS[name]:
        config = config.model_copy(update=ROWS[name])
    job, times = Job(config, folder), CostTable.load(file)
    macs = mac_table(job.model, job.example, allowed_ranks_of(config))
    scores = {
        layer: {c: -cost for c, cost in row.items() if c in macs.costs[layer]}
        for layer, row in times.costs.items()
    }
    fastest = choose(scores, [Limit(macs, config.budget.of(macs.original))], NEAR)
    if name == "fastest":
        plan = RankPlan(
            {layer: parse_rank(candidate, "conv") for layer, candidate in fastest.items()}
        )
        network = compress(
            job.model,
            plan,
            job.splits.images("plain", config.rank_space.calibration_images, config.seed),
        )
    else:
        if name not in ("uniform", "search"):
            cost = config.cost.model_copy(update={"metric": "latency_ms", "table": str(file)})
            limit = type(config.budget)(absolute=times.total(fastest))
            job = job.at(config.model_copy(update={"cost": cost, "budget": limit}), folder)
        with job.active():
            chosen = ChooseRanks().run(job, None, ignore, resume=False)
        plan, network = chosen.plan, chosen.network
    with job.active():
        train(job, network, config.finetune, job.folder.finetuning, {}, title="fine-tuning")
        top1 = job.score(network)["top1"]
    known = all(candidate in times.costs[layer] for layer, candidate in plan.names.items())
    return {
        "top1": top1,
        "plan": plan.names,
        "predicted_ms": times.total(plan.names) if known else None,
    }


def printed(job: Job, lines: list[dict[str, Any]]) -> str:
    batch, runtime = latency_input(job.config, job.example), runtime_of(job.config)
    networks = {"original": job.model}
    for line in lines:
        plan = RankPlan(
            {layer: parse_rank(candidate, "conv") for layer, candidate in line["plan"].items()}
        )
        networks[f"{line['name']}, seed {line['seed']}"] = restructure(job.model, plan)
    with runtime.pinned(), torch.no_grad():
        runs = {
            name: runtime.ready(network, tuple(batch.shape), copied=False)
            for name, network in networks.items()
        }
        found = [time_together(runs, runtime, 0.2) for _ in range(9)]
    top1 = dict(
        zip(
            networks,
            [
                job.score(job.model)["top1"],
                *(line["top1"] for line in lines),
            ],
            strict=True,
        )
    )
    original = count_macs(job.model, job.example)
    rows = [
        "| ranks | top-1, % | MACs, % | latency, ms | of the original's, % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, network in networks.items():
        share = median(times[name] / times["original"] for times in found)
        milliseconds, macs = (
            1e3 * median(times[name] for times in found),
            count_macs(network, job.example) / original,
        )
        numbers = f"{100 * macs:.1f} | {milliseconds:.1f} | {100 * share:.1f}"
        rows.append(f"| {name} | {100 * top1[name]:.2f} | {numbers} |")
    return "\n".join(rows)


if __name__ == "__main__":
    typer.run(main)
