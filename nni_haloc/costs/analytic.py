"""Cost tables that are counted: MACs, parameters, memory of activations; a roofline's latency."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nni_haloc.costs.counts import count_macs, count_params
from nni_haloc.costs.device.measure import time_together
from nni_haloc.costs.device.runtime import Runtime
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.latency import forward_pass
from nni_haloc.costs.table import CostTable
from nni_haloc.space.layers import LayerSpec, Work
from nni_haloc.space.modules import Example, batch_size_of, call, copy_of, input_shape, materialised
from nni_haloc.space.names import Rank
from nni_haloc.space.ranks import AllowedRanks, Layers, find_layers, macs, params

FLOAT_BYTES = 4
COUNTED = ("macs", "params", "activation_bytes")
"""Metrics that are counted in no time, however many candidates there are."""


def mac_table(
    model: nn.Module,
    example_input: Example,
    allowed: AllowedRanks = AllowedRanks(),
    layers: Layers | None = None,
) -> CostTable:
    """Count the multiply-accumulates of every candidate, for one image.

    Args:
        model: the original network.
        example_input: one input or a batch, ``(N, ...)``.
        allowed: the rank space.
        layers: the result of `find_layers`, if it is known already.

    Returns:
        The table, in multiply-accumulates.

    Raises:
        ValueError: if the model can't be copied, or a pattern of ``allowed`` matches no layer.
    """
    return _table(
        "macs",
        model,
        example_input,
        allowed,
        macs,
        float(count_macs(model, example_input)),
        layers=layers,
    )


def param_table(
    model: nn.Module,
    example_input: Example,
    allowed: AllowedRanks = AllowedRanks(),
    layers: Layers | None = None,
) -> CostTable:
    """Count the parameters of every candidate.

    Args:
        model: the original network.
        example_input: one input or a batch, ``(N, ...)``.
        allowed: the rank space.
        layers: the result of `find_layers`, if it is known already.

    Returns:
        The table, in parameters.

    Raises:
        ValueError: if the model can't be copied, or a pattern of ``allowed`` matches no layer.
    """
    model = materialised(model, example_input)
    return _table(
        "params", model, example_input, allowed, params, float(count_params(model)), layers=layers
    )


def activation_table(
    model: nn.Module, example_input: Example, allowed: AllowedRanks = AllowedRanks()
) -> CostTable:
    """Count the bytes (float32) that the outputs of all layers take for one image.

    The outputs between a candidate's factors are included. ``fixed`` is the outputs of all other
    modules without children; results of functional calls are not counted.
    """

    def cost(spec: LayerSpec, rank: Rank) -> int:
        return FLOAT_BYTES * sum(w.outputs * w.after for w in spec.work(rank))

    outputs = _leaf_outputs(model, example_input)
    whole = FLOAT_BYTES * sum(size for _, sizes in outputs.values() for size in sizes)
    return _table("activation_bytes", model, example_input, allowed, cost, float(whole))


def roofline_table(
    model: nn.Module,
    example_input: Example,
    allowed: AllowedRanks = AllowedRanks(),
    *,
    flops: float,
    bandwidth: float,
) -> CostTable:
    """Compute the least milliseconds that every candidate can take for a batch, in float32.

    Each factor takes the longer of its work and its traffic (input, output and weights once each).
    ``fixed`` is reading and writing the other modules' outputs once, and the work of the other
    convolutions and linear layers.

    Args:
        model: the original network.
        example_input: the batch, ``(N, ...)``.
        allowed: the rank space.
        flops: floating-point operations a second; see `measure_peaks`.
        bandwidth: bytes a second.
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

    layers = find_layers(model, example_input, allowed)
    everything = find_layers(
        model, example_input, AllowedRanks(1, kinds=("conv", "pointwise", "linear")), frozen=False
    ).specs
    others = sum(
        cost(spec, None)
        for name, spec in everything.items()
        if name not in layers.candidates(allowed)
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
    return _table("latency_ms", model, example_input, allowed, cost, None, rest, identity)


def measure_peaks(runtime: Runtime = TorchRuntime(), size: int = 1024) -> tuple[float, float]:
    """Measure what a device reaches in a matrix product and in copying a large array.

    Args:
        runtime: what runs both.
        size: rows and columns of the matrices; the copied array has 32 times as many rows.

    Returns:
        Floating-point operations a second, and bytes a second.
    """
    product, copy = nn.Linear(size, size, bias=False), _Copy()
    with runtime.pinned():
        runs = {
            "product": forward_pass(runtime, product, (size, size)),
            "copy": forward_pass(runtime, copy, (32 * size, size)),
        }
        seconds = time_together(runs, runtime, 0.5)
    return 2 * size**3 / seconds["product"], 2 * FLOAT_BYTES * 32 * size**2 / seconds["copy"]


class _Copy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def _leaf_outputs(
    model: nn.Module, example_input: Example
) -> dict[str, tuple[type[nn.Module], list[int]]]:
    """Map each module without children to its class and to the sizes of its outputs.

    The sizes are elements for one image, one size for each call.
    """
    model = copy_of(model).eval()  # the user's own stays without hooks, and is not called
    outputs: dict[str, tuple[type[nn.Module], list[int]]] = {}
    for name, module in model.named_modules():
        if not list(module.children()):

            def keep(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                if isinstance(out, Tensor):
                    sizes = outputs.setdefault(name, (type(module), []))[1]
                    sizes.append(out.numel() // batch_size_of(example_input))

            module.register_forward_hook(keep)
    call(model, example_input)
    return outputs


def _table(
    metric: str,
    model: nn.Module,
    example_input: Example,
    allowed: AllowedRanks,
    cost: Callable[[LayerSpec, Rank], float],
    whole: float | None,
    rest: float = 0.0,
    identity: dict[str, Any] | None = None,
    layers: Layers | None = None,
) -> CostTable:
    """Make a table; ``whole`` is the network's cost, or None if ``rest`` is that of the others."""
    layers = layers or find_layers(model, example_input, allowed)
    costs = {}
    for name, row in layers.candidates(allowed).items():
        spec = layers.specs[name]
        costs[name] = {
            candidate: float(cost(spec, rank))
            for candidate, rank in ({"dense": None} | row).items()
        }
    fixed = rest if whole is None else whole - sum(row["dense"] for row in costs.values())
    return CostTable(metric, costs, fixed, identity or {"input": input_shape(example_input)})
