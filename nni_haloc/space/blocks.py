"""Cut a network into blocks that are called one after another."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nni_haloc.space.modules import Example, call, copy_of, evaluating


@dataclass
class _Calls:
    """Hold how a module was called in one pass: how often, when first, and whether in one form."""

    number: int = 0
    first: int = 0
    plain: bool = True


def blocks_of(
    model: nn.Module, example: Example, layers: Collection[str], most: int = 4
) -> list[str]:
    """Name the blocks of a network, in the order of their calls.

    A block has parameters, is called once in a pass, takes one tensor and gives one, and holds at
    most ``most`` of the layers. Modules that hold more, or are called otherwise, are cut further;
    what can't be a block is left out.

    Args:
        model: the network; a copy of it runs once.
        example: its input, see `nni_haloc.space.modules.Example`.
        layers: names of layers.
        most: how many of them a block may hold.

    Returns:
        Names of modules, none of which is inside another one.
    """
    model = copy_of(model)
    seen: dict[str, _Calls] = {name: _Calls() for name, _ in model.named_modules()}
    counter = iter(range(10**9))

    def watch(name: str, module: nn.Module) -> None:
        calls = seen[name]

        def before(_: Any, args: Any, named: Any) -> None:
            calls.first = calls.first if calls.number else next(counter)
            calls.number += 1
            calls.plain &= not named and len(args) == 1 and isinstance(args[0], Tensor)

        def after(_: Any, __: Any, output: Any) -> None:
            calls.plain &= isinstance(output, Tensor)

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    for name, module in model.named_modules():
        watch(name, module)
    with evaluating(model):
        call(model, example)

    def cut(name: str, module: nn.Module) -> list[str]:
        calls = seen.get(name)
        if calls is None:  # another name of a module that has been seen
            return []
        within = sum(layer == name or layer.startswith(f"{name}.") for layer in layers)
        alone = calls.number == 1 and calls.plain and within <= most
        if name and alone and any(True for _ in module.parameters()):
            return [name]
        return [
            block
            for child, inner in module.named_children()
            for block in cut(f"{name}.{child}" if name else child, inner)
        ]

    return sorted(cut("", model), key=lambda name: seen[name].first)
