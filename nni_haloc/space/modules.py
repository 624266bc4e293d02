"""Work with a network's modules: replace them, copy them, run them on an example input."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from nni_haloc.utils.errors import first_line, no_endless_nesting
from nni_haloc.utils.wrapped import unwrapped

M = TypeVar("M", bound=nn.Module)
Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""A network's input: a tensor ``(N, ...)``, a list of images, a tuple of inputs, or a dict of
keyword inputs. Where ``forward`` has no arguments of its keys, the dict is the only input."""


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Replace modules of a network, in place.

    Args:
        model: the network.
        new: name of the old module to the new one, which gets all names of the old one.
    """
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
            # Their fused operation takes the linear layers' weights.
            module.activation_relu_or_gelu = 0
            module.use_nested_tensor = False


def copy_of(model: M, memo: Mapping[int, Any] | None = None) -> M:
    """Copy a network deeply, without a wrapper around it.

    Tensors that are computed from others, such as the weight of `torch.nn.utils.weight_norm`, are
    copied by their values.

    Args:
        model: the network.
        memo: object id to what stands in the copy instead of a copy of the object.

    Raises:
        ValueError: if an attribute can't be copied; the message names it.
    """
    model = cast(M, unwrapped(model))
    held = dict(memo or {})
    for module in model.modules():
        for value in tree_leaves(vars(module)):
            if isinstance(value, UninitializedBuffer):  # torch copies only such parameters
                held.setdefault(
                    id(value),
                    cast(Any, UninitializedBuffer)(device=value.device, dtype=value.dtype),
                )
            elif isinstance(value, Tensor) and not value.is_leaf:
                held.setdefault(id(value), value.detach().clone())
    try:
        # With gradients, a scripted module's parameters would be computed from the original's.
        with torch.no_grad():
            copy_ = copy.deepcopy(model, dict(held))
    except Exception as error:  # from the code of a class that is copied
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
                remedy = "take it away, or give its class a __deepcopy__"
                return f"the attribute {attribute!r} {where} ({first_line(error)}); {remedy}"
    return None


def set_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a network's real numbers, in place. Complex ones keep their imaginary parts.

    Args:
        model: the network.
        dtype: a floating-point type.
    """
    values = [*model.parameters(), *model.buffers()]
    if not any(value.is_complex() for value in values):
        model.to(dtype)
    else:
        for value in values:
            if value.is_floating_point():
                value.data = value.data.to(dtype)


def arguments_of(model: nn.Module, x: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return the arguments by which a network gets an input, without names and with them.

    Args:
        model: the network.
        x: the input: by the names of its keys, if it is a dict and ``forward`` has such arguments;
            else as a whole.
    """
    if isinstance(x, Mapping):
        with suppress(TypeError, ValueError):  # there is no such argument; nothing is known of them
            inspect.signature(model.forward).bind(**x)
            return (), x
    return (x,), {}


def call(model: nn.Module, example: Example) -> Any:
    """Run a forward pass on an example input, without gradients.

    Transformers run layer by layer, not as one fused operation.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with no_endless_nesting(), torch.no_grad():
            if isinstance(example, tuple):
                return model(*example)
            args, named = arguments_of(model, example)
            return model(*args, **named)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _is_images(value: Any) -> bool:
    """Tell whether a value is a list of images, ``(C, H, W)`` or vectors, not of batches."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(image, Tensor) and image.dim() in (1, 3) for image in value)
    )


def batch_size_of(example: Example) -> int:
    """Return N of an example input's first tensor ``(N, ...)``, or first list of N images.

    Tensors of one or three dimensions in a list are taken for images, others for batches.

    Raises:
        ValueError: if there is no tensor.
    """
    for value in tree_leaves(example, _is_images):
        if _is_images(value) or (isinstance(value, Tensor) and value.dim()):
            return len(value)
    raise ValueError(
        "the example input: expected a tensor, a tuple or a dict with tensors (N, ...), "
        f"found {type(example).__name__}"
    )


def batches(inputs: Example, size: int) -> Iterator[Example]:
    """Cut inputs into parts of at most ``size``.

    A value that is neither a tensor nor a list of N inputs goes with every part.
    """
    number = batch_size_of(inputs)
    for start in range(0, number, size):

        def part(value: Any, start: int = start) -> Any:
            batched = _is_images(value) or (isinstance(value, Tensor) and value.dim())
            return value[start : start + size] if batched and len(value) == number else value

        yield tree_map(part, inputs, is_leaf=_is_images)


def input_shape(example: Example, *, batch: bool = False) -> Any:
    """Return the shape of one input, or of the whole ``batch``, in a form for JSON.

    Returns:
        A list of sizes, or a list or dict of such lists.
    """
    shapes = tree_map(
        lambda v: list(v.shape[0 if batch else 1 :]) if isinstance(v, Tensor) else None, example
    )
    return dict(shapes) if isinstance(example, Mapping) else list(shapes)


def only_tensor(example: Example) -> Tensor:
    """Return an example input that must be a single tensor, as for measuring.

    Raises:
        ValueError: if it is anything else.
    """
    if not isinstance(example, Tensor):
        raise ValueError(
            "the example input: measuring takes networks of one input, a tensor (N, ...), "
            f"found a {type(example).__name__}"
        )
    return example


def materialised(model: M, example: Example) -> M:
    """Return the model, or, if it has lazy layers, a copy that has run once and has its weights.

    In either case it is without a wrapper around it.

    Raises:
        ValueError: if the pass does not reach a lazy layer.
    """
    model = cast(M, unwrapped(model))
    if not any(is_lazy(value) for value in (*model.parameters(), *model.buffers())):
        return model
    model = copy_of(model)
    with evaluating(model):
        call(model, example)
    for name, module in model.named_modules():
        if any(map(is_lazy, (*module.parameters(False), *module.buffers(False)))):
            raise ValueError(
                f"the example input does not reach {name!r}, "
                f"a {type(module).__name__} without weights yet: take it away"
            )
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode for the time of a block; then each submodule gets its own mode back."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
