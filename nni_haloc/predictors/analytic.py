"""Costs that can be counted: multiply-accumulates and parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..layers import LayerSpec
from ..ranks import Rank, RankRules, evaluating, find_layers, macs, params
from .table import CostTable


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """Multiply-accumulates of convolutions and matrix products in a forward pass of one image, by torch's own counter.

    ``example_input (N, ...)``: the count is divided by N. Biases, normalisation and activations are not counted.
    """
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example_input)
    return counter.get_total_flops() // (2 * example_input.shape[0])


def count_params(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def mac_table(model: nn.Module, example_input: Tensor, rules: RankRules = RankRules()) -> CostTable:
    """Multiply-accumulates of every candidate, for one image."""
    return _table("macs", model, example_input, rules, macs, float(count_macs(model, example_input)))


def param_table(model: nn.Module, example_input: Tensor, rules: RankRules = RankRules()) -> CostTable:
    """Parameters of every candidate."""
    return _table("params", model, example_input, rules, params, float(count_params(model)))


def _table(
    metric: str,
    model: nn.Module,
    example_input: Tensor,
    rules: RankRules,
    cost: Callable[[LayerSpec, Rank], int],
    whole: float,
) -> CostTable:
    layers = find_layers(model, example_input, rules)
    costs = {}
    for name, row in layers.candidates(rules).items():
        spec = layers.specs[name]
        costs[name] = {candidate: float(cost(spec, rank)) for candidate, rank in ({"dense": None} | row).items()}
    fixed = whole - sum(row["dense"] for row in costs.values())
    return CostTable(metric, costs, fixed, {"input": list(example_input.shape[1:])})
