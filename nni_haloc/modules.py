"""A network's modules: putting others in their place, watching what is done with them; another mode or device for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put each named module in the place of the old one, under every name that the old one has."""
    named = dict(model.named_modules())
    replacements = {named[name]: module for name, module in new.items()}
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child in replacements:
                parent._modules[child_name] = replacements[child]


class Watched(nn.Module):
    """A layer in its place in the network, which notes its calls, and what makes another layer in that place impossible."""

    def __init__(self, name: str, layer: nn.Module, called: list[str]) -> None:
        super().__init__()
        self.layer, self.name, self.called = layer, name, called
        self.shapes: list[tuple[int, ...]] = []
        self.reason: str | None = None

    def forward(self, *arguments: Any, **named: Any) -> Any:
        x, *more = (*arguments, *named.values())
        if named or more:
            self.reason = "called with more than its input, or by its name"
        self.called.append(self.name)
        self.shapes.append(tuple(x.shape))
        return self.layer(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            self.reason = f"the network reads its {name!r}"
            return getattr(self.layer, name)


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
    home = next(model.parameters()).device
    device = torch.device("cuda") if home.type == "cpu" and torch.cuda.is_available() else home
    try:
        model.to(device)
        yield device
    finally:
        model.to(home)
