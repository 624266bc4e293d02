"""Load trained weights from a file, without running code from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_haloc.utils.errors import first_sentence

_NESTING = ("state_dict", "model")
"""Keys under which training programs keep the state dict."""
_PARALLEL = "module."
"""Prefix of all names after data-parallel training."""


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load trained weights into ``model``, in place.

    A state dict may stand under ``state_dict`` or ``model``, and its names may begin with
    ``module.``. Nothing in the file is run.

    Args:
        model: the network.
        path: a ``.safetensors``, ``.pth``, ``.pt`` or ``.th`` file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it can't be loaded safely or does not fit; names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    state = _state_dict(path)
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: {name}: expected finite numbers, found NaN or infinity")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[6:40])
        raise ValueError(f"{path}: does not fit the model: {reason}") from None


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Return the state dict that a file holds, with the model's own names."""
    state = _content(path)
    for key in _NESTING:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a state dict (names to tensors)")
    if state and all(name.startswith(_PARALLEL) for name in state):
        return {name.removeprefix(_PARALLEL): value for name, value in state.items()}
    return state


def _content(path: Path) -> Any:
    """Return what a file holds, without unpickling anything but tensors and plain values."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors each have their own
        reason = first_sentence(error)
        expected = "not a file of weights that can be loaded safely"
        raise ValueError(f"{path}: {expected} ({reason})") from None
