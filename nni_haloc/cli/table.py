"""The counts of the paper's tables, for any model, and how large its rank space is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from nni_haloc.costs.counts import network_counts
from nni_haloc.costs.measure import Parser, model_of
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.space.ranks import find_layers
from nni_haloc.space.summary import space_report, space_sizes
from nni_haloc.utils.printing import text_table


def table_main(arguments: Sequence[str] | None = None) -> None:
    """Print every layer's candidates, the size of the rank space, and what the network costs, before and after a plan."""
    parser = Parser(
        "haloc table",
        "Count a model: its layers, its rank space, multiply-accumulates and parameters.",
    )
    parser.model_options(None)
    parser.add_argument(
        "--plan", type=Path, help="a ranks.json: what is left of the counts with it"
    )
    options = parser.parse_args(arguments)
    plan = None if options.plan is None else RankPlan.load(options.plan)
    model, example, rules = model_of(options)
    before = network_counts(model, example)
    header: tuple[str, ...] = ("count", "original")
    rows: list[tuple[str, ...]] = [(name, f"{count:,}") for name, count in before.items()]
    if plan is not None:
        after = _counts_with(plan, str(options.plan), model, example)
        less = {
            name: f"{100 * (1 - after[name] / count):.2f}" if count else ""
            for name, count in before.items()
        }
        header, rows = (
            (*header, str(options.plan), "less, %"),
            [(*row, f"{after[row[0]]:,}", less[row[0]]) for row in rows],
        )
    layers = find_layers(model, example, rules)
    print(space_report(model, layers.candidates(rules), layers.left_alone), end="\n\n")
    sizes = space_sizes(layers, rules)
    print(
        text_table(
            ("rank space", "networks"),
            [(name, f"{size:.1e}" if size > 10**6 else str(size)) for name, size in sizes.items()],
        )
    )
    print("\n" + text_table(header, rows))


def _counts_with(
    plan: RankPlan, file: str, model: nn.Module, example_input: Tensor
) -> dict[str, int]:
    """`network_counts` with a plan's layers; ValueError names its file where the model does not have them, or does not run with them."""
    try:
        return network_counts(restructure(model, plan), example_input)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except Exception as error:  # of the model's own code
        raise ValueError(
            f"{file}: {type(model).__name__} does not run with the plan's layers ({error!r})"
        ) from None
