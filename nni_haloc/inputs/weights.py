"""Load trained weights from a file, without running code from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_haloc.utils.errors import first_sentence


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load trained weights into ``model`` from ``.safetensors``, ``.pth``, ``.pt`` or ``.th``; the latter never run code from the file.

    A state dict may stand under ``state_dict`` or ``model`` and its names may begin with ``module.`` (data-parallel training).
    Raises FileNotFoundError or ValueError naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(str(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch, pickle, zip and safetensors each have their own for a bad file
        raise ValueError(
            f"{path}: not a file of weights that can be loaded safely ({first_sentence(error)})"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a state dict (names to tensors)")
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: {name}: expected finite numbers, found NaN or infinity")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: does not fit the model: {' '.join(str(error).split()[6:40])}"
        ) from None
