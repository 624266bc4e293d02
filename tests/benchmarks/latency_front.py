"""Draw accuracy over measured latency for plans of several budgets: the picture of the README.

    python tests/benchmarks/latency_front.py --data FOLDER
    python tests/benchmarks/report.py

FOLDER is that of ``minutes.py``; it needs the files of VGG-16. Each rule chooses ranks for shares
of the original's latency (tests/benchmarks/study/costs-vgg16.json), and the blocks of its network
are reconstructed on 512 training images without labels, as ``compress_model(epochs=0)`` does. The
accuracies are of the 10,000 test images. In the end all networks are timed in alternation.
"""

import json
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from benchmarks.on_cuda.bench import Bench
from benchmarks.study.rows import chosen
from benchmarks.study.short import Row, cache, config_of, start
from torch import Tensor, nn

from nni_haloc.costs.device.measure import time_together
from nni_haloc.costs.from_settings import latency_input, runtime_of
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.job import Job
from nni_haloc.training.finetuning import accuracy
from nni_haloc.training.reconstruction import reconstruct_blocks
from nni_haloc.utils.quiet import quiet

DOCS = Path(__file__).parents[2] / "docs"
RAW = DOCS / "raw" / "latency_front.jsonl"
SHARES = (0.8, 0.65, 0.5, 0.4, 0.3)
METHODS = ("sensitivity-knapsack", "alds", "energy", "uniform")
ROUNDS = 15


def job_of(bench: Bench, method: str, share: float) -> Job:
    config = config_of(bench, Row("vgg16", "latency_ms", share, method, seed=0))
    return Job(config, bench.work / f"latency-front-{method}-{share:g}")


def row(bench: Bench, method: str, share: float) -> dict[str, Any]:
    """Choose ranks, reconstruct the network's blocks, and count what it gets right."""
    job = job_of(bench, method, share)
    started = time.process_time()
    with quiet():
        plan, network = chosen(job)
        chosen_s = time.process_time() - started
        images: Tensor = job.splits.images("plain", job.config.rank_space.calibration_images)
        reconstruct_blocks(network, job.model, images, list(plan.ranks))
    fit_s = time.process_time() - started - chosen_s
    top1 = {split: accuracy(network, job.loader(split))[0] for split in ("val", "test")}
    shares = {"table_share": plan.chosen_by["cost"] / plan.chosen_by["original_cost"]}
    seconds = {"choose_s": chosen_s, "fit_s": fit_s}
    return {**shares, **seconds, "plan": plan.ranks, **top1}


def time_all(bench: Bench, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time the original and every network in alternation; return rows with the latencies.

    Each has the median of the rounds' medians, in milliseconds, and as a share of the original's
    of the same round.
    """
    job = job_of(bench, METHODS[0], SHARES[0])
    networks: dict[str, nn.Module] = {"original": job.model}
    for line in rows:
        if line["method"] != "original":
            ranks = {k: tuple(v) if isinstance(v, list) else v for k, v in line["plan"].items()}
            key = f"{line['method']} {line['share']}"
            networks[key] = restructure(job.model, RankPlan(ranks))
    batch, runtime = latency_input(job.config, job.example), runtime_of(job.config)
    with runtime.pinned(), torch.no_grad():
        runs = {
            name: runtime.ready(network, tuple(batch.shape), copied=False)
            for name, network in networks.items()
        }
        rounds = [time_together(runs, runtime, 0.0) for _ in range(ROUNDS)]
    for line in rows:
        name = "original" if line["method"] == "original" else f"{line['method']} {line['share']}"
        shares = sorted(times[name] / times["original"] for times in rounds)
        line["latency_ms"] = 1e3 * median(times[name] for times in rounds)
        line["latency_share"] = median(shares)
        line["latency_quartiles"] = [shares[len(shares) // 4], shares[-1 - len(shares) // 4]]
    return rows


def main(
    data: Annotated[Path, typer.Option(help="folder of images and weights")],
    work: Path = Path("latency-front"),
    out: Annotated[Path, typer.Option(help="JSON lines, appended to")] = RAW,
    timing: Annotated[bool, typer.Option(help="time the networks anew")] = False,
) -> None:
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    torch.set_num_threads(1)
    bench = Bench(data, out, work, "cpu", 1.0, float("inf"))
    cache(bench)
    start(bench)
    torch.set_num_threads(1)
    if not rows:
        job = job_of(bench, METHODS[0], SHARES[0])
        top1 = {s: accuracy(job.model, job.loader(s))[0] for s in ("val", "test")}
        rows.append({"method": "original", "share": 1.0, **top1})
    for method in METHODS:
        for share in SHARES:
            if not any((r["method"], r["share"]) == (method, share) for r in rows):
                line = {"method": method, "share": share, **row(bench, method, share)}
                rows.append(line)
                print({key: line[key] for key in ("method", "share", "val")}, flush=True)
                out.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    if timing or not all("latency_ms" in r for r in rows):
        rows = time_all(bench, rows)
        out.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
