"""A network as the list of operations of one forward pass.

It is recorded where the model is, and run on a device that does not have the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.modules import evaluating

_TEXT = {"gelu", "gelu_"}
"""Operations that may take a text; all others that do, such as to open a file, are refused."""
_RESHAPE = {"view": "reshape", "_unsafe_view": "reshape"}
"""A view of one memory layout may need a copy in another: what such operations are run as."""
Program = list[dict[str, Any]]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.program: Program = []
        self.numbers: dict[int, int] = {}
        self.kept: list[Tensor] = []  # a tensor that is freed may give its id to another
        self.inside = 0

    def number(self, tensor: Tensor, *, new: bool = False) -> int:
        """Return a tensor's number; a tensor that no recorded operation made is a constant."""
        if new or id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.kept)
            self.kept.append(tensor)
            if not new:
                dtype = str(tensor.dtype).removeprefix("torch.")
                self.program.append(
                    {
                        "constant": list(tensor.shape),
                        "dtype": dtype,
                        "out": self.numbers[id(tensor)],
                    }
                )
        return self.numbers[id(tensor)]

    def encode(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self.number(value)}
        if isinstance(value, (list, tuple)):
            return [self.encode(v) for v in value]
        if isinstance(value, (torch.dtype, torch.memory_format)):
            return {"torch": str(value).removeprefix("torch.")}
        if (
            value is None
            or isinstance(value, (bool, int, str))
            or (isinstance(value, float) and abs(value) != float("inf"))
        ):
            return value
        if isinstance(value, (torch.device, torch.layout)):
            return None
        return (
            {"float": str(value)} if isinstance(value, float) else {"unknown": type(value).__name__}
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        named = {key: self.encode(value) for key, value in kwargs.items()}
        line = {
            "op": str(func),
            "args": self.encode(args),
            "kwargs": {key: v for key, v in named.items() if v is not None},
        }
        out = func(*args, **kwargs)
        outs = out if isinstance(out, (list, tuple)) else [out]
        inputs = {id(t) for t in self.kept}
        line["out"] = [
            self.number(t, new=id(t) not in inputs) if isinstance(t, Tensor) else None for t in outs
        ]
        self.program.append(line)
        return out


def record(
    model: nn.Module,
    example_input: Tensor,
    layers: Collection[str],
    tensors: dict[int, Tensor] | None = None,
) -> Program:
    """Record the operations of a forward pass in evaluation mode.

    Args:
        model: the network.
        example_input: its input, ``(N, ...)``.
        layers: names of layers; a call of one of them is a single operation.
        tensors: is filled with the tensor behind each number, if it is given.
    """
    recorder = _Recorder()
    modules = {module: name for name, module in model.named_modules() if name in layers}
    hooks = []

    def enter(module: nn.Module, args: Any) -> None:
        recorder.inside += 1

    def leave(module: nn.Module, args: Any, out: Tensor) -> None:
        recorder.inside -= 1
        line = {"layer": modules[module], "args": [{"tensor": recorder.number(args[0])}]}
        recorder.program.append(line | {"out": [recorder.number(out, new=True)]})

    for module in modules:
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with evaluating(model), torch.no_grad():
            recorder.program.append(
                {
                    "input": list(example_input.shape),
                    "out": recorder.number(example_input, new=True),
                }
            )
            with recorder:
                model(example_input)
    finally:
        for hook in hooks:
            hook.remove()
    if tensors is not None:
        tensors.update(enumerate(recorder.kept))
    return recorder.program


class Replay(nn.Module):
    """Runs a recorded program on random weights.

    The layers have their own names in it and can be replaced.

    Raises:
        ValueError: if an operation is not one of torch's ``aten``, or takes a text such as a file's
            name, or if it is no program at all; the message says which.
    """

    def __init__(self, program: Program, layers: dict[str, LayerSpec]) -> None:
        super().__init__()
        try:
            self._read(program, layers)
        except (LookupError, AttributeError, TypeError) as error:
            raise ValueError(
                "program: expected the operations of a forward pass, "
                f"found something else ({error!r})"
            ) from None

    def _read(self, program: Program, layers: dict[str, LayerSpec]) -> None:
        self.steps: list[
            tuple[Callable[..., Any] | str, list[Any], dict[str, Any], list[int | None], list[int]]
        ] = []
        for name, spec in layers.items():
            parent: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, spec.build(None))
        last_use: dict[int, int] = {}
        for i, line in enumerate(program):
            for number in _numbers([line.get("args"), line.get("kwargs")]):
                last_use[number] = i
        self.first = 0
        self.constants: list[int] = []
        for i, line in enumerate(program):
            if "input" in line:
                self.first = line["out"]
            elif "constant" in line:
                self.register_buffer(
                    f"constant{line['out']}", _constant(line["constant"], line["dtype"])
                )
                self.constants.append(line["out"])
            else:
                call = line["layer"] if "layer" in line else _operation(line["op"], line)
                done = [
                    n
                    for n in set(_numbers([line["args"], line.get("kwargs")]))
                    if last_use[n] == i and n not in self.constants
                ]
                self.steps.append((call, line["args"], line.get("kwargs", {}), line["out"], done))
        self.final = self.steps[-1][3][0]

    def forward(self, x: Tensor) -> Any:
        known: dict[int, Any] = {
            number: getattr(self, f"constant{number}") for number in self.constants
        }
        known[self.first] = x
        for call, args, kwargs, outs, done in self.steps:
            values = _decode(args, known)
            out = (
                self.get_submodule(call)(*values)
                if isinstance(call, str)
                else call(*values, **{k: _decode(v, known) for k, v in kwargs.items()})
            )
            for number, value in zip(
                outs, out if isinstance(out, (list, tuple)) else [out], strict=True
            ):
                if number is not None:
                    known[number] = value
            for number in done:
                if number != self.final:
                    known.pop(number, None)
        return known[self.final] if self.final is not None else None


