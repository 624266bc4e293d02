"""Costs that can be counted: multiply-accumulates, parameters, memory of activations; and a roofline's latency."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nni_haloc.costs.counts import count_macs, count_params
from nni_haloc.costs.device.measuring import time_together
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.table import CostTable
from nni_haloc.space.layers import LayerSpec, Work
from nni_haloc.space.modules import Example, batch_size_of, call, copy_of, input_shape, materialised
from nni_haloc.space.names import Rank
from nni_haloc.space.ranks import Layers, RankRules, find_layers, macs, params

FLOAT_BYTES = 4


def mac_table(
    model: nn.Module,
    example_input: Example,
    rules: RankRules = RankRules(),
    layers: Layers | None = None,
) -> CostTable:
    """Multiply-accumulates of every candidate, for one image; ``layers``: what `find_layers` gave, where that is known."""
    return _table(
        "macs",
        model,
        example_input,
        rules,
        macs,
        float(count_macs(model, example_input)),
        layers=layers,
    )


def param_table(
    model: nn.Module,
    example_input: Example,
    rules: RankRules = RankRules(),
    layers: Layers | None = None,
) -> CostTable:
    """Parameters of every candidate; ``layers``: see `mac_table`."""
    model = materialised(model, example_input)
    return _table(
        "params", model, example_input, rules, params, float(count_params(model)), layers=layers
    )


def activation_table(
    model: nn.Module, example_input: Example, rules: RankRules = RankRules()
) -> CostTable:
    """Bytes (float32) that the outputs of all layers take for one image, those between a candidate's factors included.

    ``fixed``: the outputs of all other modules without children; what functional calls leave is not counted.
    """

    def cost(spec: LayerSpec, rank: Rank) -> int:
        return FLOAT_BYTES * sum(w.outputs * w.after for w in spec.work(rank))

    outputs = _leaf_outputs(model, example_input)
    whole = FLOAT_BYTES * sum(size for _, sizes in outputs.values() for size in sizes)
    return _table("activation_bytes", model, example_input, rules, cost, float(whole))


def roofline_table(
    model: nn.Module,
    example_input: Example,
    rules: RankRules = RankRules(),
    *,
    flops: float,
    bandwidth: float,
) -> CostTable:
    """Milliseconds that every candidate takes at the least for the batch of ``example_input (N, ...)``, of floats.

    Each factor takes the longer of its work at ``flops`` (floating-point operations a second) and its traffic at ``bandwidth`` (bytes a
    second; input, output and weights once each). ``fixed``: the other modules' outputs read and written once, and the work of the other
    convolutions and linear layers. For both rates, see `measure_peaks`.
    """
    images = batch_size_of(example_input)

    def seconds(work: Work) -> float:
        weights = work.inputs * work.outputs * work.kernel
        traffic = FLOAT_BYTES * (
            images * (work.inputs * work.before + work.outputs * work.after) + weights
        )
        return max(2 * images * weights * work.after / flops, traffic / bandwidth)

    def cost(spec: LayerSpec, rank: Rank) -> float:
        return 1e3 * sum(seconds(work) for work in spec.work(rank))

    layers = find_layers(model, example_input, rules)
    everything = find_layers(
        model, example_input, RankRules(1, kinds=("conv", "pointwise", "linear"))
    ).specs
    others = sum(
        cost(spec, None)
        for name, spec in everything.items()
        if name not in layers.candidates(rules)
    )
    plain = [
        size
        for name, (kind, sizes) in _leaf_outputs(model, example_input).items()
        if name not in everything and not issubclass(kind, nn.Flatten | nn.Identity | nn.Dropout)
        for size in sizes
    ]
    rest = others + 1e3 * 2 * FLOAT_BYTES * images * sum(plain) / bandwidth
    identity = {
        "input": input_shape(example_input, batch=True),
        "kind": "roofline",
        "flops": flops,
        "bandwidth": bandwidth,
    }
    return _table("latency_ms", model, example_input, rules, cost, None, rest, identity)


def measure_peaks(runtime: TorchRuntime = TorchRuntime(), size: int = 1024) -> tuple[float, float]:
    """Floating-point operations and bytes a second that a device reaches in a matrix product and in copying a large array."""
    product, copy = nn.Linear(size, size, bias=False), _Copy()
    with runtime.pinned():
        runs = {
            "product": runtime.ready(product, (size, size)),
            "copy": runtime.ready(copy, (32 * size, size)),
        }
        seconds = time_together(runs, runtime, 0.5)
    return 2 * size**3 / seconds["product"], 2 * FLOAT_BYTES * 32 * size**2 / seconds["copy"]


class _Copy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def _leaf_outputs(
    model: nn.Module, example_input: Example
) -> dict[str, tuple[type[nn.Module], list[int]]]:
    """Of each module without children: its class, and the elements of its output in each call, for one image."""
    model = copy_of(model).eval()  # not the user's own: hooks, and what it does when it is called
    found: dict[str, tuple[type[nn.Module], list[int]]] = {}
    for name, module in model.named_modules():
        if not list(module.children()):

            def keep(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                if isinstance(out, Tensor):
                    found.setdefault(name, (type(module), []))[1].append(
                        out.numel() // batch_size_of(example_input)
                    )

            module.register_forward_hook(keep)
    call(model, example_input)
    return found


def _table(
    metric: str,
    model: nn.Module,
    example_input: Example,
    rules: RankRules,
    cost: Callable[[LayerSpec, Rank], float],
    whole: float | None,
    rest: float = 0.0,
    identity: dict[str, Any] | None = None,
    layers: Layers | None = None,
) -> CostTable:
    """``whole``: the network's cost, or None where ``rest`` says that of everything else."""
    layers = layers or find_layers(model, example_input, rules)
    costs = {}
    for name, row in layers.candidates(rules).items():
        spec = layers.specs[name]
        costs[name] = {
            candidate: float(cost(spec, rank))
            for candidate, rank in ({"dense": None} | row).items()
        }
    fixed = rest if whole is None else whole - sum(row["dense"] for row in costs.values())
    return CostTable(metric, costs, fixed, identity or {"input": input_shape(example_input)})
