"""NNI's pruners, each described by what it needs; a new one is one more, and registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from nni.compression.pruning import (
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    LinearPruner,
    MovementPruner,
    TaylorPruner,
)
from torch import nn

from nni_haloc.chain.workarounds import Loop, SlimPruner

Maker = Callable[[nn.Module, list[dict[str, Any]], Loop, int], Any]
"""Makes a pruner of NNI's of a network, NNI's settings, the training, and a number of steps."""


@dataclass(frozen=True)
class Pruner:
    """Describe one of NNI's pruners.

    Attributes:
        make: makes it.
        needs: ``gradients`` or ``training`` on images and labels, or ``nothing``.
        leads: what a group's mask is chosen by: its ``convolutions``, or its ``norms``, where it
            has any.
        single_weights: whether it masks weights one by one, so that no channel goes.
        scheduled: whether it has a schedule of its own, and none of NNI's others fits.
    """

    make: Maker
    needs: Literal["nothing", "gradients", "training"] = "nothing"
    leads: Literal["convolutions", "norms"] = "convolutions"
    single_weights: bool = False
    scheduled: bool = False


def _by_weights(kind: type) -> Maker:
    return lambda network, settings, loop, steps: kind(network, settings, loop)


def _over_steps(kind: type) -> Maker:
    return lambda network, settings, loop, steps: kind(network, settings, loop, steps)


L1 = Pruner(_by_weights(L1NormPruner))
L2 = Pruner(_by_weights(L2NormPruner))
FPGM = Pruner(_by_weights(FPGMPruner))
LEVEL = Pruner(_by_weights(LevelPruner), single_weights=True)
TAYLOR = Pruner(_over_steps(TaylorPruner), "gradients")
SLIM = Pruner(_over_steps(SlimPruner), "training", "norms")
MOVEMENT = Pruner(
    lambda network, settings, loop, steps: MovementPruner(network, settings, loop, 0, steps),
    "training",
    scheduled=True,
)

SCHEDULES = {"linear": LinearPruner, "agp": AGPPruner}
"""NNI's schedules, which raise the sparsity of a pruner step by step."""
