"""Check that the rank space has a network for each of the paper's rows (Tables 1 and 2).

    python tests/benchmarks/paper_rows.py

A knapsack limits multiply-accumulates (the paper's count) and parameters together: it looks for a
plan that cuts both by at least what the row says. The spaces are tried from the default to every
rank of every layer, and the first that has such a plan is printed. Accuracy is not measured:
whether the plan is good is another question.
"""

import math

import torch
import typer

from nni_haloc.costs.analytic import mac_table, param_table
from nni_haloc.costs.counts import count_macs, count_paper_macs, count_params
from nni_haloc.inputs.models import build_model
from nni_haloc.plan.budget import Limit, choose
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.space.names import parse_rank
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.utils.errors import InfeasibleBudget

# By network: image size, the kinds of layers that carry its weights, and the paper's rows, each the
# reduction of MACs and of parameters in percent.
ROWS = {
    "resnet20": (32, ("conv",), [(72.20, 76.10)]),
    "vgg16": (32, ("conv",), [(86.44, 98.56)]),
    "torchvision:resnet18": (224, ("conv", "pointwise"), [(66.16, 63.64), (63.81, 71.31)]),
    "torchvision:mobilenet_v2": (224, ("conv", "pointwise"), [(24.84, 40.03), (45.65, 62.59)]),
}


def spaces(kinds):
    """Yield rank spaces with their names, from the default to the largest."""
    for more in ((), ("linear",)):
        for step in ("paper", 8, 2, 1):
            steps = "by layer" if step == "paper" else step
            name = f"step {steps}{', the classifier too' if more else ''}"
            yield name, AllowedRanks(step=step, kinds=kinds + more)


def find_plan(model, x, allowed, fewer_macs, fewer_params):
    """Choose ranks within both limits that leave much in every layer; None if there are none."""
    macs, params = mac_table(model, x, allowed), param_table(model, x, allowed)
    paper = count_paper_macs(model, x)
    limits = [
        Limit(macs, (1 - fewer_macs / 100) * paper - (paper - count_macs(model, x))),
        Limit(params, (1 - fewer_params / 100) * count_params(model)),
    ]
    try:
        return choose(
            {
                layer: {name: math.sqrt(cost) for name, cost in row.items()}
                for layer, row in params.costs.items()
            },
            limits,
        )
    except InfeasibleBudget:
        return None


def main() -> None:
    print(
        "| network | row: MACs, parameters, % less | first rank space that has it "
        "| found, % less | ranks |"
    )
    print("| --- " * 5 + "|")
    for name, (size, kinds, rows) in ROWS.items():
        model, x = build_model(name).eval(), torch.zeros(1, 3, size, size)
        before = count_paper_macs(model, x), count_params(model)
        for row in rows:
            options = (
                (space, allowed, find_plan(model, x, allowed, *row))
                for space, allowed in spaces(kinds)
            )
            space, allowed, choice = next(
                (option for option in options if option[2] is not None), ("", AllowedRanks(), None)
            )
            if choice is None:
                print(f"| {name} | {row[0]}, {row[1]} | none | | |")
                continue
            specs = find_layers(model, x, allowed).specs
            plan = RankPlan(
                {
                    layer: parse_rank(candidate, specs[layer].kind)
                    for layer, candidate in choice.items()
                }
            )
            network = restructure(model, plan)
            less = [
                100 * (1 - a / b)
                for a, b in zip(
                    (count_paper_macs(network, x), count_params(network)), before, strict=True
                )
            ]
            shown = " ".join(candidate.removeprefix("r") for candidate in choice.values())
            print(
                f"| {name} | {row[0]}, {row[1]} | {space} "
                f"| {less[0]:.2f}, {less[1]:.2f} | {shown} |",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
