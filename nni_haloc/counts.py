"""The counts of the paper's tables, for any model, and how large its rank space is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from .compression import restructure
from .measure import Parser, model_of
from .predictors.analytic import count_macs, count_paper_macs, count_params
from .printing import text_table
from .ranks import Layers, RankPlan, RankRules, find_layers
from .report import space_report


def table_main(arguments: Sequence[str] | None = None) -> None:
    """Print every layer's candidates, the size of the rank space, and what the network costs, before and after a plan."""
    parser = Parser("haloc table", "Count a model: its layers, its rank space, multiply-accumulates and parameters.")
    parser.model_options(None)
    parser.add_argument("--plan", type=Path, help="a ranks.json: what is left of the counts with it")
    options = parser.parse_args(arguments)
    plan = None if options.plan is None else RankPlan.load(options.plan)
    model, example, rules = model_of(options)
    before = network_counts(model, example)
    header: tuple[str, ...] = ("count", "original")
    rows: list[tuple[str, ...]] = [(name, f"{count:,}") for name, count in before.items()]
    if plan is not None:
        after = _counts_with(plan, str(options.plan), model, example)
        less = {name: f"{100 * (1 - after[name] / count):.2f}" if count else "" for name, count in before.items()}
        header, rows = (*header, str(options.plan), "less, %"), [(*row, f"{after[row[0]]:,}", less[row[0]]) for row in rows]
    layers = find_layers(model, example, rules)
    print(space_report(model, layers.candidates(rules), layers.left_alone), end="\n\n")
    sizes = space_sizes(layers, rules)
    print(text_table(("rank space", "networks"), [(name, f"{size:.1e}" if size > 10**6 else str(size)) for name, size in sizes.items()]))
    print("\n" + text_table(header, rows))


def space_sizes(layers: Layers, rules: RankRules) -> dict[str, int]:
    """How many networks there are: with any ranks; with those that are multiples of the step (design principle 1); with r1 = r2, too
    (principle 2); and what is searched: without ranks that need as many multiply-accumulates as the dense layer, and with that layer.

    Of 1x1 convolutions and linear layers, whose kernels are matrices, the rank is one number.
    """
    sizes = dict.fromkeys(("all ranks", "multiples of the step", "r1 = r2, too"), 1)
    for spec in layers.specs.values():
        step = rules.step_of(spec)
        channels = (spec.out_channels, spec.in_channels)
        pairs = channels if spec.kind == "conv" else (min(channels),)
        sizes["all ranks"] *= math.prod(pairs)
        sizes["multiples of the step"] *= math.prod(max(1, n // step) for n in pairs)
        sizes["r1 = r2, too"] *= max(1, min(channels) // step)
    sizes["searched"] = math.prod(len(row) for row in layers.candidates(rules).values())
    return sizes


def network_counts(model: nn.Module, example_input: Tensor) -> dict[str, int]:
    """Multiply-accumulates for one image, by the paper's count and plain, and parameters. ``example_input (N, ...)``."""
    return {
        "MACs (convolutions and matrix products)": count_macs(model, example_input),
        "MACs (the paper's count: normalisation and pooling, too)": count_paper_macs(model, example_input),
        "parameters": count_params(model),
    }


def _counts_with(plan: RankPlan, file: str, model: nn.Module, example_input: Tensor) -> dict[str, int]:
    """`network_counts` with a plan's layers; ValueError names its file where the model does not have them, or does not run with them."""
    try:
        return network_counts(restructure(model, plan), example_input)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except Exception as error:  # of the model's own code
        raise ValueError(f"{file}: {type(model).__name__} does not run with the plan's layers ({error!r})") from None
