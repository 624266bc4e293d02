"""Find the network inside what torch and Lightning wrap around it."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_KEPT_UNDER = ("_orig_mod", "_original_module")
"""Where ``torch.compile`` and Fabric keep the network; their classes are slow to import."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside a wrapper, or the network itself if it is in none.

    Wrappers are `nn.DataParallel`, `DistributedDataParallel`, ``torch.compile``'s module,
    `AveragedModel` and Lightning Fabric's module, also one around another.

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
            return model
        model = inner
