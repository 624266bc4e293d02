"""How a network uses its layers: their calls, and what makes another layer in their place impossible."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from nni_haloc.space.modules import Example, call, copy_of, replace_modules
from nni_haloc.utils.errors import first_line

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
"""What a rank space looks at: convolutions and linear layers."""


def is_scripted_layer(module: nn.Module) -> bool:
    """Whether it was one of them before it was scripted or traced."""
    kinds = (
        "Linear",
        *(f"Conv{transposed}{n}d" for transposed in ("", "Transpose") for n in (1, 2, 3)),
    )
    return isinstance(module, torch.jit.ScriptModule) and module.original_name in kinds


def obstacle(
    module: nn.Module, calls: Iterable[tuple[int, ...]], holders: Mapping[int, int]
) -> str | None:
    """Why a layer, called on these shapes, can't be a low-rank one, or None. ``holders``: modules that hold a parameter, by its id."""
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"{type(module).__name__} is not decomposed"
    if getattr(module, "groups", 1) != 1:
        return "grouped convolution"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks"
    if "forward" in vars(module):
        return "has a forward of its own"
    if holders[id(module.weight)] > 1:
        return "its weight is shared with another layer"
    least = 4 if isinstance(module, nn.Conv2d) else 2
    odd = next((shape for shape in calls if len(shape) < least), None)
    return None if odd is None else f"called without a batch, on {'x'.join(map(str, odd))}"


@dataclass
class Pass:
    """What was seen in one pass. ``calls``: layer and input shape of each, in their order. ``reasons``: why a layer must stay."""

    calls: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    output: Any = None

    def run(self, network: nn.Module, example: Example) -> None:
        """Fill it in; ``output`` is the output's structure and shapes."""
        leaves, structure = tree_flatten(call(network, example))
        self.output = (
            structure,
            [tuple(v.shape) if isinstance(v, Tensor) else type(v) for v in leaves],
        )

    def note(self, name: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """A call of a layer."""
        x, *more = (*arguments, *named.values())
        if named or more or not isinstance(x, Tensor):
            self.reasons[name] = "called with more than its input, or by its name"
        self.calls.append((name, tuple(getattr(x, "shape", ()))))


def watched_pass(model: nn.Module, example: Example, layers: Collection[str]) -> Pass:
    """The calls of these layers, by a copy of the model in evaluation mode."""
    network, seen = copy_of(model).eval(), Pass()
    for name, module in network.named_modules():
        if name in layers:
            module.register_forward_pre_hook(
                lambda _, args, named, name=name: seen.note(name, args, named), with_kwargs=True
            )
    seen.run(network, example)
    return seen


class _StandIn(nn.Module):
    """Runs a layer in its place, as a module of another class that has none of its attributes; notes what the network wants of those."""

    def __init__(self, name: str, layer: nn.Module, seen: Pass) -> None:
        super().__init__()
        self.layer, self.name, self.seen = layer, name, seen

    def forward(self, *arguments: Any, **named: Any) -> Any:
        self.seen.note(self.name, arguments, named)
        return self.layer(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            self.seen.reasons[self.name] = f"the network reads its {name!r}"
            return getattr(self.layer, name)


def irreplaceable(
    model: nn.Module, example: Example, layers: Sequence[str], expected: Pass
) -> dict[str, str]:
    """Why some of the layers can't be low-rank ones: the network reads their attributes, or does not work without their class.

    One pass of a copy with all of them replaced by modules that compute the same, against the ``expected`` one; more only if that differs,
    to find those at fault.
    """
    reasons: dict[str, str] = {}

    def failure(names: Collection[str]) -> str | None:
        network, seen = copy_of(model).eval(), Pass()
        modules = dict(network.named_modules())
        replace_modules(network, {name: _StandIn(name, modules[name], seen) for name in names})
        try:
            seen.run(network, example)
        except Exception as error:  # the network's own
            return f"the network fails with a low-rank layer in its place: {type(error).__name__}: {first_line(error)}"
        finally:
            reasons.update(seen.reasons)
        if seen.output != expected.output:
            return "the network's output has another shape with a low-rank layer in its place"
        same = seen.calls == [call for call in expected.calls if call[0] in names]
        return None if same else "the network calls other layers with a low-rank layer in its place"

    def fitting(names: Sequence[str], beside: list[str]) -> list[str]:
        """Those of the names with which, and with the ones ``beside`` them, it works."""
        why = failure([*beside, *names])
        if why is None:
            return list(names)
        if len(names) == 1:
            reasons.setdefault(names[0], why)
            return []
        half = len(names) // 2
        first = fitting(names[:half], beside)
        return first + fitting(names[half:], beside + first)

    if layers:
        fitting(layers, [])
    return reasons
