"""Make tables and plots of a study's rows.

python tests/benchmarks/quality/report.py docs/raw/quality.jsonl --plots docs/images
"""

import itertools
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure
from rows import BUDGETS, EQUAL_COMPUTE, EQUAL_TUNING, HERE, MAIN, epochs_of_choice, read
from scipy import stats

from nni_haloc.inputs.models import build_model
from nni_haloc.space.names import DENSE, parse_rank

BLIND = {"uniform", "energy", "vbmf"}
"""Rules that derive all ranks from one number.

They keep the budget, but do not see what each candidate costs.
"""
NAMES = {"macs": "MACs", "latency_ms": "latency", "params": "parameters"}
TIED = 0.7
"""Half-width, in points, below which an interval that contains 0 means a tie."""
HOW = ("hosvd", "auto")
"""Values of ``rank_space.decomposition``: by the weights alone, and the default, by the data."""

COLUMNS = (
    *(
        "method",
        "sees costs",
        "top-1, % (seeds)",
        "haloc's lead, points (95 %)",
        "",
        "epochs",
        "minutes: ranks + tuning",
    ),
    *("cost, %", "MACs, %", "parameters, %", "latency, %", "dense layers"),
)
Lines = list[dict[str, Any]]


def interval(differences: list[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % interval (Student's t)."""
    n = len(differences)
    return mean(differences), float(
        stats.t.ppf(0.975, n - 1) * np.std(differences, ddof=1) / n**0.5
    )


def verdict(centre: float, half: float) -> str:
    if abs(centre) > half:
        return "ahead" if centre > 0 else "behind"
    return "tied" if half < TIED else "not told apart"


def by_method(
    lines: Lines, metric: str, fraction: float, kind: str
) -> dict[str, dict[int, dict[str, Any]]]:
    """Map each method to its lines by seed.

    A method whose choice of ranks costs no epoch has one line for both kinds of equality. Any other
    appears at equal compute only with a line made for that, and ranks that another row has paid for
    do not appear there at all.
    """
    rows: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    # The line of this kind comes last, so that it replaces the other.
    for line in sorted(lines, key=lambda line: line["table"] == kind):
        cell = (line["metric"], line["fraction"], line["decomposition"]) == (
            metric,
            fraction,
            "auto",
        )
        unequal = (
            kind == EQUAL_COMPUTE
            and line["table"] != kind
            and (line.get("afresh") or epochs_of_choice(line) > 0)
        )
        if cell and line["table"] in (kind, EQUAL_TUNING) and not unequal:
            rows[line["method"] + (", its ranks alone" if line.get("afresh") else "")][
                line["seed"]
            ] = line
    return dict(rows)


def table(lines: Lines, ms: dict[str, float], metric: str, fraction: float, kind: str) -> str:
    """Show each method with haloc's lead over it, paired by seed, at one budget and equality."""
    rows = by_method(lines, metric, fraction, kind)
    ours = rows.get("haloc", {})
    result = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    for method, found in sorted(rows.items(), key=lambda item: _place(item[0])):
        cells = [
            method,
            "no" if method in BLIND else "yes",
            f"{_percent(found, 'top1', 2)} ({len(found)})",
        ]
        others = found if method != "haloc" else {}
        cells += _lead(
            [
                100 * (ours[seed]["top1"] - line["top1"])
                for seed, line in others.items()
                if seed in ours
            ]
        )
        cells.append("/".join(sorted({str(line["epochs"]) for line in found.values()})))
        cells.append(
            " + ".join(
                f"{mean(line[key] for line in found.values()) / 60:.1f}"
                for key in ("choose_s", "finetune_s")
            )
        )
        over = any(line["cost_fraction"] > fraction for line in found.values())
        cells.append(_percent(found, "cost_fraction") + (" (over)" if over else ""))
        cells += [_percent(found, key) for key in ("macs_fraction", "params_fraction")]
        measured = [ms.get(json.dumps(line["ranks"])) for line in found.values()]
        cells.append(
            ""
            if None in measured
            else f"{100 * mean(m / ms['original'] for m in measured if m):.0f}"
        )
        cells.append(
            f"{mean(list(line['ranks'].values()).count(DENSE) for line in found.values()):.1f}"
        )
        result.append("| " + " | ".join(cells) + " |")
    return "\n".join(result)


def _place(method: str) -> tuple[int, str]:
    """Return the key that sorts the main methods first, in their order."""
    return (MAIN.index(method) if method in MAIN else len(MAIN), method)


def decompositions(lines: Lines) -> str:
    """Compare factors by the weights alone with factors by the data, at the same ranks.

    Shows the validation top-1 before fine-tuning, and the score after it.
    """
    rows: dict[tuple[str, float, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        if (
            line["metric"] == "macs"
            and line["table"] == EQUAL_TUNING
            and (line["decomposition"] == HOW[0] or not line.get("afresh"))
        ):
            rows[line["method"], line["fraction"], line["seed"]][line["decomposition"]] = line
    result = [
        "| ranks by | before fine-tuning: weights alone | data | after: weights alone | data |",
        "| --- " * 5 + "|",
    ]
    for (method, _, _), found in rows.items():
        if set(HOW) <= set(found):
            cells = [f"{100 * found[how]['val'][0]:.1f}" for how in HOW] + [
                f"{100 * found[how]['top1']:.2f}" for how in HOW
            ]
            result.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(result)


def _percent(found: dict[int, dict[str, Any]], key: str, digits: int = 1) -> str:
    return f"{100 * mean(line[key] for line in found.values()):.{digits}f}"


def _lead(paired: list[float]) -> list[str]:
    """Return the mean difference, with its interval and a verdict from three seeds on."""
    if len(paired) < 3:
        return [f"{mean(paired):+.2f}" if paired else "", ""]
    centre, half = interval(paired)
    return [f"{centre:+.2f} ± {half:.2f}", verdict(centre, half)]


def plot_accuracy(lines: Lines, path: Path) -> None:
    """Plot accuracy over the networks' share of the MACs: the seeds' means with their range."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="MACs, % of the original's", ylabel=f"top-1, % ({lines[0]['score']})"
    )
    methods = sorted({line["method"] for line in lines}, key=_place)
    for i, (method, marker) in enumerate(
        zip(methods, itertools.cycle("o^sDvPX*<>hd"), strict=False)
    ):
        points = defaultdict(list)
        for line in lines:
            if (
                line["method"] == method
                and line["metric"] == "macs"
                and line["table"] == EQUAL_TUNING
                and _own(line)
            ):
                points[line["fraction"]].append(line)
        rows = [points[fraction] for fraction in sorted(points)]
        # shifted a little, so that no point hides another
        x = [100 * mean(line["macs_fraction"] for line in row) + 0.1 * i for row in rows]
        y = [100 * mean(line["top1"] for line in row) for row in rows]
        spread = [
            [
                abs(100 * end(line["top1"] for line in row) - v)
                for row, v in zip(rows, y, strict=True)
            ]
            for end in (min, max)
        ]
        style = (
            {"color": f"C{i}", "linestyle": "-"}
            if method in MAIN
            else {"color": "0.35", "linestyle": ""}
        )
        axes.errorbar(
            x, y, spread if rows else None, marker=marker, capsize=3, label=method, **style
        )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def plot_ranks(lines: Lines, metric: str, fraction: float, path: Path) -> None:
    """Plot the share of its full rank that each layer keeps, a row per method (seed 0)."""
    chosen = {
        line["method"]: line["ranks"]
        for line in sorted(lines, key=lambda line: _place(line["method"]))
        if (line["metric"], line["fraction"], line["seed"], line["table"])
        == (metric, fraction, 0, EQUAL_TUNING)
        and _own(line)
    }
    modules = dict(build_model("resnet20", {}).named_modules())
    layers = list(next(iter(chosen.values())))
    full = [min(modules[layer].weight.shape[:2]) for layer in layers]
    shares = np.array(
        [
            [(parse_rank(r[n], "conv") or (f,))[0] / f for n, f in zip(layers, full, strict=True)]
            for r in chosen.values()
        ]
    )
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(chosen)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for i, names in enumerate(chosen.values()):
        for j, layer in enumerate(layers):
            text = "D" if names[layer] == DENSE else names[layer].removeprefix("r")
            axes.text(
                j,
                i,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="black" if shares[i, j] > 0.55 else "white",
            )
    axes.set_yticks(range(len(chosen)), list(chosen))
    axes.set_xticks(
        range(len(layers)),
        [n.removeprefix("layer") for n in layers],
        rotation=60,
        ha="right",
        fontsize=8,
    )
    axes.set_title(f"ranks at {100 * fraction:g} % of the {NAMES[metric]} (D: dense)", fontsize=10)
    figure.colorbar(image, label="share of the full rank")
    figure.savefig(path, dpi=150)


def _own(line: dict[str, Any]) -> bool:
    """Tell a method's own row from one that shows only a part of the method."""
    return line["decomposition"] == "auto" and not line.get("afresh")


def main(
    raw: Annotated[Path, typer.Argument()] = HERE.parents[2] / "docs" / "raw" / "quality.jsonl",
    plots: Annotated[Path | None, typer.Option(help="folder for the plots")] = None,
    into: Annotated[
        Path | None, typer.Option(help="a page whose tables are replaced; else they are printed")
    ] = None,
) -> None:
    lines, latencies = read(raw), raw.with_name(f"{raw.stem}-latency.json")
    ms = json.loads(latencies.read_text(encoding="utf-8")) if latencies.exists() else {}
    cells = sorted(
        {(line["metric"], line["fraction"]) for line in lines if line["method"] == "haloc"},
        reverse=True,
    )
    tables = [
        f"\n**{100 * fraction:g} % of the {NAMES[metric]}, {kind}**\n\n"
        f"{table(lines, ms, metric, fraction, kind)}\n"
        for metric, fraction in cells
        for kind in (
            (EQUAL_TUNING, EQUAL_COMPUTE) if (metric, fraction) in BUDGETS else (EQUAL_TUNING,)
        )
    ]
    if any(line["decomposition"] == HOW[0] for line in lines):
        tables.append(
            "\n**Decomposition by the weights alone, and by the data**\n\n"
            f"{decompositions(lines)}\n"
        )
    if into is None:
        print("".join(tables))
    else:
        before, mark, rest = into.read_text(encoding="utf-8").partition("<!-- tables -->\n")
        end = rest.index("<!-- end of tables -->")
        into.write_text(before + mark + "".join(tables) + "\n" + rest[end:], encoding="utf-8")
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        plot_accuracy(lines, plots / "quality.png")
        for metric, fraction in cells:
            plot_ranks(lines, metric, fraction, plots / f"ranks-{metric}-{fraction:g}.png")


if __name__ == "__main__":
    typer.run(main)
