"""Save a compressed network in a folder, and load it back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nni_haloc.inputs.models import build_model, is_factory
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import RunFolder, hold, tensor_shapes
from nni_haloc.space.layers import layout_of
from nni_haloc.space.modules import replace_modules
from nni_haloc.utils.errors import brief, first_line, printable
from nni_haloc.utils.files import make_folder, read_json, whole, write_json
from nni_haloc.utils.wrapped import unwrapped

_CHANNELS_LAST = {"memory_format": "channels_last"}
"""Metadata of a file of weights whose network is in this format."""


def save(
    folder: str | Path,
    network: nn.Module,
    plan: RankPlan,
    model: Mapping[str, Any] | None = None,
) -> None:
    """Write a compressed network's ``ranks.json``, weights and ``model.json``.

    A ``metrics.json`` in the folder is removed: it speaks of other weights. The file of the weights
    notes the memory format channels-last, in which `load` then gives the network back.

    Args:
        folder: receives the files; it is made if it is not there.
        network: the compressed network.
        plan: its ranks.
        model: ``name`` and ``arguments`` of the original network (see `build_model`), with which
            `load` makes it; None for a network that has no name.

    Raises:
        OSError: names the file that can't be written; the old weights then stay.
        HalocError: if another process works in the folder.
    """
    from safetensors.torch import save_model

    files = RunFolder(folder)
    with hold(files):
        make_folder(files.path)
        with whole(files.weights) as part:
            plain = unwrapped(network)
            save_model(plain, str(part), _CHANNELS_LAST if _is_channels_last(plain) else None)
            if model is not None:
                write_json(files.model, model)
            plan.save(files.ranks)
            files.metrics_file.unlink(missing_ok=True)


def load(
    folder: str | Path, model: nn.Module | None = None, *, factories: bool = False
) -> nn.Module:
    """Load the compressed network of a run's folder, in evaluation mode and its memory format.

    It needs torch and safetensors, neither NNI nor Lightning.

    Args:
        folder: a run's folder, or that of one of its stages.
        model: an instance of the original network, which is copied; needed where ``model.json``
            has no name for it.
        factories: whether to import and call the factory (``package.module:factory``) that
            ``model.json`` names: only for folders that you trust.

    Returns:
        The network.

    Raises:
        TypeError: if ``model`` is no network.
        FileNotFoundError: names the folder or the file that is missing.
        ValueError: names the file that is damaged or does not fit.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_model

    if not isinstance(model, (nn.Module, type(None))):
        raise TypeError(f"model: expected the original network, found {brief(model)}")
    files = RunFolder(folder)
    if not files.path.is_dir():
        raise FileNotFoundError(f"{files}: no such folder")
    for file in (files.ranks, files.weights, *([files.model] if model is None else [])):
        if not file.is_file():
            hint = "; pass the original network: load(folder, model)" if file == files.model else ""
            raise FileNotFoundError(f"{file}: no such file{hint}")
    facts = _read_facts(files)
    if model is None:
        try:
            model = build_model(str(facts["name"]), facts.get("arguments"), factories=factories)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{files.model}: {first_line(error)}") from None
    network = restructure(model, RankPlan.load(files.ranks))
    try:
        if facts.get("pruned") is True:
            shrink(network, tensor_shapes(files.weights))
        _check_shapes(network, tensor_shapes(files.weights))
        load_model(network, str(files.weights))
        with safe_open(str(files.weights), "pt") as file:
            noted = file.metadata() or {}
    except (RuntimeError, ValueError, SafetensorError) as error:
        told = " ".join(
            " ".join(str(error).split("\n")[:2]).split()
        )  # the second line has the names
        told = told.removeprefix(f"{files.weights}: ")
        raise ValueError(printable(f"{files.weights}: {told}")) from None
    if _CHANNELS_LAST.items() <= noted.items():
        network.to(memory_format=torch.channels_last)
    return network.eval()


def _check_shapes(network: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights of a network with other channels, by the first tensor that differs."""
    for name, value in network.state_dict().items():
        expected, found = tuple(value.shape), shapes.get(name, tuple(value.shape))
        if found != expected:
            raise ValueError(
                f"{name}: expected {list(expected)}, as the given network has it, found "
                f"{list(found)}; give the network that was compressed, with the same channels"
            )


def factory_of(folder: str | Path) -> str | None:
    """Return the name of the factory that makes a folder's original network, if it has one."""
    try:
        name = read_json(RunFolder(folder).model).get("name")
    except (OSError, ValueError):  # whoever reads the folder says what is wrong with it
        return None
    return name if isinstance(name, str) and is_factory(name) else None


def _is_channels_last(network: nn.Module) -> bool:
    """Tell whether a network's kernels are in channels-last memory format."""
    return any(
        layout_of(parameter) == torch.channels_last
        for parameter in network.parameters()
        if parameter.dim() == 4
    )


def _read_facts(files: RunFolder) -> dict[str, Any]:
    """Return what ``model.json`` says; empty where there is none."""
    if not files.model.is_file():
        return {}
    return read_json(files.model)


def shrink(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Replace layers of ``model`` by smaller ones, with random weights, to fit pruned weights.

    Args:
        model: the network; it is changed in place.
        shapes: names of parameters and buffers to their new shapes; others stay.

    Raises:
        ValueError: for a shape that no pruning makes of its layer, and for layers other than
            ungrouped or depthwise convolutions, linear layers and BatchNorm; it names the layer.
    """
    smaller: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, value in own:
            new, old = shapes.get(f"{name}.{key}", tuple(value.shape)), tuple(value.shape)
            if new == old:
                continue
            made = (
                _smaller(module, new)
                if len(new) == len(old) and all(0 < n <= o for n, o in zip(new, old, strict=True))
                else None
            )
            if made is None:
                expected = f"{key} of {list(old)} or, pruned, less"
                kind = type(module).__name__
                raise ValueError(f"layer {name!r}: expected {expected}; found {list(new)} ({kind})")
            smaller[name] = made.to(value.device)
            break
    replace_modules(model, smaller)


def _smaller(module: nn.Module, shape: tuple[int, ...]) -> nn.Module | None:
    """Make a layer like ``module`` whose first tensor has the shape; None if there is none."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return type(module)(
            shape[0], module.eps, module.momentum, module.affine, module.track_running_stats
        )
    if isinstance(module, nn.Linear) and len(shape) == 2:
        return nn.Linear(shape[1], shape[0], module.bias is not None)
    if not isinstance(module, nn.Conv2d) or shape[2:] != module.kernel_size:
        return None
    depthwise = module.groups == module.in_channels == module.out_channels
    if module.groups > 1 and not depthwise:
        return None
    groups = shape[0] if depthwise else 1
    geometry: dict[str, Any] = {
        key: getattr(module, key) for key in ("stride", "padding", "dilation", "padding_mode")
    }
    return nn.Conv2d(
        shape[1] * groups,
        shape[0],
        (shape[2], shape[3]),
        groups=groups,
        bias=module.bias is not None,
        **geometry,
    )
