"""Save a compressed network in a folder, and load it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nni_haloc.inputs.models import build_model
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import METRICS_FILE, MODEL_FILE, RANKS_FILE, WEIGHTS_FILE
from nni_haloc.space.modules import replace_modules
from nni_haloc.utils.errors import first_line
from nni_haloc.utils.files import whole, write_json


def save(
    folder: str | Path,
    compressed: nn.Module,
    plan: RankPlan,
    model: Mapping[str, Any] | None = None,
) -> None:
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
            hint = (
                "; pass the uncompressed model as load(folder, model)" if file == MODEL_FILE else ""
            )
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
            made = (
                _smaller(module, new)
                if len(new) == len(old) and all(0 < n <= o for n, o in zip(new, old, strict=True))
                else None
            )
            if made is None:
                expected = f"{key} of {list(old)} or, pruned, less"
                raise ValueError(
                    f"layer {name!r}: expected {expected}; found {list(new)} ({type(module).__name__})"
                )
            smaller[name] = made.to(value.device)
            break
    replace_modules(model, smaller)


def _smaller(module: nn.Module, shape: tuple[int, ...]) -> nn.Module | None:
    """A layer like this one, whose first parameter or buffer has the shape; None where there is none."""
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


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor in a safetensors file; the file is at least as large as they say."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        names = file.keys()  # it is no mapping
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}
