"""Train a compressed network block by block, without labels, to give what the original gives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_haloc.space.blocks import blocks_of
from nni_haloc.space.layers import rank_of
from nni_haloc.space.modules import evaluating
from nni_haloc.utils.placement import accelerated


@dataclass(frozen=True)
class BlockError:
    """Say how far a block's output is from the original's, on images that it was not trained on.

    Attributes:
        block: the block's name.
        before: mean squared distance before its training, as a share of the output's mean square.
        after: the same after it.
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
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[BlockError]:
    """Train a compressed network's blocks, one after another, to give the original's outputs.

    Each block gets what the compressed blocks before it give, and learns by Adam to give what the
    original block gives in the original network. So later blocks make up for errors of earlier
    ones, and few images suffice, because each position of an output is a target. BatchNorm's
    statistics stay; its weights learn. Of all epochs that state stays which is nearest on the
    images held out; it may be the first. Outputs of all blocks are kept for all images, of both
    networks: 2 GB for 250 images of 224 x 224 in EfficientNet-Lite0.

    Args:
        network: the compressed network, changed in place.
        original: the trained network, of the same modules but for the layers.
        images: ``(N, ...)``, without labels; a few hundred.
        layers: names of the layers that may be low-rank in ``network``.
        epochs: passes over the images for each block; 0 leaves the network as it is.
        lr: the learning rate, which falls to nothing as a cosine.
        batch_size: images in a step.
        held_out: share of the images that no block is trained on.
        seed: of their draw, and of the order.
        progress: called with the numbers of finished and of all blocks.

    Returns:
        An error for each block that was trained.
    """
    if not epochs:
        return []
    generator = torch.Generator().manual_seed(seed)
    names = blocks_of(original, images[:1].to(next(original.parameters()).device), layers)
    order = torch.randperm(len(images), generator=generator)
    few = max(1, round(held_out * len(images)))
    errors: list[BlockError] = []
    with evaluating(network), evaluating(original), accelerated(network, original) as device:
        images = images.to(device)
        chain = _Chain(network, names, images, batch_size)
        targets = _outputs(original, names, images, batch_size)
        changed = False
        for i, name in enumerate(names):
            block, target = network.get_submodule(name), targets.pop(name)
            changed = changed or any(rank_of(m) is not None for m in block.modules())
            if not changed:
                chain.outputs.append(target)
                continue
            progress(i, len(names))
            x = chain.input_of(i)
            fit = _Fit(block, x, target, order[few:].to(device), order[:few].to(device), batch_size)
            errors.append(BlockError(name, *fit.train(epochs, lr, generator)))
            chain.outputs.append(_run(block, x, batch_size))
        progress(len(names), len(names))
    return errors


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

    def train(self, epochs: int, lr: float, generator: torch.Generator) -> tuple[float, float]:
        """Train the block, and return its errors on the hidden images, before and after."""
        before = best = self._error()
        learning = [p for p in self.block.parameters() if p.requires_grad]
        if not learning:
            return before, before
        kept = copy.deepcopy(self.block.state_dict())
        optimizer = torch.optim.Adam(learning, lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            order = torch.randperm(len(self.shown), generator=generator).to(self.shown.device)
            for some in self.shown[order].split(self.batch_size):
                with torch.enable_grad():
                    distance = F.mse_loss(self.block(self.x[some]), self.target[some])
                    optimizer.zero_grad()
                    (distance / self.scale).backward()
                optimizer.step()
            schedule.step()
            error = self._error()
            if error < best:  # never where it is not finite
                best, kept = error, copy.deepcopy(self.block.state_dict())
        self.block.load_state_dict(kept)
        self.block.zero_grad()
        return before, best

    def _error(self) -> float:
        hidden = _run(self.block, self.x[self.hidden], self.batch_size)
        error = float(F.mse_loss(hidden, self.target[self.hidden]) / self.scale)
        return error if math.isfinite(error) else math.inf


class _Reached(Exception):
    """End a pass at the block whose input is wanted."""


class _Chain:
    """Find each block's input, given what the blocks before it give.

    Args:
        network: the network.
        names: its blocks, in the order of their calls.
        images: what it runs on.
        batch_size: images in a pass.
    """

    def __init__(
        self, network: nn.Module, names: list[str], images: Tensor, batch_size: int
    ) -> None:
        self.network, self.images, self.batch_size = network, images, batch_size
        self.blocks = [network.get_submodule(name) for name in names]
        self.outputs: list[Tensor] = []

    @torch.no_grad()
    def input_of(self, i: int) -> Tensor:
        """Return block i's input; what comes before it is answered from ``outputs``."""
        found: list[Tensor] = []

        def reached(x: Tensor) -> Tensor:
            found.append(x.clone())
            raise _Reached

        for start in range(0, len(self.images), self.batch_size):
            part = slice(start, start + self.batch_size)
            answers = [lambda _, y=output[part]: y.clone() for output in self.outputs[:i]]
            with _replaced(self.blocks[: i + 1], [*answers, reached]):
                try:
                    self.network(self.images[part])
                except _Reached:
                    continue
        return torch.cat(found)


@contextmanager
def _replaced(
    modules: list[nn.Module], forwards: list[Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Give modules other forward passes for the time of a block."""
    for module, forward in zip(modules, forwards, strict=True):
        object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        for module in modules:
            object.__delattr__(module, "forward")


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
            network(some)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(kept) for name, kept in parts.items()}


@torch.no_grad()
def _run(block: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    return torch.cat([block(some.clone()) for some in x.split(batch_size)])
