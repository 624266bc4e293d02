"""Candidate layers initialised from the trained network: by the data wherever calibration images are at hand, else by the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LayerSpec, last_bias
from .log import logger
from .ranks import Rank, evaluating
from .tucker import Method, decompose


def patch_covariances(
    model: nn.Module, specs: Mapping[str, LayerSpec], images: Tensor, *, batch_size: int = 64, max_patches: int = 65536, seed: int = 0
) -> dict[str, Tensor]:
    """Uncentred covariance ``E[x x^T]`` of each layer's input patches, ``(C k1 k2, C k1 k2)`` in `unfold`'s order, float64 on the CPU.

    One pass of ``model`` over ``images (N, ...)`` in evaluation mode. At most about ``max_patches`` patches a layer are taken, at random
    positions drawn with ``seed``. ``C k1 k2`` squared numbers a layer are held. Patches with NaN or infinite entries raise ValueError.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = {name: torch.zeros(_patch_size(spec), _patch_size(spec), dtype=torch.float64) for name, spec in specs.items()}
    counts = dict.fromkeys(specs, 0)

    def drawn(spec: LayerSpec, x: Tensor) -> Tensor:
        """A batch's share of the patches, unfolded one image at a time: unfolding multiplies memory by the kernel's size."""
        quota = max(1, round(len(x) * max_patches / (len(images) * max(1, len(spec.input_shapes)))))
        if spec.kind == "linear":
            return _subset(_patches(spec, x), quota, generator)
        return torch.cat([_subset(_patches(spec, image), -(-quota // len(x)), generator) for image in x.split(1)])

    def collect(name: str, spec: LayerSpec, x: Tensor) -> None:
        patches = drawn(spec, x)
        sums[name] += (patches.T @ patches).double().cpu()
        counts[name] += len(patches)

    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(lambda _, args, n=name, s=spec: collect(n, s, args[0])) for name, spec in specs.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            for batch in images.split(batch_size):
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    covariances = {name: total / max(1, counts[name]) for name, total in sums.items()}
    for name, covariance in covariances.items():
        if not torch.isfinite(covariance).all():
            raise ValueError(f"layer {name!r}: its inputs on the calibration images are not finite")
    return covariances


def build_candidates(
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    candidates: Mapping[str, Mapping[str, Rank]],
    calibration: Tensor | None = None,
    method: Method | None = None,
) -> dict[str, dict[str, nn.Module]]:
    """A trained layer for every candidate: layer name to candidate name to module, each with weights of its own.

    ``method``: ``data`` where ``calibration`` images are given, else ``hosvd``, unless named. The model is not changed.
    """
    method = method or ("data" if calibration is not None else "hosvd")
    if method == "data" and calibration is None:
        raise ValueError("decomposition 'data' needs calibration images")
    wanted = {name: specs[name] for name, row in candidates.items() if any(r is not None for r in row.values())}
    covariances = patch_covariances(model, wanted, calibration) if method == "data" and calibration is not None else {}
    modules = dict(model.named_modules())
    kept_plain: list[str] = []
    built: dict[str, dict[str, nn.Module]] = {}
    for name, row in candidates.items():
        original = modules[name]
        ranks = [r for r in row.values() if r is not None]
        weight = cast(Tensor, original.weight).detach().cpu()
        weight = weight.flatten(1) if specs[name].kind != "conv" else weight
        bias = last_bias(original)
        found = decompose(weight, ranks, method, covariances.get(name)) if ranks else []
        if name in covariances and weight.dim() == 4:
            plain = decompose(weight, ranks)
            kept_plain += [f"{name} {rank}" for rank, a, b in zip(ranks, found, plain, strict=True) if torch.equal(a[-1], b[-1])]
        factors = iter(found)
        built[name] = {
            candidate: copy.deepcopy(original)
            if rank is None
            else specs[name].assemble(next(factors), bias).to(cast(Tensor, original.weight))
            for candidate, rank in row.items()
        }
    if kept_plain:
        logger.info("decomposed by the weights, because the data gave nothing better: %s", ", ".join(kept_plain))
    return built


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put each named module in the place of the old one, under every name that the old one has."""
    named = dict(model.named_modules())
    replacements = {named[name]: module for name, module in new.items()}
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child in replacements:
                parent._modules[child_name] = replacements[child]


def _patch_size(spec: LayerSpec) -> int:
    return spec.in_channels * spec.kernel_size[0] * spec.kernel_size[1]


def _subset(rows: Tensor, number: int, generator: torch.Generator) -> Tensor:
    if len(rows) <= number:
        return rows
    return rows[torch.randint(len(rows), (number,), generator=generator).to(rows.device)]


def _patches(spec: LayerSpec, x: Tensor) -> Tensor:
    """Input patches as rows ``(patches, C k1 k2)``, float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if spec.kind == "linear":
        return x.reshape(-1, spec.in_channels)
    columns = F.unfold(spec.pad(x), spec.kernel_size, spec.dilation, padding=0, stride=spec.stride)  # (N, C k1 k2, L)
    return columns.transpose(1, 2).flatten(0, 1)
