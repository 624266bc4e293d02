"""Train a compressed network block by block, without labels, to give what the original gives."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_haloc.space.blocks import blocks_of
from nni_haloc.space.modules import evaluating
from nni_haloc.utils.log import logger
from nni_haloc.utils.placement import accelerated
from nni_haloc.utils.reentrant import no_reentrant_checkpoints
from nni_haloc.utils.wrapped import unwrapped

_EQUAL = 1e-8
"""Blocks that are nearer to the original's, as a share of its mean square, are not trained."""


@dataclass(frozen=True)
class BlockError:
    """Say how far a block's output is from the original's, on the images held out.

    Attributes:
        block: the block's name.
        before: mean squared distance before its training, as a share of the output's mean square.
        after: the same after it; the held-out images have chosen the epoch.
    """

    block: str
    before: float
    after: float


def reconstruct_blocks(
    network: nn.Module,
    original: nn.Module,
    images: Tensor,
    layers: Collection[str],
    *,
    epochs: int = 8,
    lr: float = 1e-3,
    batch_size: int = 20,
    held_out: float = 0.2,
    seed: int = 0,
) -> list[BlockError]:
    """Train a compressed network's blocks, one after another, to give the original's outputs.

    Each block gets what the compressed blocks before it give, and learns by Adam to give what the
    original block gives in the original network. So later blocks make up for errors of earlier
    ones, and few images suffice, because each position of an output is a target. BatchNorm's
    statistics stay; its weights learn, as does whatever else of a block needs gradients and belongs
    to it alone. Of all epochs that state stays which is nearest on the images held out; it may be
    the first. Outputs of all blocks are kept for all images, of both networks: 2 GB for 250 images
    of 224 x 224 in EfficientNet-Lite0. Networks in float16 are left as they are.

    Args:
        network: the compressed network, changed in place.
        original: the trained network, of the same modules but for the low-rank layers.
        images: ``(N, ...)``, without labels; a few hundred.
        layers: names of the layers that may be low-rank in ``network``.
        epochs: passes over the images for each block; 0 leaves the network as it is.
        lr: the learning rate, which falls to nothing as a cosine.
        batch_size: images in a step.
        held_out: share of the images that no block is trained on, 0 to below 1; at least one.
        seed: of their draw, and of the order.

    Returns:
        An error for each block that was trained; none if no module can be a block.

    Raises:
        ValueError: if ``held_out`` is out of its range.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: expected a share from 0 to below 1, found {held_out}")
    half = any(p.dtype == torch.float16 for p in network.parameters())
    if not epochs or half or len(images) < 2:
        return []
    network, original = unwrapped(network), unwrapped(original)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    few = max(1, round(held_out * len(images)))
    errors: list[BlockError] = []
    with (
        evaluating(network),
        evaluating(original),
        accelerated(network, original) as device,
        torch.inference_mode(False),
    ):
        images = images.to(device).clone()
        shown, hidden = order[few:].to(device), order[:few].to(device)
        names = blocks_of(original, images[:3].clone(), layers)
        logger.info("training %d blocks to give the original's outputs", len(names))
        targets = _outputs(original, names, images, batch_size)
        chain = _Chain(network, images, batch_size)
        for name in names:
            block, target = network.get_submodule(name), targets.pop(name)
            x = chain.input_of(block)
            if x is None or len(target) != len(images):  # the images decide whether it is called
                continue
            fit = _Fit(block, x, target, shown, hidden, batch_size)
            learning = _own_parameters(block, network)
            if learning and fit.error() > _EQUAL:
                errors.append(BlockError(name, *fit.train(learning, epochs, lr, generator)))
            chain.passed.append((block, _run(block, x, batch_size)))
    return errors


def _own_parameters(block: nn.Module, network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a block that learn and that nothing outside of it has."""
    inside = set(block.modules())
    others = {
        parameter
        for module in network.modules()
        if module not in inside
        for parameter in module.parameters(recurse=False)
    }
    return [p for p in block.parameters() if p.requires_grad and p not in others]


