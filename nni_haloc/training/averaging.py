"""Keep a moving average of weights while they are trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class MovingAverage:
    """Hold the exponential moving average of some tensors, ``a <- d a + (1 - d) w``.

    While there are few steps, the decay ``d`` is smaller, ``(1 + steps) / (10 + steps)``, so that
    the first weights are soon forgotten: 0.975 after 350 steps, 0.99 from 890 on.

    Args:
        tensors: those that are trained. The averages start at their values, on their devices.
        decay: ``d``, at least 0 and below 1.
    """

    def __init__(self, tensors: Iterable[Tensor], decay: float) -> None:
        self.tensors, self.decay, self.steps = list(tensors), decay, 0
        self.averages = [tensor.detach().clone() for tensor in self.tensors]

    @torch.no_grad()
    def update(self) -> None:
        """Take note of the tensors' values after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, [t.detach() for t in self.tensors], 1 - decay)

    @torch.no_grad()
    def put(self) -> None:
        """Write the averages into the tensors."""
        for tensor, average in zip(self.tensors, self.averages, strict=True):
            tensor.copy_(average)

    def state(self) -> tuple[int, list[Tensor]]:
        """Return what `load` takes."""
        return self.steps, self.averages

    def load(self, state: tuple[int, Sequence[Tensor]]) -> None:
        """Take up an earlier average of the same tensors."""
        self.steps, averages = state
        for mine, other in zip(self.averages, averages, strict=True):
            mine.copy_(other)
