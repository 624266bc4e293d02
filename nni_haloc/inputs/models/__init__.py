"""Networks by name: those of ours, torchvision's, and any importable factory."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def build_model(
    name: str, arguments: Mapping[str, Any] | None = None, *, factories: bool = True
) -> nn.Module:
    """An untrained network: ``digits_cnn``, ``resnet20``, ``torchvision:NAME`` or ``package.module:factory``.

    ``arguments`` are keyword arguments of the factory. ``factories=False`` refuses the last form, which calls whatever it names: for names
    from files that somebody else wrote. torchvision's backbones are untrained, too, unless ``arguments`` say otherwise. Raises ValueError
    for a name that leads nowhere, arguments that do not fit, or a factory that fails.
    """
    module_name, _, attribute = name.rpartition(":")
    if not factories and module_name not in ("", "torchvision"):
        raise ValueError(
            f"model {name!r}: a factory of one's own is not called on a file's word; pass the uncompressed model"
        )
    try:
        if module_name == "torchvision":
            from torchvision.models import get_model_builder

            factory = get_model_builder(attribute)
            pretrained = inspect.signature(factory).parameters.keys() & {
                "weights_backbone"
            }  # by default, and so fetched
            model = factory(weights=None, **{**dict.fromkeys(pretrained), **(arguments or {})})
        else:
            module = importlib.import_module(module_name or f"{__name__}.{attribute}")
            model = getattr(module, attribute)(**(arguments or {}))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"model {name!r}: {' '.join(str(error).split())}") from None
    except Exception as error:  # of the factory's own code
        raise ValueError(f"model {name!r}: its factory fails: {error!r}") from None
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model {name!r}: expected an nn.Module from the factory, found {type(model).__name__}"
        )
    return model
