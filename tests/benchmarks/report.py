"""Write the tables and pictures of docs/results.md from the raw rows.

    python tests/benchmarks/report.py

Each table stands between two comments of the page that name it. The rows are those of
``minutes.py``, of ``latency_front.py``, and of ``cuda.py --part short``, which are moved to
docs/raw/short.jsonl. The leaderboard in tests/benchmarks/README.md is written, too.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import typer
from benchmarks.figures import note
from matplotlib.figure import Figure
from scipy import stats

DOCS = Path(__file__).parents[2] / "docs"
BOARD = Path(__file__).with_name("README.md")
LITE0_IMAGES, TEST_IMAGES = 250, 10_000
OURS = ("haloc", "sensitivity-knapsack")
RULES = ("uniform", "energy", "alds", "error-knapsack")
NAMES = {
    "haloc": "the search",
    "haloc, alpha every 4th": "the search, alpha every 4th iteration",
    "sensitivity-knapsack, r1 = r2": "sensitivity knapsack, r1 = r2",
    "sensitivity-knapsack": "sensitivity knapsack",
    "alds": "ALDS",
    "error-knapsack": "error knapsack",
    "lite0": "EfficientNet-Lite0",
    "resnet20": "ResNet-20",
    "vgg16": "VGG-16, half width",
    "macs": "MACs",
    "latency_ms": "latency",
}
COLORS = {
    "haloc": "C3",
    "sensitivity-knapsack": "C0",
    "uniform": "0.55",
    "energy": "C1",
    "alds": "C2",
    "error-knapsack": "C4",
}
Row = Mapping[str, Any]


def lead(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the mean difference in points, with Student's 95 % interval from three pairs on.

    Args:
        ours, theirs: accuracies from 0 to 1, in the same order of seeds.
    """
    if not ours:
        return ""
    middle, half = difference(ours, theirs)
    return f"{middle:+.2f}" if half is None else f"{middle:+.2f} ± {half:.2f}"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean difference in points, and half of its 95 % interval from three pairs on."""
    differences = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]
    if len(differences) < 3:
        return mean(differences), None
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return mean(differences), float(half)


def leads(ours: Mapping[int, float], theirs: Mapping[int, float], images: int) -> bool:
    """Say whether one method is ahead of another by more than the error of the difference.

    Args:
        ours, theirs: accuracies from 0 to 1, by seed.
        images: how many the accuracies are of. Their binomial error counts where fewer than three
            seeds are common to both.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = [[top1[seed] for seed in seeds] for top1 in (ours, theirs)]
    middle, half = difference(*pairs) if seeds else (0.0, None)
    if half is None:
        a, b = mean(ours.values()), mean(theirs.values())
        error = math.sqrt((a * (1 - a) + b * (1 - b)) / images)
        middle, half = 100 * (a - b), 100 * stats.norm.ppf(0.975) * error
    return middle > half


def table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def minutes(rows: Sequence[Row], network: str) -> str:
    """Show top-1 and divergence of each rule at each budget, decomposed and reconstructed."""
    mine = [row for row in rows if row["network"] == network]
    budgets = sorted({row["budget"] for row in mine}, reverse=True)
    cells = []
    for method in (OURS[1], *RULES):
        for weights in ("decomposed", "reconstructed"):
            found = {
                row["budget"]: row
                for row in mine
                if (row["method"], row["weights"]) == (method, weights)
            }
            if not found:
                continue
            spent = sum(max(row[key] for row in found.values()) for key in ("choose_s", "fit_s"))
            shown = [
                f"{100 * found[b]['top1']:.1f} ({found[b]['divergence']:.2f})" if b in found else ""
                for b in budgets
            ]
            named = NAMES.get(method, method) if weights == "decomposed" else ""
            cells.append([named, weights, *shown, f"{spent:.0f}"])
    return table(["ranks by", "weights", *(f"{100 * b:g} %" for b in budgets), "s"], cells)


def over_latency(rows: Sequence[Row]) -> str:
    """Show top-1 and the measured share of the latency, for each rule and budget."""
    shares = sorted({row["share"] for row in rows if row["method"] != "original"}, reverse=True)
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "original"):
        found = {row["share"]: row for row in rows if row["method"] == method}
        shown = [
            f"{100 * found[s]['test']:.1f} ({100 * found[s]['latency_share']:.0f} %)"
            if s in found
            else ""
            for s in shares
        ]
        seconds = max(row["choose_s"] + row["fit_s"] for row in found.values())
        cells.append([NAMES.get(method, method), *shown, f"{seconds:.0f}"])
    return table(["ranks by", *(f"budget {100 * s:g} %" for s in shares), "s"], cells)


