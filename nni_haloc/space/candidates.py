"""Candidate layers made from the trained network, by the data or by the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from nni_haloc.inputs.options import Decomposition
from nni_haloc.space.covariances import channel_moments, patch_covariances, patch_size
from nni_haloc.space.frozen import keep_frozen
from nni_haloc.space.layers import LayerSpec, last_bias, layout_of
from nni_haloc.space.modules import Example
from nni_haloc.space.names import Rank
from nni_haloc.space.nested import NestedLayer, SharedFactors, shared_factors
from nni_haloc.space.tucker import LowRank, Tucker2, decompose_all
from nni_haloc.utils.errors import first_line
from nni_haloc.utils.log import logger
from nni_haloc.utils.placement import HostCopy, device_of

_TOGETHER = 2**27
"""Bytes of covariances of layers that are decomposed together: wide ones fill a device alone."""


def build_candidates(
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    candidates: Mapping[str, Mapping[str, Rank]],
    calibration: Example | None = None,
    method: Decomposition | None = None,
    memory: int = 2**30,
) -> dict[str, dict[str, nn.Module]]:
    """Make a trained layer for every candidate; the model is left as it is.

    The work is done on the model's `device_of`, for all layers of one shape and the same ranks
    together; the candidates are where the model is.

    Args:
        model: the original network.
        specs: the layers by name.
        candidates: layer name to candidate name to rank.
        calibration: training images, ``(N, ...)``, for a decomposition by the data.
        method: a decomposition (None: ``data`` if there are calibration images, else
            ``warm_hooi``).
        memory: bytes of patch covariances that are held at once, though at least one layer's; each
            group of layers takes one pass over the images.

    Returns:
        Layer name to candidate name to module, each with weights of its own.

    Raises:
        ValueError: if a decomposition fails; the message names the layer.
    """
    check_decomposition(method, calibration is not None)
    method = method or ("data" if calibration is not None else "warm_hooi")
    modules = dict(model.named_modules())
    ranks = {name: [r for r in row.values() if r is not None] for name, row in candidates.items()}
    weights = {  # those of torch's device `meta` are shapes alone
        name: weight.detach() if specs[name].kind == "conv" else weight.detach().flatten(1)
        for name in candidates
        if ranks[name] and not (weight := cast(Tensor, modules[name].weight)).is_meta
    }

    def row(name: str, factors: Iterable[Tucker2 | LowRank]) -> dict[str, nn.Module]:
        original, left = modules[name], iter(factors)
        return {
            candidate: copy.deepcopy(original)
            if rank is None
            else _candidate(specs[name], rank, next(left, None), original)
            for candidate, rank in candidates[name].items()
        }

    device = device_of(model)
    kept_plain: list[str] = []
    built: dict[str, dict[str, nn.Module]] = {}
    for group in _groups({name: specs[name] for name in weights}, memory):
        covariances = (
            patch_covariances(model, group, calibration)
            if method == "data" and calibration is not None
            else {}
        )
        for names in _alike({name: weights[name] for name in group}, ranks):
            decomposed = _decomposed(
                names,
                torch.stack([weights[name].to(device) for name in names]),
                ranks[names[0]],
                method,
                torch.stack([covariances.pop(name) for name in names]) if covariances else None,
            )
            for name, factors, plain in decomposed:
                built[name] = row(name, factors)
                kept_plain += [
                    f"{name} {rank}" for rank, kept in zip(ranks[name], plain, strict=True) if kept
                ]
    if kept_plain:
        logger.info(
            "decomposed by the weights, because the data gave nothing better: %s",
            ", ".join(kept_plain),
        )
    return {name: built[name] if name in built else row(name, ()) for name in candidates}


def check_decomposition(method: str | None, calibrated: bool) -> None:
    """Check that there is a decomposition of a name, and that it has the images that it needs.

    Args:
        method: its name; None chooses one.
        calibrated: whether there are calibration images.

    Raises:
        ValueError: if it can't be made.
    """
    if method is not None and method not in get_args(Decomposition):
        expected = f"expected one of {', '.join(get_args(Decomposition))}"
        raise ValueError(f"decomposition: {expected}, found {method!r}")
    if method == "data" and not calibrated:
        raise ValueError("decomposition 'data' needs calibration images")


def build_nested_candidates(
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    candidates: Mapping[str, Mapping[str, Rank]],
    calibration: Example | None = None,
) -> dict[str, dict[str, nn.Module]]:
    """Make candidates that share one set of factors a layer, see `nested_factors`.

    The dense layer has its own weights; the model is left as it is.

    Args:
        model: the original network.
        specs: the layers by name.
        candidates: layer name to candidate name to rank.
        calibration: training images, ``(N, ...)``, that say which directions matter; without them
            the weights do.

    Returns:
        Layer name to candidate name to module.

    Raises:
        ValueError: if a decomposition fails; the message names the layer.
    """
    modules = dict(model.named_modules())
    ranks = {name: [r for r in row.values() if r is not None] for name, row in candidates.items()}
    decomposed = {
        name: specs[name]
        for name in candidates
        if ranks[name] and not cast(Tensor, modules[name].weight).is_meta
    }
    moments = {} if calibration is None else channel_moments(model, decomposed, calibration)
    built: dict[str, dict[str, nn.Module]] = {}
    for name, row in candidates.items():
        spec, original = specs[name], modules[name]
        low: dict[Rank, nn.Module] = {}
        if ranks[name]:
            weight = cast(Tensor, original.weight).detach()
            most = tuple(max(each) for each in zip(*ranks[name], strict=True))
            try:
                factors = shared_factors(spec, weight, moments.pop(name, None), most)
            except torch.linalg.LinAlgError as error:
                reason = first_line(error)
                raise ValueError(f"layer {name!r}: its decomposition failed ({reason})") from None
            shared = SharedFactors(spec, factors, last_bias(original), weight, ranks[name])
            low = {rank: NestedLayer(shared, rank) for rank in ranks[name]}
            keep_frozen(low[ranks[name][0]], original)
        built[name] = {
            candidate: copy.deepcopy(original) if rank is None else low[rank]
            for candidate, rank in row.items()
        }
    return built


def _alike(weights: Mapping[str, Tensor], ranks: Mapping[str, Sequence[Rank]]) -> list[list[str]]:
    """Group layers whose kernels have one shape and the same ranks, to be decomposed together.

    A group's covariances take `_TOGETHER` bytes at most.
    """
    alike: dict[Any, list[str]] = {}
    for name, weight in weights.items():
        alike.setdefault((weight.shape, weight.dtype, tuple(ranks[name])), []).append(name)
    groups = []
    for names in alike.values():
        most = max(1, _TOGETHER // (4 * weights[names[0]][0].numel() ** 2))
        groups += [names[start : start + most] for start in range(0, len(names), most)]
    return groups


def _decomposed(
    names: Sequence[str],
    weights: Tensor,
    ranks: Sequence[tuple[int, ...]],
    method: Decomposition,
    covariances: Tensor | None,
) -> Iterator[tuple[str, list[Tucker2 | LowRank], list[bool]]]:
    """Decompose layers of one shape together.

    Yields:
        Each layer's name, its factors at each rank, on the processor, and for each rank whether
        they are by the weights because the data gave nothing better.

    Raises:
        ValueError: if a decomposition fails; the message names the layer.
    """
    try:
        found, plain = decompose_all(weights, ranks, method, covariances)
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError) as error:
        if len(names) == 1:
            reason = first_line(error)
            raise ValueError(
                f"layer {names[0]!r}: its decomposition by {method!r} failed ({reason})"
            ) from None
        for i in range(len(names)):  # one after another, to find which
            one = slice(i, i + 1)
            own = None if covariances is None else covariances[one]
            yield from _decomposed(names[one], weights[one], ranks, method, own)
        return
    # All are queued, in the precision of new layers, before the first is waited for.
    dtype = torch.get_default_dtype()
    copies = [[HostCopy(value.to(dtype)) for value in factors] for factors in found]
    plain_copy = HostCopy(plain)
    for i, name in enumerate(names):
        own_factors = [
            type(factors)(*(torch.from_numpy(each.get()[i]) for each in copied))
            for factors, copied in zip(found, copies, strict=True)
        ]
        yield name, own_factors, plain_copy.get()[i].tolist()


def _candidate(
    spec: LayerSpec, rank: Rank, factors: Tucker2 | LowRank | None, original: nn.Module
) -> nn.Module:
    """Build the layer at one rank, with the original's device, precision and memory layout.

    Without factors it has no values (torch's device ``meta``).
    """
    weight = cast(Tensor, original.weight)
    if factors is None:
        with torch.device("meta"):
            candidate = spec.build(rank).to(weight.dtype)
    else:
        made = spec.assemble(factors, last_bias(original))
        candidate = made.to(weight).to(memory_format=layout_of(weight))
    keep_frozen(candidate, original)
    return candidate


def _groups(specs: Mapping[str, LayerSpec], memory: int) -> list[dict[str, LayerSpec]]:
    """Group the layers so that each group's covariances (float32) take ``memory`` bytes at most."""
    groups: list[dict[str, LayerSpec]] = []
    held = math.inf
    for name, spec in specs.items():
        size = 4 * patch_size(spec) ** 2
        if held + size > memory:
            groups.append({})
            held = 0
        groups[-1][name] = spec
        held += size
    return groups
