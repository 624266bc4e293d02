"""A network and its modules: putting others in their place, copies, passes on an example input; another mode or device for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from nni_haloc.utils.errors import first_line

M = TypeVar("M", bound=nn.Module)
Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""A network's input: a tensor ``(N, ...)``, a tuple of positional inputs or a dict of keyword inputs."""


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put each named module in the place of the old one, under every name that the old one has."""
    named = dict(model.named_modules())
    replacements = {named[name]: module for name, module in new.items()}
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child in replacements:
                parent._modules[child_name] = replacements[child]
    placed = set(new.values())
    for module in model.modules():
        if isinstance(
            module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)
        ) and not placed.isdisjoint(module.modules()):
            module.activation_relu_or_gelu = (
                0  # their fused operation takes the linear layers' weights
            )
            module.use_nested_tensor = False


def copy_of(model: M, memo: Mapping[int, Any] | None = None) -> M:
    """A deep copy; ``memo``: what stands for objects, by their id, instead of copies. ValueError names an attribute that can't be copied.

    Tensors that are computed from others, as the weight of `torch.nn.utils.weight_norm`, are held by their values.
    """
    held = dict(memo or {})
    for module in model.modules():
        for value in tree_leaves(vars(module)):
            if isinstance(value, UninitializedBuffer):  # torch copies parameters of its kind alone
                held.setdefault(
                    id(value),
                    cast(Any, UninitializedBuffer)(device=value.device, dtype=value.dtype),
                )
            elif isinstance(value, Tensor) and not value.is_leaf:
                held.setdefault(id(value), value.detach().clone())
    try:
        with (
            torch.no_grad()
        ):  # or the parameters of a scripted module's copy would be computed from its own
            copy_ = copy.deepcopy(model, dict(held))
    except Exception as error:  # whatever a class makes of being copied
        raise ValueError(
            f"{type(model).__name__} can't be copied: {_culprit(model, held) or first_line(error)}"
        ) from None
    scripted = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule)
    }
    for name, module in copy_.named_modules():
        if name in scripted:
            for ours, theirs in zip(module.parameters(), scripted[name].parameters(), strict=True):
                ours.requires_grad_(theirs.requires_grad)
    return copy_


def _culprit(model: nn.Module, memo: Mapping[int, Any]) -> str | None:
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            try:
                if attribute != "_modules":
                    copy.deepcopy(value, dict(memo))
            except Exception as error:
                where = f"of its submodule {name!r}" if name else "of its own"
                return f"the attribute {attribute!r} {where} ({first_line(error)}); take it away, or give its class a __deepcopy__"
    return None


def call(model: nn.Module, example: Example) -> Any:
    """A forward pass on an example input, without gradients; transformers run layer by layer, not as one fused operation."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            if isinstance(example, Mapping):
                return model(**example)
            return model(*example) if isinstance(example, tuple) else model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def batch_size_of(example: Example) -> int:
    """N of an example input's first tensor ``(N, ...)``; ValueError if there is none."""
    for value in tree_leaves(example):
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise ValueError(
        f"the example input: expected a tensor, a tuple or a dict with tensors (N, ...), found {type(example).__name__}"
    )


def batches(inputs: Example, size: int) -> Iterator[Example]:
    """Parts of at most ``size`` inputs; what is no tensor of N inputs goes with every part."""
    number = batch_size_of(inputs)
    for start in range(0, number, size):

        def part(value: Any, start: int = start) -> Any:
            batched = isinstance(value, Tensor) and value.dim() and len(value) == number
            return value[start : start + size] if batched else value

        yield tree_map(part, inputs)


def input_shape(example: Example, *, batch: bool = False) -> Any:
    """Of one input, or of the ``batch``, as JSON takes it: a list of sizes, or a list or dict of those."""
    shapes = tree_map(
        lambda v: list(v.shape[0 if batch else 1 :]) if isinstance(v, Tensor) else None, example
    )
    return dict(shapes) if isinstance(example, Mapping) else list(shapes)


def only_tensor(example: Example) -> Tensor:
    """The example input where no other will do, as on a device; ValueError if it is more than one tensor."""
    if not isinstance(example, Tensor):
        raise ValueError(
            f"the example input: measuring takes networks of one input, a tensor (N, ...), found a {type(example).__name__}"
        )
    return example


def materialised(model: M, example: Example) -> M:
    """The model; where it has lazy layers, a copy whose layers one pass has given their shapes and weights."""
    if not any(is_lazy(value) for value in (*model.parameters(), *model.buffers())):
        return model
    model = copy_of(model)
    with evaluating(model):
        call(model, example)
    for name, module in model.named_modules():
        if any(map(is_lazy, (*module.parameters(False), *module.buffers(False)))):
            raise ValueError(
                f"the example input does not reach {name!r}, a {type(module).__name__} without weights yet: take it away"
            )
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of a block; every submodule gets its own mode back."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def accelerated(model: nn.Module) -> Iterator[torch.device]:
    """For the time of a block, a network that is on the processor is on the CUDA device, where there is one; gives the device it is on."""
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    device = torch.device("cuda") if home.type == "cpu" and torch.cuda.is_available() else home
    try:
        model.to(device)
        yield device
    finally:
        model.to(home)
