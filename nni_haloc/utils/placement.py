"""Decide on which device tensors are worked on, and bring results back without stopping it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_haloc.utils.errors import no_endless_nesting

_CHOSEN: ContextVar[torch.device | None] = ContextVar("working device", default=None)


def working_device() -> torch.device:
    """Return the device that work is moved to.

    Returns:
        The device of the enclosing `working_on`; without one the current CUDA device, where there
        is any, else the processor.
    """
    chosen = _CHOSEN.get()
    if chosen is not None:
        return chosen
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def working_on(device: torch.device | str | None) -> Iterator[None]:
    """Move work to ``device`` for a block's time.

    Args:
        device: the device, or its name (None: as if there were no block).
    """
    token = _CHOSEN.set(None if device is None else torch.device(device))
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a network works on.

    Args:
        model: the network.

    Returns:
        The device of its first parameter; `working_device` where that is on the processor or on
        a device without float64 (mps), or where there is none.
    """
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    return working_device() if home.type in ("cpu", "mps") else home


@contextmanager
def accelerated(*models: nn.Module) -> Iterator[torch.device]:
    """Move networks to the device that they work on for a block's time.

    Args:
        models: networks; all go to the device of the first one, see `device_of`.

    Yields:
        The device that they are on.
    """
    homes = [next((p.device for p in m.parameters()), torch.device("cpu")) for m in models]
    device = device_of(models[0])
    try:
        for model in models:
            model.to(device)
        yield device
    finally:
        for model, home in zip(models, homes, strict=True):
            model.to(home)


def moved(value: Any, device: torch.device) -> Any:
    """Return a network's input on a device: a tensor, or lists and dicts with tensors in them."""
    with no_endless_nesting():
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


class HostCopy:
    """Copy a tensor to the processor while its device goes on working.

    The copy is queued behind the work that makes the tensor; only `get` waits, and for no work that
    was queued later.

    Args:
        value: a tensor on any device.
    """

    def __init__(self, value: Tensor) -> None:
        self._event = torch.cuda.Event() if value.is_cuda else None
        self._value = value.detach().to("cpu", non_blocking=value.is_cuda)  # to pinned memory
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(value.device))

    def get(self) -> np.ndarray:
        """Return the values, once the copy is complete."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._value.numpy()


class Mirror:
    """Keep the values of one small tensor on the processor, in float64.

    The tensor's device is waited for only where the tensor was changed without `put`.
    """

    def __init__(self) -> None:
        self._place: tuple[int, int] | None = None
        self._values = np.empty(0)

    def of(self, tensor: Tensor) -> np.ndarray:
        """Return the tensor's values.

        Args:
            tensor: always the same one, wherever it is moved to.
        """
        place = tensor.data_ptr(), tensor._version
        if place != self._place:
            self._values = tensor.detach().double().cpu().numpy().copy()
            self._place = place
        return self._values

    def forget(self) -> None:
        """Read the tensor again next time, whatever has or has not changed it."""
        self._place = None

    def put(self, tensor: Tensor, values: np.ndarray) -> None:
        """Change the tensor, and wait for nothing.

        Args:
            tensor: see `of`.
            values: of the tensor's shape; they are rounded to its precision.
        """
        rounded = torch.from_numpy(values).to(tensor.dtype)
        with torch.no_grad():
            tensor.copy_(to_device(rounded, tensor.device))
        self.know(tensor, rounded.double().numpy())

    def know(self, tensor: Tensor, values: np.ndarray) -> None:
        """Take note of the values that the tensor has now.

        Args:
            tensor: see `of`.
            values: copied from it, in float64.
        """
        self._values, self._place = values, (tensor.data_ptr(), tensor._version)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor of the processor to a device without waiting for the device.

    Args:
        value: a tensor on the processor.
        device: where to.
    """
    if device.type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)
