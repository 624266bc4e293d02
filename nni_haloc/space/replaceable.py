"""Watch how a network uses its layers, and find those that can't be replaced."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from nni_haloc.inputs.registries import LAYER_CLASSES
from nni_haloc.space.modules import Example, call, copy_of, replace_modules
from nni_haloc.utils.errors import first_line, no_endless_nesting

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
"""The layers that a rank space looks at: convolutions and linear layers."""


def is_scripted_layer(module: nn.Module) -> bool:
    """Tell whether a module was a convolution or linear layer before it was scripted or traced."""
    kinds = (
        "Linear",
        *(f"Conv{transposed}{n}d" for transposed in ("", "Transpose") for n in (1, 2, 3)),
    )
    return isinstance(module, torch.jit.ScriptModule) and module.original_name in kinds


_COMPUTING = ("__call__", "_call_impl", "_conv_forward", "forward", "weight", "bias")
"""Attributes of a class that decide what its layers compute."""


def class_of(module: nn.Module) -> type[nn.Module] | None:
    """Return `nn.Conv2d` or `nn.Linear` if a layer computes what this does, or None.

    A subclass does if it leaves its ``forward`` alone, or if it is among `LAYER_CLASSES`.

    Args:
        module: any module.
    """
    kind = type(module)
    base = next((base for base in (nn.Conv2d, nn.Linear) if isinstance(module, base)), None)
    if base is None or kind is base:
        return base
    if all(getattr(kind, name, None) is getattr(base, name, None) for name in _COMPUTING):
        return base
    name = _full_name(kind)
    return base if name in LAYER_CLASSES and LAYER_CLASSES[name] is base else None


def _why_not_plain(module: nn.Module) -> str:
    """Return the reason why a layer is no `nn.Conv2d` or `nn.Linear`, and what can be done."""
    kind = type(module)
    if kind.__module__.startswith("torch.nn."):
        return f"{kind.__name__} is not decomposed"
    name, base = (
        _full_name(kind),
        next((b for b in (nn.Conv2d, nn.Linear) if b in kind.__mro__), None),
    )
    if base is None:
        return f"{name} is not decomposed"
    return (
        f"{name} has a forward of its own; if it computes what nn.{base.__name__} does:"
        f" nni_haloc.inputs.registries.LAYER_CLASSES.register({name!r})(nn.{base.__name__})"
    )


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def obstacle(
    module: nn.Module,
    calls: Iterable[tuple[int, ...]],
    holders: Mapping[int, int],
    frozen: bool = False,
) -> str | None:
    """Return the reason why a layer can't be a low-rank one, or None.

    Args:
        module: the layer.
        calls: the input shape of each of its calls.
        holders: id of a parameter to the number of modules that hold it.
        frozen: whether a weight that does not require gradients is one.
    """
    if class_of(module) is None:
        return _why_not_plain(module)
    if getattr(module, "groups", 1) != 1:
        return "grouped convolution"
    weight = cast(Tensor, module.weight)
    if not weight.is_floating_point():
        return f"its weight is of {weight.dtype}"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks"
    if "forward" in vars(module):
        return "has a forward of its own"
    if holders[id(weight)] > 1:
        return "its weight is shared with another layer"
    if frozen and not weight.requires_grad:
        return "frozen"
    least = 4 if isinstance(module, nn.Conv2d) else 2
    odd = next((shape for shape in calls if len(shape) < least), None)
    return None if odd is None else f"called without a batch, on {'x'.join(map(str, odd))}"


@dataclass
class Pass:
    """The calls and the output of one forward pass.

    Attributes:
        calls: layer name and input shape of each call, in their order.
        reasons: layer name to the reason why it must stay.
        output: structure and shapes of the output.
    """

    calls: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    output: Any = None

    def run(self, network: nn.Module, example: Example) -> None:
        """Run the network and note its output."""
        output = call(network, example)
        with no_endless_nesting():
            leaves, structure = tree_flatten(output)
        self.output = (
            structure,
            [tuple(v.shape) if isinstance(v, Tensor) else type(v) for v in leaves],
        )

    def note(self, name: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Note a call of a layer."""
        x, *more = (*arguments, *named.values())
        if named or more or not isinstance(x, Tensor):
            self.reasons[name] = "called with more than its input, or by its name"
        self.calls.append((name, tuple(getattr(x, "shape", ()))))


def watched_pass(model: nn.Module, example: Example, layers: Collection[str]) -> Pass:
    """Run a copy of the model in evaluation mode and note the calls of some layers."""
    network, seen = copy_of(model).eval(), Pass()
    for name, module in network.named_modules():
        if name in layers:
            module.register_forward_pre_hook(
                lambda _, args, named, name=name: seen.note(name, args, named), with_kwargs=True
            )
    seen.run(network, example)
    return seen


class _StandIn(nn.Module):
    """Runs a layer as a module of another class, without the layer's attributes.

    It notes the attributes that the network asks for.
    """

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
    """Find layers that can't be low-rank ones, because the network needs their class.

    It may read their attributes, or fail without their class. A copy runs with all of them replaced
    by modules that compute the same; only if that pass differs from the expected one, others
    follow, to find the layers at fault.

    Args:
        model: the network; it is left as it is.
        example: its input.
        layers: names of the layers to try.
        expected: the pass of the network as it is.

    Returns:
        Layer name to the reason.
    """
    reasons: dict[str, str] = {}

    def failure(names: Collection[str]) -> str | None:
        network, seen = copy_of(model).eval(), Pass()
        modules = dict(network.named_modules())
        replace_modules(network, {name: _StandIn(name, modules[name], seen) for name in names})
        try:
            seen.run(network, example)
        except Exception as error:  # of the network's own code
            what = f"{type(error).__name__}: {first_line(error)}"
            return f"the network fails with a low-rank layer in its place: {what}"
        finally:
            reasons.update(seen.reasons)
        if seen.output != expected.output:
            return "the network's output has another shape with a low-rank layer in its place"
        same = seen.calls == [call for call in expected.calls if call[0] in names]
        return None if same else "the network calls other layers with a low-rank layer in its place"

    def fitting(names: Sequence[str], beside: list[str]) -> list[str]:
        """Return the layers that can be replaced together with those ``beside`` them."""
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
