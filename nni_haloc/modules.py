"""A network's modules: putting others in their place; evaluation mode, and another device, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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
