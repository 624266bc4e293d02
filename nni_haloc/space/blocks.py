"""Cut a network into blocks that are called one after another."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from nni_haloc.space.modules import Example, batch_size_of, call, copy_of, evaluating


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

    A block has parameters, is called once in a pass, takes one tensor ``(N, ...)`` and gives one,
    and holds at most ``most`` of the layers. Modules that hold more, or are called otherwise, are
    cut further. Recurrent, scripted and hooked modules are no blocks.

    Args:
        model: the network; a copy of it runs once.
        example: N inputs, better several than one, see `nni_haloc.space.modules.Example`.
        layers: names of layers.
        most: how many of them a block may hold.

    Returns:
        Names of modules, none of which is inside another one.
    """
    model, size, places = copy_of(model), batch_size_of(example), count()
    named = dict(model.named_modules())
    wanted = {named[name] for name in layers if name in named}
    usable = {m for m in named.values() if _usable(m)}
    seen = {module: _Calls() for module in usable}

    def before(module: nn.Module, args: Any, more: Any) -> None:
        calls = seen[module]
        calls.first = calls.first if calls.number else next(places)
        calls.number += 1
        calls.plain &= not more and len(args) == 1 and _holds(args[0], size)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen[module].plain &= _holds(output, size) and output.is_floating_point()

    for module in usable:
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
    with evaluating(model):
        call(model, example)

    def cut(name: str) -> list[str]:
        module = named[name]
        calls, inside = seen.get(module, _Calls()), set(module.modules())
        once = calls.number == 1 and calls.plain and any(True for _ in module.parameters())
        if name and once and inside <= usable and len(wanted & inside) <= most:
            return [name]
        children = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        return [block for child in children if child in named for block in cut(child)]

    found = sorted(cut(""), key=lambda name: seen[named[name]].first)
    held = {name: {m for m in named[name].modules() if m is not named[name]} for name in found}
    return [name for name in found if not any(named[name] in others for others in held.values())]


def _usable(module: nn.Module) -> bool:
    """Tell whether a module may be in a block: whether it may run alone, again, and in training."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and not isinstance(module, nn.RNNBase | torch.jit.ScriptModule)


def _holds(value: Any, size: int) -> bool:
    """Tell whether a value is a tensor of ``size`` images."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size
