"""Compare ways to make the supernet's candidates: their time and their error.

    python tests/benchmarks/construction.py resnet18
    python tests/benchmarks/construction.py resnet20 --weights resnet20.pt --data-root cifar10

The reference is `tensorly.decomposition.partial_tucker`, run once for every rank. All 3x3
convolutions are decomposed, at their default candidates. Each measurement is appended to ``--out``
as a line of JSON as soon as it is made and is never repeated, so an interrupted run can be
continued. The rounds alternate between the methods.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from nni_haloc.inputs.image_folder import image_folder
from nni_haloc.inputs.models import build_model
from nni_haloc.space.candidates import build_candidates, build_nested_candidates
from nni_haloc.space.covariances import patch_covariances
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.space.tucker import output_error, reconstruct

OURS = ("hosvd", "warm_hooi", "data", "nested")
LABELS = {
    "hooi": "tensorly, rank by rank",
    "hosvd": "hosvd",
    "warm_hooi": "warm_hooi",
    "data": "data",
    "nested": "nested, by the data",
}


class Bench:
    """Hold the network, its 3x3 layers with their ranks, and two sets of images.

    ``images`` are those to decompose for; ``others`` are held out to measure output errors.
    """

    def __init__(self, options):
        self.options = options
        torch.manual_seed(0)
        if options.model == "resnet18":
            self.model = build_model("torchvision:resnet18").eval()
            smooth = torch.randn(2 * options.images, 3, 28, 28)
            images = torch.nn.functional.interpolate(
                smooth, 224, mode="bilinear", align_corners=False
            )
            self.images, self.others = images.split(options.images)
        else:
            self.model = build_model("resnet20").eval()
            self.model.load_state_dict(torch.load(options.weights, weights_only=True))
            if options.peak:  # reading the files would take more memory than what is measured
                self.images = self.others = torch.randn(options.images, 3, 32, 32)
                return self._find_layers()
            splits = image_folder(options.data_root, 32, in_memory=True, val_list=options.val_list)
            self.images, self.others = (
                splits.images("plain", options.images),
                splits.images("val", options.images),
            )
        self._find_layers()

    def _find_layers(self):
        layers = find_layers(self.model, self.images[:1])
        rows = layers.candidates(AllowedRanks())
        self.specs = {
            name: layers.specs[name] for name in rows if layers.specs[name].kernel_size == (3, 3)
        }
        modules = dict(self.model.named_modules())
        self.weights = {name: modules[name].weight.detach() for name in self.specs}
        self.ranks = {
            name: [r for r in rows[name].values() if r is not None] for name in self.specs
        }
        self.shapes = {}  # (F, C) to the layers that have it
        for name, weight in self.weights.items():
            self.shapes.setdefault(f"{weight.shape[0]}x{weight.shape[1]}", []).append(name)

    def build(self, method, names):
        """Make the named layers at all their ranks, including the pass for covariances."""
        rows = {n: {str(rank): rank for rank in self.ranks[n]} for n in names}
        if method == "nested":
            return build_nested_candidates(self.model, self.specs, rows, self.images)
        images = self.images if method == "data" else None
        return build_candidates(self.model, self.specs, rows, images, method)

    def errors(self, found, covariances):
        """Yield layer, rank, relative weight error, and relative output error by covariances."""
        for name, row in found.items():
            for (rank, _), layer in zip(self.ranks[name], row.values(), strict=True):
                kernel = reconstruct(layer.factors())
                output = (
                    output_error(self.weights[name], kernel, covariances[name])
                    if name in covariances
                    else None
                )
                yield [name, rank, output_error(self.weights[name], kernel), output]


class Records:
    """Keep measurements by key in a file of JSON lines."""

    def __init__(self, path):
        self.path = Path(path) if path else None
        lines = self.path.read_text().splitlines() if self.path and self.path.exists() else []
        self.found = {tuple(r["key"]): r for r in map(json.loads, lines)}

    def measure(self, key, function):
        """Return the record under ``key``, or call ``function()`` and keep what it returns."""
        if key not in self.found:
            self.found[key] = {
                "key": key,
                **function(),
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps(self.found[key]) + "\n")
        return self.found[key]


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def peak_memory(options, method):
    """Measure the peak resident MiB of a fresh process that builds by ``method``.

    ``hooi`` on ResNet-18 builds only one layer of each shape, at its top rank.
    """
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", method]
    return {
        "mib": float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    }


def run_peak(bench, method):
    names = list(bench.specs)
    if method == "hooi" and bench.options.model == "resnet18":
        names = [layers[0] for layers in bench.shapes.values()]
        bench.ranks = {name: bench.ranks[name][:1] for name in names}
    if method != "nothing":
        bench.build(method, names)
    # getrusage would count the parent process before exec
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def run(options, console):
    bench, records = Bench(options), Records(options.out)
    base = (options.model, options.images, torch.get_num_threads())
    big = options.model == "resnet18"
    held_out = (
        {}
        if big
        else patch_covariances(
            bench.model, bench.specs, bench.others, max_patches=2**20, max_work=1e12, shrinkage=0
        )
    )

    def measured(method, names):
        seconds, found = timed(lambda: bench.build(method, names))
        covariances = {n: c.double().cpu() for n, c in held_out.items()}
        return {"seconds": seconds, "errors": list(bench.errors(found, covariances))}

    smallest = min(bench.shapes, key=lambda s: int(s.split("x")[0]))
    for method in (*OURS, "hooi"):
        if method != "hooi" or not big:
            bench.build(method, bench.shapes[smallest][:1])  # libraries load on first use
    parts = list(bench.shapes) if big else ["all"]
    rounds = max(options.rounds, 1)
    for number in range(max(rounds, len(parts))):
        for method in OURS:
            if number < rounds:
                records.measure(
                    (*base, method, "all", number), lambda m=method: measured(m, list(bench.specs))
                )
        if not big and number < rounds:
            records.measure(
                (*base, "hooi", "all", number), lambda: measured("hooi", list(bench.specs))
            )
        if big and number < len(parts):
            part = parts[number]
            records.measure(
                (*base, "hooi", part, 0), lambda p=part: measured("hooi", bench.shapes[p][:1])
            )
        console.print(f"round {number + 1} of {max(rounds, len(parts))}")
    for method in ("nothing", *OURS, "hooi"):
        records.measure((*base, method, "peak"), lambda m=method: peak_memory(options, m))
    show(bench, records, base, rounds, console)


def show(bench, records, base, rounds, console):
    big = base[0] == "resnet18"
    if big:
        runs = {part: records.found[(*base, "hooi", part, 0)] for part in bench.shapes}
        tensorly_times = [sum(len(bench.shapes[part]) * r["seconds"] for part, r in runs.items())]
        tensorly = [e for r in runs.values() for e in r["errors"]]
        parts = Table(
            "layer F x C",
            "layers",
            "ranks",
            "tensorly, seconds a layer",
            title="tensorly, by shape of layer",
        )
        for part, r in runs.items():
            parts.add_row(
                part, str(len(bench.shapes[part])), str(len(r["errors"])), f"{r['seconds']:.2f}"
            )
        console.print(parts)
    else:
        tensorly_times = [
            records.found[(*base, "hooi", "all", n)]["seconds"] for n in range(rounds)
        ]
        tensorly = records.found[(*base, "hooi", "all", 0)]["errors"]
    reference = {(name, rank): (w, o) for name, rank, w, o in tensorly}
    idle = records.found[(*base, "nothing", "peak")]["mib"]
    total = statistics.median(tensorly_times)
    title = (
        f"{base[0]}: {len(bench.specs)} layers, {sum(map(len, bench.ranks.values()))} candidates, "
        f"{base[2]} thread(s), {base[1]} images, {rounds} rounds"
    )
    if big:
        title += "; tensorly timed once for each shape of layer, times the layers that have it"
    table = Table(
        "method",
        "seconds",
        "times as fast as tensorly",
        "weight error, mean",
        "worst against tensorly's",
        "peak MiB added",
        title=title,
    )
    outputs = Table(
        "rank, share of channels",
        "method",
        "weight error",
        "output error, other images",
        title="means over the layers",
    )
    for method in ("hooi", *OURS):
        times = (
            tensorly_times
            if method == "hooi"
            else [records.found[(*base, method, "all", n)]["seconds"] for n in range(rounds)]
        )
        rows = tensorly if method == "hooi" else records.found[(*base, method, "all", 0)]["errors"]
        errors = {(name, rank): (w, o) for name, rank, w, o in rows if (name, rank) in reference}
        ratios = [errors[k][0] / reference[k][0] for k in errors if reference[k][0] > 1e-5]
        median = statistics.median(times)
        spread = f" ({min(times):.3f} to {max(times):.3f})" if len(times) > 1 else ""
        table.add_row(
            LABELS[method], f"{median:.3f}{spread}", f"{total / median:.1f}",
            f"{statistics.mean(w for w, _ in errors.values()):.4f}", f"{max(ratios):.4f}",
            f"{records.found[(*base, method, 'peak')]['mib'] - idle:.0f}",
        )  # fmt: skip
        for share in () if big else (0.25, 0.5, 0.75):
            at = [
                v
                for (name, rank), v in errors.items()
                if rank == share * min(bench.weights[name].shape[:2])
            ]
            means = [statistics.mean(column) for column in zip(*at, strict=True)]
            outputs.add_row(f"{share:.0%}", LABELS[method], *(f"{mean:.3f}" for mean in means))
    console.print(table)
    if not big:
        console.print(outputs)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=["resnet18", "resnet20"])
    parser.add_argument("--weights", help="trained ResNet-20")
    parser.add_argument(
        "--data-root", help="CIFAR-10 as class folders: ROOT/train/CLASS/*, ROOT/test/CLASS/*"
    )
    parser.add_argument(
        "--val-list",
        help="file that lists the validation images, which are held out; "
        "default: a tenth of the training images",
    )
    parser.add_argument(
        "--images", type=int, help="images to decompose for; default: 64 (resnet18), 512 (resnet20)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="file for the measurements; those in it are not repeated")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model == "resnet20" and not (options.weights and options.data_root):
        parser.error("resnet20 needs --weights and --data-root")
    options.images = options.images or (64 if options.model == "resnet18" else 512)
    if options.peak:
        run_peak(Bench(options), options.peak)
    else:
        run(options, Console(width=170))


if __name__ == "__main__":
    main()
