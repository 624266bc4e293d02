"""Eq. (8) in the weight step: compare the supernet's feature maps with the original network's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import SequenceKey, tree_leaves_with_path

from nni_haloc.search.supernet import MixedRankLayer
from nni_haloc.space.modules import batch_size_of, batches
from nni_haloc.utils.log import logger


class _Compare(torch.autograd.Function):
    """Return ``y`` unchanged, and the mean squared distance of its first images from ``target``.

    The difference lives in the target's memory. There is one pass over the feature map each to
    subtract, to sum the squares, and to add the gradient to the one that comes from above.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        ctx.difference = target.sub_(y[: len(target)])
        ctx.mark_dirty(y)  # y itself, not a view: what follows may write into it in place
        return y, torch.linalg.vector_norm(
            target, dtype=torch.promote_types(y.dtype, torch.float32)
        ).square() / target.numel()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_term: Tensor) -> tuple[Tensor, None]:
        difference, ctx.difference = ctx.difference, None
        n, value = len(difference), -2 / difference.numel()
        if n == len(grad_y):
            return torch.addcmul(
                grad_y, difference, grad_term.to(grad_y), value=value, out=difference
            ), None
        total = grad_y.clone()
        total[:n].addcmul_(difference, grad_term.to(grad_y), value=value)
        return total, None


def first_images(
    args: Sequence[Any], kwargs: Mapping[str, Any], share: float
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return a network's arguments with the first images of the batch alone.

    All images are taken where the batch can't be cut: where nothing in the arguments is a tensor,
    and where tensors are in a list, of which each may be one image.

    Args:
        args: those without names.
        kwargs: those with names.
        share: the part of the images, above 0 to 1; at least one.
    """
    leaves = [path for path, value in tree_leaves_with_path([args, kwargs]) if _has_rows(value)]
    # The first two steps are those of the arguments themselves.
    lists = any(isinstance(step, SequenceKey) for path in leaves for step in path[2:])
    if share == 1 or lists or not leaves:
        return args, kwargs
    number = batch_size_of((args, kwargs))
    return cast(Any, next(batches((args, kwargs), max(1, round(share * number)))))


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


class Kernels:
    """Compare each sampled candidate's kernel with the original weight.

    This is the paper's rejected alternative to Eq. (8), for ablation.

    Args:
        layers: the supernet's mixed layers.
        original: the original network.
    """

    def __init__(self, layers: Iterable[MixedRankLayer], original: nn.Module) -> None:
        modules = dict(original.named_modules())
        self.pairs = [
            (layer, cast(Tensor, modules[layer.label].weight).detach()) for layer in layers
        ]

    @contextmanager
    def compared(self) -> Iterator[list[Tensor]]:
        """Yield a list with one mean squared error, a scalar, for each mixed layer."""
        yield [
            F.mse_loss(layer.kernel().reshape(weight.shape), weight) for layer, weight in self.pairs
        ]


class FeatureMaps:
    """Eq. (8): compare each mixed layer's output with the original layer's on the same batch.

    The frozen original runs once a batch, without gradients. A target lives until the supernet's
    layer has been compared with it. It is a copy only where the original network writes into it in
    place (an activation, say): the first such batch is run twice, because by then it is too late.

    Args:
        supernet: the network that is trained.
        layers: its mixed layers.
        original: the original network, frozen.
        share: the part of the batch that is compared, its first images, above 0 to 1: in
            expectation the same mean, and a cheaper pass. For a share below 1, layers must keep the
            images in their order.
    """

    def __init__(
        self,
        supernet: nn.Module,
        layers: Iterable[MixedRankLayer],
        original: nn.Module,
        share: float = 1.0,
    ) -> None:
        self.supernet, self.layers = supernet, list(layers)
        self.original, self.share = original, share
        self._copied: set[str] = set()
        self._told = False

    def _targets(self, *args: Any, **kwargs: Any) -> dict[str, deque[Tensor]]:
        """Return the original layers' outputs: for each layer a queue, an entry for each call."""
        targets: dict[str, deque[Tensor]] = {layer.label: deque() for layer in self.layers}
        versions: list[tuple[str, Tensor, int]] = []

        def keep(name: str, y: Tensor) -> None:
            kept = y.clone() if name in self._copied else y
            targets[name].append(kept)
            versions.append((name, kept, kept._version))

        modules = dict(self.original.named_modules())
        hooks = [
            modules[name].register_forward_hook(lambda _, __, y, name=name: keep(name, y))
            for name in targets
        ]
        try:
            with torch.no_grad():
                few, few_named = first_images(args, kwargs, self.share)
                self.original(*few, **few_named)
        finally:
            for hook in hooks:
                hook.remove()
        overwritten = {name for name, kept, version in versions if kept._version != version}
        if overwritten:
            self._copied |= overwritten
            return self._targets(*args, **kwargs)
        return targets

    @contextmanager
    def compared(self) -> Iterator[list[Tensor]]:
        """Yield a list that receives the terms of Eq. (8) in one forward pass of the supernet.

        There is one term, a scalar, for each call of a mixed layer. A layer's first call is
        compared with its first in the original network, and so on. Where control flow depends on
        the images, the two may differ: a call without a counterpart, or whose counterpart has
        another shape or more images, has no term; the first time, that is a warning.
        """
        targets: dict[str, deque[Tensor]] = {}
        terms: list[Tensor] = []
        left_out: list[str] = []

        def compare(name: str, y: Tensor) -> Tensor:
            target = targets[name].popleft() if targets[name] else None
            if target is None or target.shape[1:] != y.shape[1:] or len(target) > len(y):
                left_out.append(name)
                return y
            y, term = _Compare.apply(y, target)
            terms.append(term)
            return y

        hook = self.supernet.register_forward_pre_hook(
            lambda _, args, kwargs: targets.update(self._targets(*args, **kwargs)), with_kwargs=True
        )
        for layer in self.layers:
            layer.observe = compare
        try:
            yield terms
        finally:
            for layer in self.layers:
                layer.observe = None
            hook.remove()
            if left_out and not self._told:
                self._told = True
                logger.warning(
                    "search.lam: the outputs of %d layers (%s, ...) have no counterparts of their"
                    " shape in the original network's pass, and are not compared with it",
                    len(set(left_out)),
                    left_out[0],
                )
