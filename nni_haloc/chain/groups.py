"""Find the channels of a network that can be pruned, and those that can only be pruned together.

Convolutions whose outputs are added up belong together.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from nni_haloc.space.layers import Factorised

_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.SiLU, nn.GELU, nn.Identity, nn.Dropout,
    nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.Flatten,
)  # fmt: skip
_FUNCTIONS = {
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.hardswish, F.silu, F.gelu, F.dropout,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
}  # fmt: skip
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
"""Sums. Like the operations above they keep channels apart, and zero channels zero."""


@dataclass
class ChannelGroup:
    """Layers whose output channels are pruned together.

    Attributes:
        convolutions: ungrouped convolutions.
        depthwise: depthwise convolutions that follow them.
        norms: batch normalisations that follow them.
    """

    convolutions: list[str] = field(default_factory=list)
    depthwise: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)


def rank_layers(model: nn.Module) -> set[str]:
    """Name the layers whose outputs are ranks: all parts of a low-rank layer but its last.

    Args:
        model: a compressed network.
    """
    return {
        f"{name}.{part}" if name else part
        for name, module in model.named_modules()
        if isinstance(module, Factorised)
        for part, _ in list(module.named_children())[:-1]
    }


def channel_groups(
    model: nn.Module, graph: fx.Graph, ranks: Collection[str] = ()
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Group the convolutions of a network whose channels can be pruned.

    Channels can be pruned if everything that is done with them, up to the next convolution or
    linear layer, is understood: they are normalised, activated, pooled, or added to channels that
    are pruned with them. An operation that depends on their number (concatenation, padding, a view)
    keeps them.

    Args:
        model: the network.
        graph: the network's graph by `torch.fx.symbolic_trace`.
        ranks: names of layers whose channels are kept because they are ranks, see `rank_layers`.

    Returns:
        The groups, and for each other convolution the reason why it keeps its channels.
    """
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    spaces: dict[fx.Node, _Space] = {}
    layers: list[tuple[str, str, _Space]] = []
    for node in graph.nodes:
        inputs = [spaces[source] for source in node.all_input_nodes]
        module = modules[node.target] if node.op == "call_module" else None
        spaces[node] = space = _Space()
        kind = _connect(node, module, inputs, space, once=calls[node.target] == 1)
        if kind is not None:
            layers.append((kind, node.target, space))
            if node.target in ranks:
                space.keep("ranks are kept")
    groups: dict[_Space, ChannelGroup] = {}
    left_alone: dict[str, str] = {}
    for kind, name, space in layers:
        root = space.root
        if root.reason is None:
            getattr(groups.setdefault(root, ChannelGroup()), kind).append(name)
        elif kind != "norms":
            left_alone[name] = root.reason
    return [group for group in groups.values() if group.convolutions], left_alone


def _connect(
    node: fx.Node, module: nn.Module | None, inputs: list[_Space], output: _Space, *, once: bool
) -> str | None:
    """Join or keep the channels that an operation reads and writes.

    Returns:
        The list of a `ChannelGroup` that the operation's layer belongs in, None if in none.
    """
    kind = _kind(module)
    if kind is not None and not (once and len(inputs) == 1):
        for space in (*inputs, output):
            space.keep(f"{node.target} is called more than once")
        return "convolutions" if isinstance(module, nn.Conv2d) else None
    if kind == "convolutions":
        return kind
    if kind in ("depthwise", "norms"):
        output.join(inputs[0])
        return kind
    if kind == "linear":
        output.keep("the output of a linear layer")
        return None
    if kind is None and (
        _passes(node, module) or (node.target in _SUMS and len(inputs) == 2 and len(node.args) == 2)
    ):
        for space in inputs:
            output.join(space)
        return None
    ends = {"placeholder": "the network's input", "output": "the network's output"}
    for space in (*inputs, output):
        space.keep(ends.get(node.op) or f"its channels go through {_name(node, module)}")
    return "convolutions" if isinstance(module, nn.Conv2d) else None


def _kind(module: nn.Module | None) -> str | None:
    """Tell what a module does with channels: makes new ones, or keeps each by itself."""
    if isinstance(module, nn.Conv2d):
        if module.groups == 1:
            return "convolutions"
        depthwise = module.groups == module.in_channels == module.out_channels
        return "depthwise" if depthwise else "grouped"
    if isinstance(module, nn.BatchNorm2d):
        return "norms"
    return "linear" if isinstance(module, nn.Linear) else None


class _Space:
    """The channels of one feature map, joined with others that must keep or lose the same ones."""

    def __init__(self) -> None:
        self.parent: _Space | None = None
        self.reason: str | None = None

    @property
    def root(self) -> _Space:
        return self if self.parent is None else self.parent.root

    def join(self, other: _Space) -> None:
        mine, others = self.root, other.root
        if mine is not others:
            mine.parent = others
            others.reason = others.reason or mine.reason

    def keep(self, reason: str) -> None:
        self.root.reason = self.root.reason or reason


def _passes(node: fx.Node, module: nn.Module | None) -> bool:
    """Tell whether the output has the channels of the one input, and zeros stay zeros."""
    if module is not None:
        return isinstance(module, _MODULES) and not (
            isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1)
        )
    if len(node.all_input_nodes) != 1:
        return False
    rest: tuple[Any, ...] = node.args[1:]
    if node.target in (torch.flatten, "flatten"):
        return (*rest, *node.kwargs.values()) == (1,)
    if node.target in (torch.mean, "mean"):
        dims = rest[0] if rest else node.kwargs.get("dim")
        return isinstance(dims, (tuple, list)) and {*dims} in ({2, 3}, {-1, -2})
    return node.target in _FUNCTIONS or node.target in ("relu", "relu_", "contiguous")


def _name(node: fx.Node, module: nn.Module | None) -> str:
    return (
        type(module).__name__
        if module is not None
        else getattr(node.target, "__name__", str(node.target))
    )
