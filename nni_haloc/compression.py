"""A trained model and a plan make a compressed model; a run's folder gives it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .candidates import build_candidates
from .device.files import whole, write_json
from .errors import first_line, first_sentence
from .layers import LayerSpec
from .models import build_model
from .modules import Example, copy_of, replace_modules
from .ranks import RankPlan, rank_name
from .tucker import Method

RANKS_FILE, COSTS_FILE, METRICS_FILE, WEIGHTS_FILE, MODEL_FILE, BENCH_FILE = (
    "ranks.json", "costs.json", "metrics.json", "weights.safetensors", "model.json", "bench.json",
)  # fmt: skip


def compress(model: nn.Module, plan: RankPlan, calibration: Example | None = None, method: Method | None = None) -> nn.Module:
    """A compressed copy of a trained ``model``, its layers decomposed afresh at the plan's ranks.

    By the data where ``calibration`` images ``(N, ...)`` are given (a tuple or dict of inputs where the model takes several), else by the
    weights (`build_candidates`). For the weights that a search trained, see `Haloc.network`. Raises ValueError if the
    plan names a layer that the model does not have or can't be decomposed so.
    """
    specs = _specs(model, plan)
    wanted = {name: {rank_name(rank): rank} for name, rank in plan.ranks.items() if rank is not None}
    built = build_candidates(model, specs, wanted, calibration, method)
    compressed = copy_of(model)
    replace_modules(compressed, {name: next(iter(row.values())) for name, row in built.items()})
    return compressed


def restructure(model: nn.Module, plan: RankPlan) -> nn.Module:
    """A copy of ``model`` with the plan's layers in place and random weights in them: what a state dict is loaded into."""
    specs = _specs(model, plan)
    compressed = copy_of(model)
    replace_modules(compressed, {name: specs[name].build(rank) for name, rank in plan.ranks.items() if rank is not None})
    return compressed


def _specs(model: nn.Module, plan: RankPlan) -> dict[str, LayerSpec]:
    modules = dict(model.named_modules())
    specs = {}
    for name, rank in plan.ranks.items():
        if not name or name not in modules:
            raise ValueError(f"the plan's layer {name!r} is not in {type(model).__name__}")
        try:
            specs[name] = spec = LayerSpec.of(name, modules[name])
        except TypeError as error:
            raise ValueError(f"the plan's layer {error}") from None
        try:
            spec.check_rank(rank)
        except ValueError as error:
            raise ValueError(f"the plan's {error}") from None
    return specs


def save(folder: str | Path, compressed: nn.Module, plan: RankPlan, model: Mapping[str, Any] | None = None) -> None:
    """Write ``ranks.json``, the weights and, where ``model`` (``name`` and ``arguments`` of `build_model`) is given, ``model.json``.

    ``metrics.json`` there, which is of other weights, is removed. OSError names the file that can't be written; the old weights then stay.
    """
    from safetensors.torch import save_model

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / WEIGHTS_FILE) as part:
        save_model(compressed, str(part))
        if model is not None:
            write_json(folder / MODEL_FILE, model)
        plan.save(folder / RANKS_FILE)
        (folder / METRICS_FILE).unlink(missing_ok=True)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The compressed network of a run's folder, in evaluation mode; needs torch and safetensors, neither NNI nor Lightning.

    ``model``: an instance of the uncompressed network (it is copied), for runs of networks that have no name in ``model.json``.
    Raises FileNotFoundError or ValueError naming the file that is missing or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    folder = Path(folder)
    for file in (RANKS_FILE, WEIGHTS_FILE, *([MODEL_FILE] if model is None else [])):
        if not (folder / file).is_file():
            hint = "; pass the uncompressed model as load(folder, model)" if file == MODEL_FILE else ""
            raise FileNotFoundError(f"{folder / file}: no such file{hint}")
    pruned = False
    if (folder / MODEL_FILE).is_file():
        try:
            facts = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
            pruned = facts.get("pruned", False) is True
            if model is None:
                model = build_model(str(facts["name"]), facts.get("arguments"), factories=False)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / MODEL_FILE}: {first_line(error)}") from None
    assert model is not None
    compressed = restructure(model, RankPlan.load(folder / RANKS_FILE))
    try:
        if pruned:
            shrink(compressed, _shapes(folder / WEIGHTS_FILE))
        load_model(compressed, str(folder / WEIGHTS_FILE))
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {first_line(error)}") from None
    return compressed.eval()


def shrink(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Put smaller layers, with random weights, in the place of those of ``model`` whose weight has another of the ``shapes``.

    ``shapes``: of parameters, by name; others stay. ValueError, naming the layer, for a layer other than a convolution, ungrouped or
    depthwise, a linear layer or BatchNorm, and for a shape that no pruning makes of it.
    """
    smaller: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, value in own:
            new, old = shapes.get(f"{name}.{key}", tuple(value.shape)), tuple(value.shape)
            if new == old:
                continue
            made = _smaller(module, new) if len(new) == len(old) and all(0 < n <= o for n, o in zip(new, old, strict=True)) else None
            if made is None:
                expected = f"{key} of {list(old)} or, pruned, less"
                raise ValueError(f"layer {name!r}: expected {expected}; found {list(new)} ({type(module).__name__})")
            smaller[name] = made.to(value.device)
            break
    replace_modules(model, smaller)


def _smaller(module: nn.Module, shape: tuple[int, ...]) -> nn.Module | None:
    """A layer like this one, whose first parameter or buffer has the shape; None where there is none."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return type(module)(shape[0], module.eps, module.momentum, module.affine, module.track_running_stats)
    if isinstance(module, nn.Linear) and len(shape) == 2:
        return nn.Linear(shape[1], shape[0], module.bias is not None)
    if not isinstance(module, nn.Conv2d) or shape[2:] != module.kernel_size:
        return None
    depthwise = module.groups == module.in_channels == module.out_channels
    if module.groups > 1 and not depthwise:
        return None
    groups = shape[0] if depthwise else 1
    geometry: dict[str, Any] = {key: getattr(module, key) for key in ("stride", "padding", "dilation", "padding_mode")}
    return nn.Conv2d(shape[1] * groups, shape[0], (shape[2], shape[3]), groups=groups, bias=module.bias is not None, **geometry)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor in a safetensors file; the file is at least as large as they say."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        names = file.keys()  # it is no mapping
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


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
    except Exception as error:  # torch, pickle, zip and safetensors each have their own for a bad file
        raise ValueError(f"{path}: not a file of weights that can be loaded safely ({first_sentence(error)})") from None
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
        raise ValueError(f"{path}: does not fit the model: {' '.join(str(error).split()[6:40])}") from None
