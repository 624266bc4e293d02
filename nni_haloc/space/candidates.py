"""Candidate layers made from the trained network, by the data or by the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_haloc.inputs.options import Decomposition
from nni_haloc.space.layers import LayerSpec, last_bias, layout_of
from nni_haloc.space.modules import Example, batch_size_of, batches, call, evaluating
from nni_haloc.space.names import Rank
from nni_haloc.space.reduced_rank import exact_products
from nni_haloc.space.tucker import LowRank, Tucker2, decompose_all
from nni_haloc.utils.errors import first_line
from nni_haloc.utils.log import logger
from nni_haloc.utils.placement import HostCopy, accelerated, device_of, to_device

_TOGETHER = 2**27
"""Bytes of covariances of layers that are decomposed together: wide ones fill a device alone."""


@exact_products()
def patch_covariances(
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    images: Example,
    *,
    batch_size: int = 64,
    max_patches: int = 16384,
    max_work: float = 5e10,
    shrinkage: float = 0.3,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Compute the uncentred covariance ``E[x x^T]`` of each layer's input patches.

    The model runs once over the images, in evaluation mode, on its `device_of`. Only the drawn
    patches are unfolded, the same on every device. ``D^2`` numbers are held for each layer, with
    ``D = C k1 k2``.

    Args:
        model: the original network.
        specs: the layers by name.
        images: ``(N, ...)``, or a tuple or dict of such inputs.
        batch_size: images in a forward pass.
        max_patches: about as many patches of a layer are drawn at most.
        max_work: no more than ``max_work / D^2`` or ``2 D`` patches are drawn (9,216 for 512
            channels and a 3x3 kernel).
        shrinkage: ``shrinkage * D / patches`` of the mean eigenvalue is added to the diagonal, so
            that a fit to few patches holds for others, too.
        seed: of the random positions.

    Returns:
        Layer name to covariance, ``(D, D)`` in `unfold`'s order, float32, on the device that the
        model ran on.

    Raises:
        ValueError: if a layer's inputs are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    counts, number = dict.fromkeys(specs, 0), batch_size_of(images)

    def collect(name: str, spec: LayerSpec, x: Tensor) -> None:
        size = _patch_size(spec)
        limit = min(max_patches, max(max_work / size**2, 2 * size)) / max(1, len(spec.input_shapes))
        patches = _draw_patches(spec, x, max(1, round(len(x) * limit / number)), generator)
        _add_gram(sums[name], patches)
        counts[name] += len(patches)

    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(
            lambda _, args, n=name, s=spec: collect(n, s, args[0])
        )
        for name, spec in specs.items()
    ]
    try:
        with evaluating(model), accelerated(model) as device:
            for name, spec in specs.items():
                size = _patch_size(spec)
                sums[name] = torch.zeros(size, size, dtype=torch.float32, device=device)
            for part in batches(images, batch_size):
                call(model, tree_map_only(Tensor, lambda value: value.to(device), part))
    finally:
        for hook in hooks:
            hook.remove()
    covariances, finite = {}, []
    for name, spec in specs.items():
        total = sums.pop(name).div_(max(1, counts[name])).triu_()
        total += total.triu(1).T
        total.diagonal().add_(
            shrinkage * len(total) / max(1, counts[name]) * total.diagonal().mean()
        )
        finite.append(total.diagonal().isfinite().all())  # no other element is larger
        by_position = total.reshape((_patch_size(spec) // spec.in_channels, spec.in_channels) * 2)
        covariances[name] = by_position.permute(1, 0, 3, 2).reshape(total.shape)
    for name, known in zip(specs, torch.stack(finite).tolist() if finite else [], strict=True):
        if not known:
            raise ValueError(f"layer {name!r}: its inputs on the calibration images are not finite")
    return covariances


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
    method = method or ("data" if calibration is not None else "warm_hooi")
    if method == "data" and calibration is None:
        raise ValueError("decomposition 'data' needs calibration images")
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
            return spec.build(rank).to(weight.dtype)
    return (
        spec.assemble(factors, last_bias(original)).to(weight).to(memory_format=layout_of(weight))
    )


def _patch_size(spec: LayerSpec) -> int:
    return spec.in_channels * spec.kernel_size[0] * spec.kernel_size[1]


def _groups(specs: Mapping[str, LayerSpec], memory: int) -> list[dict[str, LayerSpec]]:
    """Group the layers so that each group's covariances (float32) take ``memory`` bytes at most."""
    groups: list[dict[str, LayerSpec]] = []
    held = math.inf
    for name, spec in specs.items():
        size = 4 * _patch_size(spec) ** 2
        if held + size > memory:
            groups.append({})
            held = 0
        groups[-1][name] = spec
        held += size
    return groups


def _draw_patches(spec: LayerSpec, x: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Draw ``number`` input patches of a batch, or take all if there are no more.

    They are rows ``(number, k1 k2 C)`` in float32. Channels are the fastest index, so that each
    position of a patch is one contiguous piece of the channels-last input: that is ten times faster
    to gather.
    """
    if spec.kind == "linear":
        rows = x.reshape(-1, spec.in_channels)
        return rows.index_select(
            0, to_device(_drawn(len(rows), number, generator), x.device)
        ).float()
    x = spec.pad(x).permute(0, 2, 3, 1)
    n, height, width, c = x.shape
    (k1, k2), (s1, s2), (d1, d2) = spec.kernel_size, spec.stride, spec.dilation
    rows_out, columns_out = (
        (height - d1 * (k1 - 1) - 1) // s1 + 1,
        (width - d2 * (k2 - 1) - 1) // s2 + 1,
    )
    drawn = to_device(_drawn(n * rows_out * columns_out, number, generator), x.device)
    image, place = drawn // (rows_out * columns_out), drawn % (rows_out * columns_out)
    first = (
        image * (height * width) + place // columns_out * (s1 * width) + place % columns_out * s2
    )
    across, down = (torch.arange(k, device=x.device) for k in (k2, k1))
    window = (down[:, None] * (d1 * width) + across * d2).flatten()
    pixels = x.reshape(-1, c).index_select(0, (first[:, None] + window).flatten())
    return pixels.view(len(drawn), -1).float()


def _drawn(available: int, number: int, generator: torch.Generator) -> Tensor:
    return (
        torch.arange(available)
        if available <= number
        else torch.randperm(available, generator=generator)[:number]
    )


def _add_gram(total: Tensor, rows: Tensor, block: int = 512) -> None:
    """Add ``rows^T rows`` to ``total``, only on and above its diagonal: about half of the work."""
    for start in range(0, rows.shape[1], block):
        end = start + block
        total[start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:])
