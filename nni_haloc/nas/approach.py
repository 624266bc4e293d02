"""Eq. 8 during the weight step: the original network's feature maps on the same batch, compared layer by layer as the supernet runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..objective import approach_loss
from .supernet import MixedRankLayer


class FeatureMaps:
    """Compares each mixed layer's output with the original layer's, in one pass of the frozen ``original`` a batch and no gradient.

    A target is dropped as soon as the supernet's layer has been compared with it; it is a copy, because what follows a layer may write into
    its output (an in-place activation).
    """

    def __init__(self, supernet: nn.Module, layers: Iterable[MixedRankLayer], original: nn.Module) -> None:
        self.supernet, self.layers, self.original = supernet, list(layers), original

    @contextmanager
    def compared(self) -> Iterator[list[Tensor]]:
        """For one forward pass of the supernet: a list that receives one term of Eq. (8) for each call of a mixed layer."""
        targets: dict[str, deque[Tensor]] = {layer.label: deque() for layer in self.layers}
        terms: list[Tensor] = []
        modules = dict(self.original.named_modules())

        def run_original(_: nn.Module, args: tuple, kwargs: dict) -> None:
            with torch.no_grad():
                self.original(*args, **kwargs)

        def compare(name: str, y: Tensor) -> None:
            terms.append(approach_loss([y.clone()], [targets[name].popleft()]))  # the same, for the loss's own backward

        hooks = [modules[name].register_forward_hook(lambda _, __, y, kept=kept: kept.append(y.clone())) for name, kept in targets.items()]
        hooks.append(self.supernet.register_forward_pre_hook(run_original, with_kwargs=True))
        for layer in self.layers:
            layer.observe = compare
        try:
            yield terms
        finally:
            for layer in self.layers:
                layer.observe = None
            for hook in hooks:
                hook.remove()
