"""Measure second moments of the inputs and outputs of the trained network's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.modules import Example, batch_size_of, batches, call, evaluating
from nni_haloc.space.reduced_rank import exact_products
from nni_haloc.utils.placement import accelerated, to_device


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
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(specs, 0)

    def most(spec: LayerSpec) -> float:
        size = patch_size(spec)
        return min(max_patches, max(max_work / size**2, 2 * size))

    def collect(name: str, spec: LayerSpec, patches: Tensor) -> None:
        size = patch_size(spec)
        if name not in sums:
            sums[name] = torch.zeros(size, size, dtype=torch.float32, device=patches.device)
        _add_gram(sums[name], patches)
        counts[name] += len(patches)

    device = _visit(model, specs, images, most, collect, batch_size, seed)
    covariances, finite = {}, []
    for name, spec in specs.items():
        size = patch_size(spec)
        total = _mirrored(sums.pop(name, None), size, device).div_(max(1, counts[name]))
        total.diagonal().add_(shrinkage * size / max(1, counts[name]) * total.diagonal().mean())
        finite.append(total.diagonal().isfinite().all())  # no other element is larger
        by_position = total.reshape((size // spec.in_channels, spec.in_channels) * 2)
        covariances[name] = by_position.permute(1, 0, 3, 2).reshape(total.shape)
    _check_finite(list(specs), finite)
    return covariances


@exact_products()
def channel_moments(
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    images: Example,
    *,
    batch_size: int = 64,
    max_patches: int = 4096,
    shrinkage: float = 0.3,
    seed: int = 0,
) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Compute what `nested_factors` needs of each layer: small matrices, not patch covariances.

    They are the sum over the kernel's positions of ``E[x_k x_k^T]``, with ``x_k`` the input
    channels at position k, and ``E[y y^T]`` of the outputs without bias. The model runs once over
    the images, in evaluation mode, on its `device_of`.

    Args:
        model: the original network.
        specs: the layers by name.
        images: ``(N, ...)``, or a tuple or dict of such inputs.
        batch_size: images in a forward pass.
        max_patches: about as many patches of a layer are drawn at most, or eight for each channel.
        shrinkage: as in `patch_covariances`.
        seed: of the random positions.

    Returns:
        Layer name to the two matrices, ``(C, C)`` (None for a matrix, which needs none) and
        ``(F, F)``, float64, on the device that the model ran on.

    Raises:
        ValueError: if a layer's inputs are not finite.
    """
    modules = dict(model.named_modules())
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    energies: dict[str, Tensor] = {}
    counts = dict.fromkeys(specs, 0)

    def most(spec: LayerSpec) -> float:
        return max(max_patches, 8 * max(spec.in_channels, spec.out_channels))

    def kernel(name: str, spec: LayerSpec) -> Tensor:
        """Return the weight as ``(k1 k2 C, F)``, to be applied to drawn patches."""
        weight = modules[name].weight.detach().float()
        return weight.reshape(spec.out_channels, spec.in_channels, -1).transpose(1, 2).flatten(1).T

    def collect(name: str, spec: LayerSpec, patches: Tensor) -> None:
        pixels = patches.reshape(-1, spec.in_channels)
        energies[name] = energies.get(name, 0.0) + pixels.square().sum(dtype=torch.float64)
        for sums, rows in ((inputs, pixels), (outputs, patches @ kernel(name, spec))):
            if sums is inputs and spec.kind != "conv":
                continue
            if name not in sums:
                size = rows.shape[1]
                sums[name] = torch.zeros(size, size, dtype=torch.float32, device=rows.device)
            _add_gram(sums[name], rows)
        counts[name] += len(patches)

    device = _visit(model, specs, images, most, collect, batch_size, seed)
    moments, finite = {}, []
    for name, spec in specs.items():
        number, weight = max(1, counts[name]), kernel(name, spec).to(device).double()
        outer = _mirrored(outputs.pop(name, None), spec.out_channels, device).double() / number
        energy = energies.get(name, outer.new_zeros(()))
        finite.append(energy.isfinite())
        added = shrinkage / number * energy / number
        inner = None
        if spec.kind == "conv":
            inner = _mirrored(inputs.pop(name, None), spec.in_channels, device).double() / number
            inner.diagonal().add_(added)
        positions = patch_size(spec) // spec.in_channels
        moments[name] = inner, outer + added / positions * (weight.T @ weight)
    _check_finite(list(specs), finite)
    return moments


def _visit(
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    images: Example,
    most: Callable[[LayerSpec], float],
    collect: Callable[[str, LayerSpec, Tensor], None],
    batch_size: int,
    seed: int,
) -> torch.device:
    """Run the model over the images, and call ``collect`` with patches of every layer's inputs.

    Args:
        model: the original network.
        specs: the layers by name.
        images: ``(N, ...)``, or a tuple or dict of such inputs.
        most: how many patches of a layer are drawn at most.
        collect: takes a layer's name, its specification, and patches as rows.
        batch_size: images in a forward pass.
        seed: of the random positions.

    Returns:
        The device that the model ran on.
    """
    generator, number = torch.Generator().manual_seed(seed), batch_size_of(images)

    def see(name: str, spec: LayerSpec, x: Tensor) -> None:
        limit = most(spec) / max(1, len(spec.input_shapes))
        collect(
            name, spec, _draw_patches(spec, x, max(1, round(len(x) * limit / number)), generator)
        )

    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(lambda _, args, n=name, s=spec: see(n, s, args[0]))
        for name, spec in specs.items()
    ]
    try:
        with evaluating(model), accelerated(model) as device:
            for part in batches(images, batch_size):
                call(model, tree_map_only(Tensor, lambda value: value.to(device), part))
    finally:
        for hook in hooks:
            hook.remove()
    return device


def _mirrored(upper: Tensor | None, size: int, device: torch.device) -> Tensor:
    """Return the whole of a symmetric matrix from its upper triangle; 0 for a layer not called."""
    if upper is None:
        return torch.zeros(size, size, dtype=torch.float32, device=device)
    upper = upper.triu_()
    return upper + upper.triu(1).T


def _check_finite(names: Sequence[str], finite: Sequence[Tensor]) -> None:
    """Raise ValueError for the first layer whose number is not finite."""
    for name, known in zip(
        names, torch.stack(list(finite)).tolist() if finite else [], strict=True
    ):
        if not known:
            raise ValueError(f"layer {name!r}: its inputs on the calibration images are not finite")


def patch_size(spec: LayerSpec) -> int:
    return spec.in_channels * spec.kernel_size[0] * spec.kernel_size[1]


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