def _numbers(value: Any) -> list[int]:
    if isinstance(value, dict):
        return (
            [value["tensor"]]
            if "tensor" in value
            else [n for v in value.values() for n in _numbers(v)]
        )
    return [n for v in value for n in _numbers(v)] if isinstance(value, list) else []


def _decode(value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, list):
        return [_decode(v, known) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return known[value["tensor"]]
    if "torch" in value:
        return _named(value["torch"])
    return float(value["float"])


def _operation(name: str, line: dict[str, Any]) -> Callable[..., Any]:
    space, _, rest = name.partition(".")
    op, _, overload = rest.partition(".")
    operation = (
        getattr(getattr(torch.ops.aten, _RESHAPE.get(op, op), None), overload or "default", None)
        if space == "aten"
        else None
    )
    values = [*line["args"], *line.get("kwargs", {}).values()]
    if (
        not isinstance(operation, torch._ops.OpOverload)
        or not (op in _TEXT or _without_text(operation))
        or not all(map(_is_plain, values))
    ):
        raise ValueError(f"operation {name!r}: cannot be run from a file")
    return operation


def _without_text(operation: torch._ops.OpOverload) -> bool:
    return not any("str" in str(argument.type) for argument in operation._schema.arguments)


def _is_plain(value: Any) -> bool:
    """Tell whether a value has one of the recorded forms."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return not isinstance(value, dict) or (
        len(value) == 1 and next(iter(value)) in ("tensor", "torch", "float")
    )


def _named(name: str) -> Any:
    """Return torch's type or memory format of a name; anything else in torch is refused."""
    value = getattr(torch, name, None)
    if not isinstance(value, (torch.dtype, torch.memory_format)):
        raise ValueError(f"expected a type or memory format of torch's, found {name!r}")
    return value


def _constant(shape: list[int], dtype: str) -> Tensor:
    """Draw weights that keep activations at ordinary sizes: denormal numbers are slow."""
    kind = _named(dtype)
    if not kind.is_floating_point:
        return torch.zeros(shape, dtype=kind)
    if len(shape) < 2:
        return torch.rand(shape, dtype=kind) + 0.5
    return torch.randn(shape, dtype=kind) / math.prod(shape[1:]) ** 0.5