class _Fit:
    """Fit one block to its targets.

    Args:
        block: the module that is trained.
        x: its inputs.
        target: what it is to give.
        shown: places of the images that it is trained on.
        hidden: places of the others.
        batch_size: images in a step.
    """

    def __init__(
        self,
        block: nn.Module,
        x: Tensor,
        target: Tensor,
        shown: Tensor,
        hidden: Tensor,
        batch_size: int,
    ) -> None:
        self.block, self.x, self.target = block, x, target
        self.shown, self.hidden, self.batch_size = shown, hidden, batch_size
        self.scale = target.square().mean().clamp_min(1e-12)

    def train(
        self,
        learning: list[nn.Parameter],
        epochs: int,
        lr: float,
        generator: torch.Generator,
    ) -> tuple[float, float]:
        """Train parameters; return the block's errors on the hidden images, before and after."""
        before = best = self.error()
        kept = copy.deepcopy(self.block.state_dict())
        optimizer = torch.optim.Adam(learning, lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            order = torch.randperm(len(self.shown), generator=generator).to(self.shown.device)
            for some in self.shown[order].split(self.batch_size):
                with torch.enable_grad(), no_reentrant_checkpoints("a block's training"):
                    distance = F.mse_loss(self.block(self.x[some]), self.target[some])
                    optimizer.zero_grad()
                    (distance / self.scale).backward()
                optimizer.step()
            schedule.step()
            error = self.error()
            if error < best:  # never where it is not finite
                best, kept = error, copy.deepcopy(self.block.state_dict())
        self.block.load_state_dict(kept)
        self.block.zero_grad()
        return before, best

    def error(self) -> float:
        """Return the block's error on the hidden images, infinite where it is not a number."""
        hidden = _run(self.block, self.x[self.hidden], self.batch_size)
        error = float(F.mse_loss(hidden, self.target[self.hidden]) / self.scale)
        return error if math.isfinite(error) else math.inf


class _Reached(Exception):
    """End a pass at the block whose input is wanted."""


class _Chain:
    """Find each block's input, given what the blocks before it give.

    Args:
        network: the network.
        images: what it runs on.
        batch_size: images in a pass.

    Attributes:
        passed: the blocks so far, each with its outputs on all images.
    """

    def __init__(self, network: nn.Module, images: Tensor, batch_size: int) -> None:
        self.network, self.images, self.batch_size = network, images, batch_size
        self.passed: list[tuple[nn.Module, Tensor]] = []

    @torch.no_grad()
    def input_of(self, block: nn.Module) -> Tensor | None:
        """Return the input of a block on all images; None if it is not called with each of them.

        What has been passed is answered, what stands between is computed again.
        """
        found: list[Tensor] = []

        def reached(x: Tensor) -> Tensor:
            found.append(x.clone())
            raise _Reached

        for start in range(0, len(self.images), self.batch_size):
            part = slice(start, start + self.batch_size)
            forwards: dict[nn.Module, Any] = {
                module: partial(_answer, output[part]) for module, output in self.passed
            }
            with _replaced({**forwards, block: reached}), suppress(_Reached):
                self.network(self.images[part].clone())
        whole = sum(map(len, found)) == len(self.images)
        return torch.cat(found) if whole else None


def _answer(output: Tensor, x: Tensor) -> Tensor:
    """Return a copy of an output, whatever the input."""
    return output.clone()


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Give modules other forward passes for the time of a block."""
    own = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        for module, forward in own.items():
            object.__delattr__(module, "forward")
            if forward is not None:
                object.__setattr__(module, "forward", forward)


@torch.no_grad()
def _outputs(
    network: nn.Module, names: list[str], images: Tensor, batch_size: int
) -> dict[str, Tensor]:
    """Return what each block gives on the images."""
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _, __, y, kept=kept: kept.append(y.clone())
        )
        for name, kept in parts.items()
    ]
    try:
        for some in images.split(batch_size):
            network(some.clone())
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts.pop(name) or [images[:0]]) for name in names}


@torch.no_grad()
def _run(block: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    return torch.cat([block(some.clone()) for some in x.split(batch_size)])
