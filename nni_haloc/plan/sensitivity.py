"""Measure each candidate's sensitivity: the loss that it adds when it alone is in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_haloc.inputs.labels import IGNORED, check_labels
from nni_haloc.space.modules import copy_of, evaluating, replace_modules
from nni_haloc.space.outputs import divergence, logits_of
from nni_haloc.utils.errors import no_endless_nesting
from nni_haloc.utils.placement import HostCopy, accelerated, device_of
from nni_haloc.utils.wrapped import unwrapped


def sensitivities(
    model: nn.Module,
    candidates: Mapping[str, Mapping[str, nn.Module]],
    images: Tensor,
    labels: Tensor | None = None,
    batch_size: int = 64,
    *,
    bf16: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, dict[str, float]]:
    """Measure the mean loss that each candidate adds, all else left as it was.

    See `added_losses`, which this takes the means of.

    Args:
        model: the trained network; it is not changed.
        candidates: layer to candidate name to its trained module, see `RankSpace.modules_by_layer`.
        images: ``(N, ...)``.
        labels: their classes, ``(N,)``; without them the loss is the distance from the original's
            outputs.
        batch_size: images in one pass.
        bf16: run in mixed precision.
        progress: called with the numbers of finished and of all batches, first with 0 finished.

    Returns:
        Layer to candidate to added loss.

    Raises:
        DataError: if the labels are not classes of the network's outputs, one for each image.
        ValueError: if a loss is not finite; the message names layer and candidate.
    """
    added = added_losses(
        model, candidates, images, labels, batch_size, bf16=bf16, progress=progress
    )
    return {
        layer: {name: float(losses.mean()) for name, losses in row.items()}
        for layer, row in added.items()
    }


def added_losses(
    model: nn.Module,
    candidates: Mapping[str, Mapping[str, nn.Module]],
    images: Tensor,
    labels: Tensor | None = None,
    batch_size: int = 64,
    *,
    bf16: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, dict[str, np.ndarray]]:
    """Measure the loss that each candidate adds on every image, all else left as it was.

    The loss is the cross-entropy or, without labels, the Kullback-Leibler divergence of the outputs
    from the original network's. The network is in evaluation mode, on its `device_of`. For each
    candidate that is not the layer's own copy, it is run from that layer on, if that gives what a
    whole pass gives (tried on two images first). Outputs of one batch are kept meanwhile:
    ResNet-18's, for 64 images of 224 x 224, take 1.5 GB. So are, on a CUDA device, copies of the
    candidates that are elsewhere.

    Args:
        model, candidates, images, labels, batch_size, bf16, progress: see `sensitivities`.

    Returns:
        Layer to candidate to the added loss of each image, ``(N,)``, float64.

    Raises:
        DataError: if the labels are not classes of the network's outputs, one for each image.
        ValueError: if a loss is not finite; the message names layer and candidate.
    """
    device, originals = device_of(model), dict(unwrapped(model).named_modules())
    others = [
        (layer, name, _on(device, module))
        for layer, row in candidates.items()
        for name, module in row.items()
        if not _equal(module, originals[layer])
    ]
    network = copy_of(model).to(device)
    own = dict(network.named_modules())
    layers = [own[layer] for layer in candidates]
    last = {layer: module for layer, _, module in others}
    parts: list[HostCopy] = []  # of each batch, first the original's losses, then the others'
    with (
        evaluating(network),
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        some = images[:2].to(device)
        if labels is not None:
            outputs = logits_of(network(some.clone()))
            labels = check_labels(labels, (len(images), *outputs.shape[1:]))
        modules = {own[layer]: module for layer, module in last.items()}
        resumed = _can_be_resumed(network, layers, modules, some)
        batches = images.split(batch_size)
        targets: Sequence[Tensor | None] = (
            [None] * len(batches) if labels is None else labels.split(batch_size)
        )
        progress(0, len(batches))
        for done, (x, y) in enumerate(zip(batches, targets, strict=True), 1):
            run = _ResumedRun(network, layers, x.to(device))
            target = run.result if y is None else y.to(device)
            losses = [losses_of(run.result, target)]
            for layer, _, module in others:
                losses.append(losses_of(run.replaced(own[layer], module, resumed), target))
            run.leave()
            parts.append(HostCopy(torch.stack(losses)))
            progress(done, len(batches))
    found = np.concatenate([part.get() for part in parts], axis=1)
    added = {
        layer: {name: np.zeros(len(images)) for name in row} for layer, row in candidates.items()
    }
    for (layer, name, _), values in zip(others, found[1:] - found[0], strict=True):
        if not np.isfinite(values).all():
            raise ValueError(
                f"layer {layer!r}, candidate {name!r}:"
                f" the loss on the calibration images is {values.mean()}"
            )
        added[layer][name] = values
    return added


def _can_be_resumed(
    network: nn.Module,
    layers: Sequence[nn.Module],
    modules: Mapping[nn.Module, nn.Module],
    x: Tensor,
) -> bool:
    """Tell whether passes that go on from a layer give what whole passes give.

    It is tried with a module in each layer's place, one after another. They do not where a call
    that is answered would have had an effect besides its output: a module that works in place on an
    input that is used again, or that leaves something for another module to find.

    Args:
        network: the network.
        layers: those whose outputs are kept.
        modules: layer to what is tried in its place.
        x: an input.
    """
    run = _ResumedRun(network, layers, x)
    same = [torch.ones((), dtype=torch.bool, device=x.device)]
    for layer, module in modules.items():
        a, b = (run.replaced(layer, module, resumed) for resumed in (True, False))
        same.append(torch.isclose(a, b, rtol=1e-4, atol=1e-5).all())
    run.leave()
    return bool(torch.stack(same).all())


def _on(device: torch.device, module: nn.Module) -> nn.Module:
    """Return a module, or its copy on a device that it is not on."""
    there = all(value.device == device for value in module.state_dict().values())
    return module if there else copy_of(module).to(device)


def _equal(module: nn.Module, other: nn.Module) -> bool:
    """Tell whether two modules compute the same."""
    a, b = module.state_dict(), other.state_dict()
    return (
        type(module) is type(other)
        and a.keys() == b.keys()
        and all(torch.equal(a[key], b[key]) for key in a)
    )


def loss(network: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 128) -> float:
    """Return a network's mean cross-entropy in evaluation mode.

    Args:
        network: it is left as it was.
        images: ``(N, ...)``.
        labels: their classes, ``(N,)``, or the original's outputs for a mean divergence from them.
        batch_size: images in one pass.
    """
    with evaluating(network), accelerated(network) as device, torch.inference_mode():
        batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        losses = [
            losses_of(logits_of(network(x.to(device))), y.to(device)).sum() for x, y in batches
        ]
        return float(torch.stack(losses).sum()) / len(labels)


def losses_of(logits: Tensor, target: Tensor) -> Tensor:
    """Return each image's loss, float64 ``(N,)``: against classes, or another network's logits.

    Logits are ``(N, classes)``, or ``(N, classes, ...)`` with a place for each pixel.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if not target.is_floating_point():
        target = target.long()
        losses = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none")
        counted = (target != IGNORED).reshape(len(target), -1).sum(1)
        return losses.double().reshape(len(losses), -1).sum(1) / counted.clamp(min=1)
    losses = divergence(logits, target.to(logits))
    return losses.double().reshape(len(losses), -1).mean(1)


