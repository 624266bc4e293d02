"""Count a network as the paper's tables do, and say how large its rank space is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nni_haloc.costs.counts import network_counts
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.space.summary import space_report, space_sizes
from nni_haloc.utils.printing import text_table


def counted(
    model: nn.Module, example_input: Tensor, allowed: AllowedRanks, plan_file: Path | None = None
) -> dict[str, Any]:
    """Return a network's layers with their candidates, the size of its rank space, and its counts.

    Args:
        model: the original network.
        example_input: a batch of its inputs, ``(N, ...)``.
        allowed: the rank space.
        plan_file: a ``ranks.json``; its network is counted, too.

    Returns:
        ``layers``, a `SpaceReport`; ``rank_space``, a dict of numbers of networks, and
        ``rank_space_3x3``, the same of the 3x3 convolutions alone, as the paper counts; ``counts``,
        a dict of names (``original``, the plan's file) to dicts of counts for one image.

    Raises:
        ValueError: if the plan does not fit the network.
        OSError: if its file can't be read.
    """
    plan = None if plan_file is None else RankPlan.load(plan_file)
    counts = {"original": network_counts(model, example_input)}
    if plan is not None:
        counts[str(plan_file)] = _counts_with(plan, str(plan_file), model, example_input)
    layers = find_layers(model, example_input, allowed)
    return {
        "layers": space_report(model, layers.candidates(allowed), layers.left_alone),
        "rank_space": space_sizes(layers, allowed),
        "rank_space_3x3": space_sizes(layers, allowed, (3, 3)),
        "counts": counts,
    }


def print_counted(content: dict[str, Any]) -> None:
    """Print what `counted` returns: three tables."""
    every, of_3x3, counts = (content[key] for key in ("rank_space", "rank_space_3x3", "counts"))
    print(f"{content['layers']}\n")
    shown = [(name, _short(size), _short(of_3x3[name])) for name, size in every.items()]
    print(text_table(("rank space", "networks", "3x3 layers alone"), shown) + "\n")
    before, *after = counts.values()
    header = ["count", *counts, *(["less, %"] if after else [])]
    rows = []
    for name, count in before.items():
        row = [name, *(f"{each[name]:,}" for each in counts.values())]
        if after:
            row.append(f"{100 * (1 - after[0][name] / count):.2f}" if count else "")
        rows.append(row)
    print(text_table(header, rows))


def _short(size: int) -> str:
    return f"{size:.1e}" if size > 10**6 else str(size)


SIZES = ("all", "multiples", "equal", "searched")
COUNTS = ("macs", "macs_paper", "params")
"""Short names, for JSON, of what `space_sizes` and `network_counts` return."""


def as_json(content: dict[str, Any]) -> dict[str, Any]:
    """Return what `counted` returns as plain lists and dicts with short keys."""
    return {
        "layers": [vars(row) for row in content["layers"]],
        **{
            key: dict(zip(SIZES, content[key].values(), strict=True))
            for key in ("rank_space", "rank_space_3x3")
        },
        "counts": {
            name: dict(zip(COUNTS, counts.values(), strict=True))
            for name, counts in content["counts"].items()
        },
    }


def _counts_with(
    plan: RankPlan, file: str, model: nn.Module, example_input: Tensor
) -> dict[str, int]:
    """Count a network with a plan's layers in place.

    Raises:
        ValueError: names the plan's file.
    """
    try:
        return network_counts(restructure(model, plan), example_input)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except Exception as error:  # of the model's own code
        raise ValueError(
            f"{file}: {type(model).__name__} does not run with the plan's layers ({error!r})"
        ) from None
