"""Time float32 and int8, the original and compressed networks, in one alternating run.

    python tests/benchmarks/int8.py                              # uniform ranks
    python tests/benchmarks/int8.py --own openvino,onnxruntime   # and each one's fastest plan
    python tests/benchmarks/int8.py --data FOLDER                # and accuracies
    python tests/benchmarks/int8.py --report                     # only the table

For ResNet-20, VGG-16 of half width and ResNet-18, at 28, 28 and 32.4 % of the MACs (588 M of them
in ResNet-18), one image on one thread, in OpenVINO, ONNX Runtime, ExecuTorch. The fastest plan is
that of the lowest latency at the MACs by an int8 table of the runtime, which ``--work`` keeps. All
forms of a network are timed in one alternating run. FOLDER is that of ``minutes.py``: its images
calibrate, its validation images are reported, after the blocks of compressed networks were
reconstructed. Without it, weights and images are random, which changes no time.

Rows are appended to docs/raw/int8.jsonl, and the table of docs/benchmarks.md is written; networks
that have rows there are left out.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import torch
import typer
from benchmarks.minutes import Data
from benchmarks.runtimes import DOCS, installed, ms
from torch import Tensor, nn

from nni_haloc.costs.analytic import mac_table
from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.device.measure import measure, time_together
from nni_haloc.costs.device.measured_file import spread
from nni_haloc.costs.device.runtime import Deployed, Run, Runtime, Timing, make_runtime
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.plan.budget import Limit, choose
from nni_haloc.plan.compression import compress, restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.plan.rules import Problem, plan
from nni_haloc.results.bench import Clocks
from nni_haloc.space.names import parse_rank
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.training.reconstruction import reconstruct_blocks
from nni_haloc.utils.progress import progress

NETWORKS: dict[str, tuple[str, dict[str, Any], int, str, float]] = {
    "resnet20": ("resnet20", {}, 32, "conv1", 0.28),
    "vgg16": ("vgg16", {"width": 0.5}, 32, "features.0", 0.28),
    "resnet18": ("torchvision:resnet18", {}, 224, "conv1", 0.324),
}
"""Name, arguments, pixels, the layer that stays, and the share of the MACs."""
RAW, PAGE = DOCS / "raw" / "int8.jsonl", DOCS / "benchmarks.md"
RUNTIMES = "openvino,onnxruntime,executorch"
CALIBRATION = 64
"""Images that quantizers take their ranges from."""
NEAR = 0.02
"""Share of the MACs that a fastest plan may leave."""


class Network:
    """Hold a network, its rank space, and images with their classes, if there are some."""

    def __init__(self, name: str, data: Path | None) -> None:
        factory, arguments, pixels, first, self.share = NETWORKS[name]
        self.shape = (1, 3, pixels, pixels)
        self.allowed = AllowedRanks(step=8, kinds=("conv",), exclude=(first,))
        self.truth: Tensor | None = None
        if data is not None and name in ("resnet20", "vgg16"):
            found = Data(name, data)
            self.model = found.model.to(memory_format=torch.contiguous_format)
            self.images, self.labels = found.images.contiguous(), found.labels
            self.shown, self.truth = found.shown, found.truth
        else:
            torch.manual_seed(0)
            self.model = build_model(factory, arguments).eval()
            self.images = torch.randn(CALIBRATION, *self.shape[1:])
        self.macs = mac_table(self.model, self.images[:1], self.allowed)

    def uniform(self) -> RankPlan:
        """Return the plan of uniform ranks within the share of the MACs."""
        layers = find_layers(self.model, self.images[:1], self.allowed)
        limit = Limit(self.macs, self.share * self.macs.original)
        candidates = layers.candidates(self.allowed)
        labels = self.labels if self.truth is not None else None
        problem = Problem(self.model, layers.specs, candidates, [limit], self.images, labels)
        return plan(problem, "uniform")

    def fastest(self, name: str, file: Path, rounds: int) -> RankPlan:
        """Return the plan of the lowest latency at these MACs, by an int8 table of a runtime."""
        runtime = make_runtime(name, threads=1, dtype="int8")
        spec = specify(self.model, self.images[:1], self.allowed, file.stem, program=False)
        timing, told = Timing(rounds=rounds), progress(f"{name}: measured")
        file.parent.mkdir(parents=True, exist_ok=True)
        measure(runtime.prepare(spec, self.model), runtime, file, timing, told)
        times = CostTable.load(file)
        scores = {layer: {n: -c for n, c in row.items()} for layer, row in times.costs.items()}
        limit = Limit(self.macs, self.share * self.macs.original)
        chosen = choose(scores, [limit], 1 - NEAR)
        return RankPlan({layer: parse_rank(n, "conv") for layer, n in chosen.items()})

    def made(self, ranks: RankPlan) -> nn.Module:
        """Return the network of a plan; with the accuracy it can have, where that is looked at."""
        if self.truth is None:
            return restructure(self.model, ranks).eval()
        network = compress(self.model, ranks, self.images)
        reconstruct_blocks(network, self.model, self.images, list(ranks.ranks))
        return network.eval()

    def top1(self, deployed: Deployed) -> float | None:
        """Return the share of the validation images that a deployed network has right."""
        if self.truth is None:
            return None
        with torch.inference_mode():
            parts = self.shown.split(deployed.batch or 100)
            found = torch.cat([deployed.network(x).argmax(1) for x in parts])
        return float((found == self.truth).float().mean())


def rows_of(
    name: str, names: Sequence[str], own: Sequence[str], data: Path | None, work: Path, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each plan, runtime and precision of a network, timed in alternation."""
    network = Network(name, data)
    common = {"original": RankPlan({}), "uniform": network.uniform()}
    made = {"original": network.model, "uniform": network.made(common["uniform"])}
    rows: list[dict[str, Any]] = []
    runs: dict[str, Run] = {}
    clocks: dict[int, Runtime] = {}
    with TemporaryDirectory() as folder, make_runtime("torch", threads=1).pinned():
        for place in names:
            try:
                runtime = make_runtime(place, threads=1)
            except ValueError as error:
                print(f"without {place}: {error}")
                continue
            plans, networks = dict(common), dict(made)
            if place in own:
                plans["fastest"] = network.fastest(place, work / f"{name}-{place}.json", rounds)
                networks["fastest"] = network.made(plans["fastest"])
            for key, each in networks.items():
                for precision in runtime.precisions:
                    start, stem = time.perf_counter(), Path(folder) / f"{key}-{place}"
                    images = network.images[:CALIBRATION] if precision == "int8" else None
                    deployed = runtime.deploy(each, network.images[:2], stem, images)
                    run = deployed.ready(network.shape)
                    runs[str(len(rows))], clocks[id(run)] = run, runtime
                    row = {"network": name, "plan": key, "runtime": place, "precision": precision}
                    row["macs"] = count_macs(each, network.images[:1])
                    row |= {"identity": {**runtime.identity(), "dtype": precision}}
                    row |= {"top1": network.top1(deployed), "ranks": plans[key].names}
                    row |= {"bytes": sum(f.stat().st_size for f in deployed.files)}
                    rows.append(row | {"made_s": round(time.perf_counter() - start, 1)})
                    print(name, key, place, precision, flush=True)
        found = [time_together(runs, cast(Runtime, Clocks(clocks)), 0.2) for _ in range(rounds)]
    for i, row in enumerate(rows):
        times = [1e3 * each[str(i)] for each in found]
        row |= {"latency_ms": median(times), "spread_ms": spread(times), "rounds": rounds}
        row |= {"date": time.strftime("%Y-%m-%d"), "packages": installed()}
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the newest rows as a Markdown table: a line for each network in a form."""
    keys = ("network", "runtime", "precision", "plan")
    newest = {tuple(row[key] for key in keys): row for row in rows}
    columns = ("network", "runtime", "precision", "original, ms", "uniform ranks, ms")
    columns += ("times as fast", "fastest plan, ms", "times as fast", "top-1, %")
    lines = [columns, ("---",) * len(columns)]
    for key in dict.fromkeys(key[:3] for key in newest):
        original, *plans = (newest.get((*key, p)) for p in ("original", "uniform", "fastest"))
        if original is None:
            continue
        cells = [*key, ms(original)]
        for row in plans:
            ratio = row and f"{original['latency_ms'] / row['latency_ms']:.2f}"
            cells += [ms(row) if row else "", ratio or ""]
        right = [row["top1"] for row in (original, *plans) if row and row["top1"] is not None]
        lines.append((*cells, ", ".join(f"{100 * share:.1f}" for share in right)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(
    networks: Annotated[str, typer.Option(help="names")] = ",".join(NETWORKS),
    names: Annotated[str, typer.Option("--runtimes", help="names")] = RUNTIMES,
    own: Annotated[str, typer.Option(help="runtimes whose fastest plan is timed, too")] = "",
    data: Annotated[Path | None, typer.Option(help="folder of images and weights")] = None,
    work: Annotated[Path, typer.Option(help="folder for the tables")] = Path("int8"),
    rounds: Annotated[int, typer.Option(help="of five passes or more of each network")] = 5,
    out: Annotated[Path, typer.Option(help="JSON lines")] = RAW,
    report: Annotated[bool, typer.Option("--report", help="measure nothing")] = False,
) -> None:
    """Append the rows of the networks that have none yet, and print the table of all."""
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known = {row["network"] for row in rows}
    for name in () if report else [n for n in networks.split(",") if n not in known]:
        new = rows_of(name, names.split(","), own.split(","), data, work, rounds)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
        rows += new
    print(text := table(rows))
    if out == RAW:
        content = PAGE.read_text(encoding="utf-8")
        pattern = re.compile(r"(<!-- int8 -->\n).*?(<!-- end of int8 -->)", re.DOTALL)
        written = pattern.sub(lambda m: f"{m[1]}{text}\n{m[2]}", content)
        PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