class _ResumedRun:
    """Run a network again and again on the same input, each time from another layer on.

    What is called before that layer is called again, but answered from a first, recorded pass:
    whole blocks at once where they are over by then. Only what stands between the calls is computed
    again.
    """

    def __init__(self, network: nn.Module, layers: Iterable[nn.Module], x: Tensor) -> None:
        self.network, self.layers, self.x = network, set(layers), x
        self.ends: list[int] = []
        """How many calls had begun when a call was over; in the order of their beginnings."""
        self.outputs: list[Any] = []
        self.first: dict[nn.Module, int] = {}
        """Layer to its first call."""
        self.at = self.until = 0
        self.forwards = {
            m: m.forward
            for m in network.modules()
            if m is not network and not isinstance(m, torch.jit.ScriptModule)
        }
        for module, forward in self.forwards.items():
            module.forward = partial(self._recorded, module, forward)
        self.result = logits_of(network(x.clone()))
        self._forget(0)
        for module, forward in self.forwards.items():
            module.forward = partial(self._answered, forward)

    def replaced(self, layer: nn.Module, module: nn.Module, resumed: bool = True) -> Tensor:
        """Return the network's logits with a module in a layer's place.

        Args:
            layer: one of the network's layers.
            module: what is in its place.
            resumed: answer what comes before the layer.
        """
        name = next(name for name, m in self.network.named_modules() if m is layer)
        replace_modules(self.network, {name: module})
        self.at, self.until = 0, self.first.get(layer, 0) if resumed else 0
        try:
            return logits_of(self.network(self.x.clone()))
        finally:
            replace_modules(self.network, {name: layer})

    def leave(self) -> None:
        """Leave the network as it was."""
        for module, forward in self.forwards.items():
            module.forward = forward

    def _recorded(
        self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a call of the first pass, and keep its output."""
        call = len(self.ends)
        if module in self.layers:
            self.first.setdefault(module, call)
        self.ends.append(0)
        self.outputs.append(None)
        result = forward(*args, **kwargs)
        self.ends[call], self.outputs[call] = len(self.ends), _copied(result)
        self._forget(call + 1)
        return result

    def _forget(self, start: int) -> None:
        """Drop cached outputs, from a call on, whose enclosing call is itself cached."""
        for call in range(start, len(self.ends)):
            if not any(self.ends[call] <= first for first in self.first.values()):
                self.outputs[call] = None

    def _answered(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the cached output of a call before the replaced layer; run any other."""
        if self.at >= self.until:
            return forward(*args, **kwargs)
        call = self.at
        if self.ends[call] > self.until:  # the layer is inside it
            self.at += 1
            return forward(*args, **kwargs)
        self.at = self.ends[call]
        return _copied(self.outputs[call])


def _copied(output: Any) -> Any:
    """Return a copy of an output: what comes after the call may work in place."""
    with no_endless_nesting():
        return tree_map_only(Tensor, Tensor.clone, output)