def leaderboard(raw: Path) -> str:
    """Show one budget of each study, a column for each way to choose ranks.

    A method that is ahead of all others by more than the error is bold.
    """
    methods = ("sensitivity-knapsack", "haloc", "alds", "energy", "uniform")
    quick, latency = read(raw / "minutes.jsonl"), read(raw / "latency_front.jsonl")
    lite0 = {
        row["method"]: {0: row["top1"]}
        for row in quick
        if (row["network"], row["budget"], row["weights"]) == ("lite0", 0.7, "reconstructed")
    }
    vgg16 = {row["method"]: {0: row["test"]} for row in latency if row["share"] == 0.3}
    lines = {
        "EfficientNet-Lite0, 70 % of the MACs, no labels": (lite0, LITE0_IMAGES),
        "VGG-16, half width, 30 % of the latency, no labels": (vgg16, TEST_IMAGES),
    }
    for case, found in sorted(by_case(few_epochs(raw)).items()):
        network, metric, fraction = case
        if len(found.keys() & set(methods)) < 4 or network == "lite0":
            continue
        seeds = min(len(found[method]) for method in found.keys() & set(methods))
        title = f"{NAMES[network]}, {100 * fraction:g} % of the {NAMES[metric]}, a few epochs"
        top1 = {
            method: {seed: row["test_top1"] for seed, row in runs.items()}
            for method, runs in found.items()
        }
        least = "one seed" if seeds == 1 else f"{seeds} seeds"
        lines[f"{title} (at least {least})"] = top1, TEST_IMAGES
    cells = [
        [name, *mark({method: top1.get(method, {}) for method in methods}, images)]
        for name, (top1, images) in lines.items()
    ]
    return table(["network, budget", *(NAMES.get(m, m) for m in methods)], cells)


def mark(top1: Mapping[str, Mapping[int, float]], images: int) -> list[str]:
    """Show each method's mean top-1, bold if it is ahead of all others by more than the error."""
    shown = []
    for method, ours in top1.items():
        text = f"{100 * mean(ours.values()):.1f}" if ours else ""
        others = [theirs for name, theirs in top1.items() if theirs and name != method]
        ahead = ours and others and all(leads(ours, theirs, images) for theirs in others)
        shown.append(f"**{text}**" if ahead else text)
    return shown


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str, float], dict[str, dict[int, Row]]]:
    """Group rows by network and budget, then by method and seed; the last of equals counts."""
    found: dict[Any, Any] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        case = row["network"], row["metric"], row["fraction"]
        found[case][row["method"]][row["seed"]] = row
    return found


def short(rows: Sequence[Row]) -> str:
    """Show test accuracies and both of our methods' leads over every other one."""
    cells = []
    for case, methods in sorted(by_case(rows).items()):
        network, metric, fraction = case
        named = f"{NAMES[network]}, {100 * fraction:g} % of the {NAMES[metric]}"
        for method in sorted(methods, key=place):
            found = methods[method]
            leads = []
            for own in OURS:
                seeds = sorted(found.keys() & methods.get(own, {}).keys())
                pairs = [[m[s]["test_top1"] for s in seeds] for m in (methods.get(own, {}), found)]
                leads.append("" if own == method else lead(*pairs))
            epochs = {f"{row['epochs']:g}" for row in found.values() if "epochs" in row}
            top1 = mean(row["test_top1"] for row in found.values())
            shown = f"{100 * top1:.2f} ({len(found)})"
            cells.append(
                [named, NAMES.get(method, method), shown, *leads, "/".join(sorted(epochs))]
            )
            named = ""
    columns = ["network, budget", "ranks by", "top-1, % (seeds)", "the search's lead"]
    return table([*columns, "the knapsack's lead", "epochs of tuning"], cells)


def place(method: str) -> tuple[int, str]:
    """Return the key that sorts methods: ours, the rules, what else was tried."""
    known = (*OURS, *RULES)
    return (known.index(method) if method in known else len(known), method)


