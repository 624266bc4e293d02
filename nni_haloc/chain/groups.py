"""Which channels of a network can be pruned, and which of them only together: groups of convolutions whose outputs are added up."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.SiLU, nn.GELU, nn.Identity, nn.Dropout, nn.Dropout2d,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten,
)  # fmt: skip
_FUNCTIONS = {
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.hardswish, F.silu, F.gelu, F.dropout,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
}  # fmt: skip
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
"""What keeps channels apart, and makes zeros of zeros: a channel that is zero stays so up to the next convolution."""


@dataclass
class ChannelGroup:
    """Layers whose output channels are pruned together: ``convolutions``; ``depthwise`` ones and ``norms`` that follow them."""

    convolutions: list[str] = field(default_factory=list)
    depthwise: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)


def channel_groups(model: nn.Module, graph: fx.Graph) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups of ``model``, and why other convolutions keep their channels. ``graph``: of the model, by `torch.fx.symbolic_trace`.

    Channels can go where all that is done with them, up to the next convolution or linear layer, is understood: normalised, activated,
    pooled, added to channels that go with them. An operation that counts on their number (concatenation, padding, a view) keeps them.
    """
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    spaces: dict[fx.Node, _Space] = {}
    layers: list[tuple[str, str, _Space]] = []
    for node in graph.nodes:
        inputs = [spaces[source] for source in node.all_input_nodes]
        module = modules[node.target] if node.op == "call_module" else None
        spaces[node] = found = _Space()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)) and (
            calls[node.target] > 1 or len(inputs) != 1
        ):
            reason = f"{node.target} is called more than once"
            for space in (*inputs, found):
                space.keep(reason)
            if isinstance(module, nn.Conv2d):
                layers.append(("convolutions", node.target, found))
        elif isinstance(module, nn.Conv2d) and module.groups == 1:
            layers.append(("convolutions", node.target, found))
        elif (
            isinstance(module, nn.Conv2d)
            and module.groups == module.in_channels == module.out_channels
        ):
            found.join(inputs[0])
            layers.append(("depthwise", node.target, found))
        elif isinstance(module, nn.BatchNorm2d):
            found.join(inputs[0])
            layers.append(("norms", node.target, found))
        elif isinstance(module, nn.Linear):
            found.keep("the output of a linear layer")
        elif _passes(node, module) or (
            node.target in _SUMS and len(inputs) == 2 and len(node.args) == 2
        ):
            for space in inputs:
                found.join(space)
        else:
            why = {"placeholder": "the network's input", "output": "the network's output"}.get(
                node.op
            )
            for space in (*inputs, found):
                space.keep(why or f"its channels go through {_name(node, module)}")
            if isinstance(module, nn.Conv2d):
                layers.append(("convolutions", node.target, found))
    groups: dict[_Space, ChannelGroup] = {}
    left_alone: dict[str, str] = {}
    for kind, name, space in layers:
        root = space.root
        if root.reason is None:
            getattr(groups.setdefault(root, ChannelGroup()), kind).append(name)
        elif kind != "norms":
            left_alone[name] = root.reason
    return [group for group in groups.values() if group.convolutions], left_alone


class _Space:
    """The channels of one feature map; joined with those of others that must keep or lose the same ones."""

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
    """Whether the channels of the one input are the output's, zeros staying zeros."""
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
