"""Networks by name: those of the registry, torchvision's, and any importable factory."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from nni_haloc.inputs.registries import MODELS
from nni_haloc.utils.errors import likely


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
        factory = _factory(module_name, attribute)
        if not callable(factory):
            kind = type(factory).__name__
            raise TypeError(f"expected a function or class that makes the network, found {kind}")
        model = factory(**(arguments or {}))
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


def _module(name: str) -> ModuleType:
    """Import a module of the user's own.

    Raises:
        ImportError: names the module, or the package that it needs; and a module like it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(f"{missing}."):
            raise ImportError(f"{name} imports {missing}, which is not installed") from None
        folders = [os.path.abspath(path) for path in sys.path if os.path.isdir(path or ".")]
        own = [path for path in folders if not path.startswith((sys.prefix, sys.base_prefix))]
        like = likely(name, [file.stem for path in own for file in Path(path).glob("*.py")])
        where = " or ".join([*(f"in {path}" for path in dict.fromkeys(own)), "among the installed"])
        raise ImportError(f"no module {missing!r} {where}{like}") from None


def _factory(module_name: str, attribute: str) -> Callable[..., Any]:
    if not module_name:
        if attribute not in MODELS:
            others = "torchvision:NAME or package.module:factory"
            raise ValueError(f"expected one of {', '.join(MODELS)}, {others}")
        return MODELS[attribute]
    if module_name != "torchvision":
        module = _module(module_name)
        if not hasattr(module, attribute):
            file = getattr(module, "__file__", None) or "Python itself"
            makers = [name for name, value in vars(module).items() if callable(value)]
            like = likely(attribute, makers)
            raise AttributeError(f"{module_name}, which is {file}, has no {attribute!r}{like}")
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