def plot_minutes(rows: Sequence[Row], path: Path) -> None:
    """Draw top-1 over the share of the MACs, reconstructed (lines) and decomposed (dots)."""
    networks = [n for n in ("lite0", "resnet20", "vgg16") if any(r["network"] == n for r in rows)]
    figure = Figure(figsize=(4 * len(networks), 4), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    lines = {}
    for axes, network in zip(panels, networks, strict=True):
        for method in (*RULES, OURS[1]):
            for weights, style in (("reconstructed", "o-"), ("decomposed", ".:")):
                points = sorted(
                    (100 * row["macs"], 100 * row["top1"])
                    for row in rows
                    if (row["network"], row["method"], row["weights"]) == (network, method, weights)
                )
                if points:
                    width = 2.2 if method in OURS else 1.2
                    pairs = zip(*points, strict=True)
                    (line,) = axes.plot(*pairs, style, color=COLORS[method], lw=width)
                    lines.setdefault(f"{NAMES.get(method, method)}, {weights}", line)
        axes.set_title(NAMES[network], fontsize=10)
        axes.set_xlabel("MACs, % of the original's")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1, %")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)


def plot_latency(rows: Sequence[Row], path: Path) -> None:
    """Draw top-1 over the measured share of the latency, the original marked."""
    figure = Figure(figsize=(7, 3.3), layout="constrained", facecolor="white")
    axes = figure.subplots()
    original = next(row for row in rows if row["method"] == "original")
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "original"):
        points = sorted(
            (100 * row["latency_share"], 100 * row["test"])
            for row in rows
            if row["method"] == method
        )
        ours = method in OURS
        label = f"{NAMES.get(method, method)}{' (the default)' if ours else ''}"
        width, size = (2.5, 7) if ours else (1.2, 5)
        pairs = zip(*points, strict=True)
        axes.plot(*pairs, "o-", color=COLORS[method], label=label, lw=width, ms=size)
    axes.plot([100], [100 * original["test"]], "k*", ms=13, label="original")
    axes.set_xlabel("measured latency, % of the original's")
    axes.set_ylabel("top-1 on the test images, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_short(rows: Sequence[Row], path: Path) -> None:
    """Draw the seeds of each method and their mean, where three methods or more were run."""
    shown = {
        case: [method for method in sorted(methods, key=place) if method in COLORS]
        for case, methods in sorted(by_case(rows).items())
    }
    shown = {case: names for case, names in shown.items() if len(names) > 2}
    if not shown:
        return
    figure = Figure(figsize=(2.1 * len(shown) + 0.6, 3.4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (case, names) in zip(panels, shown.items(), strict=True):
        network, metric, fraction = case
        for x, method in enumerate(names):
            found = by_case(rows)[case][method].values()
            values = [100 * row["test_top1"] for row in found]
            axes.plot([x] * len(values), values, ".", color=COLORS[method], alpha=0.6)
            axes.plot(x, np.mean(values), "_", color=COLORS[method], ms=16, mew=2.5)
        labels = [NAMES.get(method, method).replace("sensitivity ", "") for method in names]
        axes.set_xticks(range(len(names)), labels, rotation=60, ha="right")
        axes.tick_params(labelsize=8)
        budget = f"{100 * fraction:g} % of the {NAMES[metric]}"
        axes.set_title(f"{NAMES[network]}\n{budget}", fontsize=8)
        axes.grid(axis="y", alpha=0.3)
        low, high = axes.get_ylim()
        if high - low < 2:  # one scale for the networks whose methods lie close together
            axes.set_ylim((low + high) / 2 - 1, (low + high) / 2 + 1)
        axes.set_xlim(-0.6, len(names) - 0.4)
    panels[0].set_ylabel("top-1 on the test images, %")
    figure.savefig(path, dpi=110)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that have no error."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if "error" not in row]


def put(page: str, name: str, text: str) -> str:
    """Return a page with the text between its two comments of a name."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    found, number = pattern.subn(lambda m: f"{m[1]}{text}\n{m[2]}", page)
    if number != 1:
        raise ValueError(f"{name}: expected the page to have its two comments once")
    return found


def tables(raw: Path) -> dict[str, str]:
    """Return each table of the page by its name."""
    quick = read(raw / "minutes.jsonl")
    found = {f"minutes, {name}": minutes(quick, name) for name in ("lite0", "resnet20", "vgg16")}
    over = over_latency(read(raw / "latency_front.jsonl"))
    return found | {"latency front": over, "short": short(few_epochs(raw))}


def few_epochs(raw: Path) -> list[dict[str, Any]]:
    """Return the rows of the short study."""
    rows = read(raw / "short.jsonl")
    return [row for row in rows if row["part"] == "short" and row["scale"] == 1]


def main(
    docs: Annotated[Path, typer.Option(help="folder of results.md, raw and images")] = DOCS,
) -> None:
    page = docs / "results.md"
    text = page.read_text(encoding="utf-8")
    for name, content in tables(docs / "raw").items():
        text = put(text, name, content)
    page.write_text(text, encoding="utf-8")
    board = BOARD.read_text(encoding="utf-8")
    BOARD.write_text(put(board, "leaderboard", leaderboard(docs / "raw")), encoding="utf-8")
    rows = {
        "latency-front": (plot_latency, read(docs / "raw" / "latency_front.jsonl")),
        "minutes": (plot_minutes, read(docs / "raw" / "minutes.jsonl")),
        "short": (plot_short, few_epochs(docs / "raw")),
    }
    for name, (plot, found) in rows.items():
        picture = docs / "images" / f"{name}.png"
        plot(found, picture)
        raw = docs / "raw" / f"{name.replace('-', '_')}.jsonl"
        note(picture, "python tests/benchmarks/report.py", [raw])


if __name__ == "__main__":
    typer.run(main)
