"""Notice a loss that is not finite without waiting for the device at every iteration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nni_haloc.utils.errors import Diverged
from nni_haloc.utils.placement import HostCopy


class DivergenceWatch:
    """Look at the losses of a training, a few iterations at a time.

    Losses are copied from the device in the background, and looked at when the next few have come,
    or by `finish`.

    Args:
        what: what trains, for the message: ``the search``.
        few: iterations that are looked at together.
    """

    def __init__(self, what: str, few: int = 16) -> None:
        self.what, self.few = what, few
        self._losses: list[Tensor] = []
        self._places: list[tuple[int, int]] = []
        self._under_way: tuple[HostCopy, list[tuple[int, int]]] | None = None

    def add(self, loss: Tensor, epoch: int, iteration: int) -> None:
        """Take the loss of an iteration.

        Args:
            loss: a scalar.
            epoch: its number, from 0.
            iteration: its number in the epoch, from 0.

        Raises:
            Diverged: if the loss of this iteration or of an earlier one is not finite.
        """
        self._losses.append(loss.detach())
        self._places.append((epoch, iteration))
        if len(self._losses) >= self.few:
            self._look()
            self._send()

    def finish(self) -> None:
        """Look at all losses so far.

        Raises:
            Diverged: if one of them is not finite.
        """
        self._look()
        self._send()
        self._look()

    def _send(self) -> None:
        """Begin to copy the losses that have come."""
        if self._losses:
            self._under_way = HostCopy(torch.stack(self._losses).double()), self._places
            self._losses, self._places = [], []

    def _look(self) -> None:
        """Wait for the losses that are under way, and look at them."""
        if self._under_way is None:
            return
        (copy, places), self._under_way = self._under_way, None
        for loss, place in zip(copy.get(), places, strict=True):
            if not math.isfinite(loss):
                raise diverged(self.what, float(loss), *place)


def diverged(what: str, loss: float, epoch: int, iteration: int) -> Diverged:
    """Return the error of a training whose loss is not finite.

    Args:
        what: what trains: ``the search``.
        loss: the loss.
        epoch: its number, from 0.
        iteration: its number in the epoch, from 0.
    """
    place = f"epoch {epoch + 1}, iteration {iteration + 1}"
    return Diverged(f"{what} diverged: loss {loss} in {place}; lower its learning rate")
