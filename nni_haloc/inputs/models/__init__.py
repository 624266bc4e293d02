"""Networks by name: those of the registry, torchvision's, and any importable factory."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nni_haloc.inputs.registries import MODELS


def build_model(
    name: str, arguments: Mapping[str, Any] | None = None, *, factories: bool = True
) -> nn.Module:
    """Make an untrained network.

    Args:
        name: a name of `MODELS` (``resnet20``), ``torchvision:NAME``, or a factory of your own,
            ``package.module:factory``.
        arguments: keyword arguments of the factory. torchvision's backbones are untrained, too,
            unless they say otherwise.
        factories: whether a factory of your own may be called. Give False for a name from a file
            that somebody else wrote: it would call whatever the file names.

    Raises:
        ValueError: for a name that leads nowhere, arguments that do not fit, or a factory that
            fails.
    """
    module_name, _, attribute = name.rpartition(":")
    if not factories and is_factory(name):
        refused = "made by code of your own; pass load(folder, model)"
        raise ValueError(f"model {name!r}: {refused}, or factories=True if you trust the folder")
    try:
        model = _factory(module_name, attribute)(**(arguments or {}))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"model {name!r}: {' '.join(str(error).split())}") from None
    except Exception as error:  # of the factory's own code
        raise ValueError(f"model {name!r}: its factory fails: {error!r}") from None
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ValueError(f"model {name!r}: expected an nn.Module from the factory, found {kind}")
    return model


def is_factory(name: str) -> bool:
    """Tell whether a network's name is ``package.module:factory``, of which the code is run."""
    return name.rpartition(":")[0] not in ("", "torchvision")


def add_code(folder: str | Path) -> None:
    """Make the modules in a folder importable.

    The folder comes last: no file in it takes the place of an installed package.

    Args:
        folder: the folder of a factory of the user's own.
    """
    path = os.path.abspath(folder)
    if path not in sys.path:
        sys.path.append(path)


def _factory(module_name: str, attribute: str) -> Callable[..., Any]:
    if not module_name:
        if attribute not in MODELS:
            others = "torchvision:NAME or package.module:factory"
            raise ValueError(f"expected one of {', '.join(MODELS)}, {others}")
        return MODELS[attribute]
    if module_name != "torchvision":
        module = importlib.import_module(module_name)
        if not hasattr(module, attribute):
            file = getattr(module, "__file__", None) or "a module of Python's own"
            raise AttributeError(f"{module_name} has no {attribute!r}: it is {file}")
        return getattr(module, attribute)
    from torchvision.models import get_model_builder

    builder = get_model_builder(attribute)
    # By default torchvision would fetch trained weights of a backbone.
    backbone = inspect.signature(builder).parameters.keys() & {"weights_backbone"}

    def untrained(**arguments: Any) -> nn.Module:
        with warnings.catch_warnings():
            # Of first weights that will be others one day, and are replaced by trained ones.
            warnings.simplefilter("ignore", FutureWarning)
            return builder(weights=None, **{**dict.fromkeys(backbone), **arguments})

    return untrained
