"""Find the network inside what torch and Lightning wrap around it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_COMPILED = "_orig_mod"
_KEPT_UNDER = (_COMPILED, "_original_module")
"""Where ``torch.compile`` and Fabric keep the network; their classes are slow to import."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside a wrapper, or the network itself if it is in none.

    Wrappers are `nn.DataParallel`, `DistributedDataParallel`, ``torch.compile``'s module,
    `AveragedModel` and Lightning Fabric's module, also one around another. Where submodules are
    compiled, or modules are compiled in place, it is another network of the same tensors and other
    modules, with these as they were before.

    Args:
        model: a network.
    """
    while True:
        inner = next((model._modules[key] for key in _KEPT_UNDER if key in model._modules), None)
        if inner is None and isinstance(
            model, nn.DataParallel | DistributedDataParallel | AveragedModel
        ):
            inner = model.module
        if inner is None:
            return _without_compiled_parts(model, {})
        model = inner


def _without_compiled_parts(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Return a module in which no submodule is compiled: itself, or one with the same tensors.

    Args:
        module: it is left as it is.
        made: what is returned for modules, by their ids.
    """
    if isinstance(module, torch.jit.ScriptModule):  # nothing in it can be compiled
        return module
    inner = module._modules.get(_COMPILED)
    if inner is not None:
        return _without_compiled_parts(inner, made)
    if id(module) not in made:
        made[id(module)] = module
        children = {
            name: None if child is None else _without_compiled_parts(child, made)
            for name, child in module._modules.items()
        }
        # Of a module that is compiled in place, hooks are passed over.
        in_place = module._compiled_call_impl is not None
        if in_place or any(child is not module._modules[name] for name, child in children.items()):
            other = object.__new__(type(module))
            vars(other).update(vars(module), _modules=children, _compiled_call_impl=None)
            made[id(module)] = other
    return made[id(module)]
