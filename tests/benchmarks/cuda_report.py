"""Make tables of the rows that ``cuda.py`` has appended.

PYTHONPATH=tests python tests/benchmarks/cuda_report.py docs/raw/cuda.jsonl
"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import typer
from benchmarks.promise import table as promise

Rows = list[dict[str, Any]]


def table(columns: list[str], cells: list[list[Any]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def tests(rows: Rows) -> str:
    counts = ("passed", "failed", "errors", "skipped", "ended")
    return table(
        [*counts, "not passed"],
        [[*(row.get(key, 0) for key in counts), ", ".join(row["not_passed"])] for row in rows],
    )


def speed(rows: Rows) -> str:
    """Show images a second, and search iterations over the ordinary step of the same mode."""
    steps = {
        (row["network"], row["mode"]): row["ms"][1] for row in rows if row.get("candidates") == 0
    }
    limits = {row["network"]: row["ms"] for row in rows if row["part"] == "limit"}
    cells = []
    for row in rows:
        if row["part"] == "limit":
            continue
        low, middle, high = row["ms"]
        step = steps.get((row["network"], row["mode"]))
        kind = f"search, {row['candidates']} candidates" if row["candidates"] else "ordinary step"
        limit = limits.get(row["network"])
        cells.append(
            [
                f"{row['network']}, {row['batch']}",
                row["mode"],
                kind,
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
                f"{row['images_per_s']:,.0f}",
                f"{middle / step:.2f}" if step and row["candidates"] else "",
                f"{limit:.2f}" if limit and not row["candidates"] else "",
            ]
        )
    return table(
        ["network, batch", "passes", "what", "ms", "images/s", "of a step", "limit, ms"], cells
    )


def tables(rows: Rows) -> str:
    cells = []
    for row in rows:
        times = {name: median(values) for name, values in row["ms"].items()}
        pairs = zip(row["ms"]["ours"], row["ms"]["uniform"], strict=True)
        cells.append(
            [
                f"{row['batch']}, {'graph' if row['graph'] else 'eager'}",
                f"{row['entries']} in {row['table_s']:.0f} s",
                f"{100 * row['spread']:.1f}",
                f"{100 * row['network_error']:.1f}",
                *(f"{times[name]:.3f}" for name in ("original", "uniform", "ours")),
                f"{times['original'] / times['ours']:.2f}",
                f"{100 * median(1 - ours / uniform for ours, uniform in pairs):.0f}",
            ]
        )
    columns = ["batch, passes", "entries", "spread, %", "error of networks, %"]
    columns += ["original, ms", "uniform, ms", "ours, ms", "times as fast", "under uniform, %"]
    return table(columns, cells)


def long(rows: Rows) -> str:
    found: dict[tuple[str, str], Rows] = defaultdict(list)
    for row in rows:
        found[row["network"], row["method"]].append(row)
    cells = []
    for (network, method), lines in list(found.items()):
        originals = {
            (row["seed"], row["original"]): row["test_top1"] for row in found[network, "original"]
        }
        differences = [
            100 * (row["test_top1"] - originals[row["seed"], row["original"]])
            for row in lines
            if (row["seed"], row["original"]) in originals and method != "original"
        ]
        cells.append(
            [
                network,
                method,
                f"{100 * mean(row['test_top1'] for row in lines):.2f} ({len(lines)})",
                f"{mean(differences):+.2f}" if differences else "",
                *(
                    f"{100 * mean(row[key] for row in lines):.1f}"
                    for key in ("macs_fraction", "params_fraction")
                ),
                lines[0]["epochs"],
                f"{mean(row['seconds'] for row in lines) / 60:.1f}",
            ]
        )
    columns = ["network", "method", "top-1, % (seeds)", "against the original", "MACs, %"]
    return table([*columns, "parameters, %", "epochs", "minutes"], cells)


def short(rows: Rows) -> str:
    """Show the means over the seeds."""
    found: dict[tuple[str, str, float, str], Rows] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["network"], row["metric"], row["fraction"])):
        found[row["network"], row["metric"], row["fraction"], row["method"]].append(row)
    cells = [
        [
            network,
            f"{100 * fraction:g} % of {metric}",
            method,
            len(lines),
            *(
                f"{100 * mean(row[key] for row in lines):.2f}" if key in lines[0] else ""
                for key in ("val_top1", "test_top1")
            ),
            f"{lines[0].get('epochs', 40):g}",
        ]
        for (network, metric, fraction, method), lines in found.items()
    ]
    columns = ["network", "budget", "method", "seeds", "validation, %", "test, %", "epochs"]
    return table(columns, cells)


def budget(rows: Rows) -> str:
    cells = []
    for row in rows:
        if "refused" in row:
            told = f"{row['network']}, {100 * row['fraction']:.0f} %"
            cells.append([told, row["method"], row["refused"], *[""] * 6])
            continue
        timed = row["timed"]
        cells.append(
            [
                f"{row['network']}, {100 * row['fraction']:.0f} %",
                row["method"],
                f"{timed['original_ms']:.3f}",
                f"{timed['planned_ms']:.3f}",
                f"{100 * timed['measured_share']:.1f}",
                f"{timed['table_factor']:.2f}",
                *(f"{100 * row[key]:.1f}" for key in ("macs_fraction", "original_top1")),
                f"{100 * row['test_top1']:.1f}",
            ]
        )
    columns = ["network, budget", "ranks by", "original, ms", "compressed, ms", "measured, %"]
    columns += ["table's factor", "MACs, %", "original's validation top-1, %", "top-1, %"]
    return table(columns, cells)


PARTS = {
    "tests": tests,
    "speed": speed,
    "table": tables,
    "budget": budget,
    "promise": promise,
    "short": short,
    "long": long,
}


def main(raw: Annotated[Path, typer.Argument(help="the rows")]) -> None:
    lines = [json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines()]
    for device in dict.fromkeys(line["device"] for line in lines):
        for part, show in PARTS.items():
            parts = {part, "limit"} if part == "speed" else {part}
            rows = [row for row in lines if row["device"] == device and row["part"] in parts]
            good = [row for row in rows if not {"error", "refused_at_once"} & row.keys()]
            if good:
                print(f"\n**{part}: {device}, torch {good[0]['torch']}**\n\n{show(good)}")
            for row in rows:
                if why := row.get("error") or row.get("refused_at_once"):
                    print(f"\nno figures: {row['part']}, {row.get('network')}: {why}")


if __name__ == "__main__":
    typer.run(main)
