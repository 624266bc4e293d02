"""NNI's pruners, with speed-up: they take out channels, and the ranks of Tucker layers, too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import get_args

import torch
from nni.compression.pruning import FPGMPruner, L1NormPruner, TaylorPruner
from torch import Tensor, nn

from nni_haloc.chain.groups import channel_groups
from nni_haloc.chain.workarounds import Loop, Masks, pruning_settings, speed_up, traced
from nni_haloc.inputs.labels import check_labels
from nni_haloc.inputs.options import Pruner
from nni_haloc.space.modules import copy_of, evaluating
from nni_haloc.space.outputs import cross_entropy, logits_of
from nni_haloc.space.summary import by_reason
from nni_haloc.utils.log import logger
from nni_haloc.utils.placement import accelerated


def prune(
    network: nn.Module,
    example: Tensor,
    sparsity: float,
    pruner: Pruner = "l1",
    batches: Iterable[tuple[Tensor, Tensor]] = (),
) -> nn.Module:
    """Prune a copy of a network by one of NNI's pruners.

    `channel_groups` tells which convolutions are pruned, and which only together. The result
    computes what the masked network computes.

    Args:
        network: the network; it is left as it is.
        example: an input, ``(N, C, H, W)``.
        sparsity: share of the output channels that each group of convolutions loses.
        pruner: ``l1`` (L1Norm), ``fpgm``, or ``taylor``, which needs gradients.
        batches: images and labels, for ``taylor``.

    Returns:
        The smaller network, in evaluation mode.

    Raises:
        ValueError: if the network can't be traced, or has nothing to prune.
    """
    small = speed_up(*masked(network, example, sparsity, pruner, batches))
    return small.to(next(network.parameters()).device)


def masked(
    network: nn.Module,
    example: Tensor,
    sparsity: float,
    pruner: Pruner = "l1",
    batches: Iterable[tuple[Tensor, Tensor]] = (),
) -> tuple[nn.Module, Tensor, Masks]:
    """Choose the channels to prune; for the arguments see `prune`.

    Returns:
        What NNI's speed-up takes: a copy of the network with unchanged weights, the example, and
        the masks; all on the processor, where its many small steps take least time.
    """
    if pruner not in get_args(Pruner):
        raise ValueError(f"pruner: expected one of {', '.join(get_args(Pruner))}, found {pruner!r}")
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity: expected a number between 0 and 1, found {sparsity}")
    network, example = copy_of(network).cpu().eval(), example.cpu()
    groups, left_alone = channel_groups(network, traced(network).graph)
    if not groups:
        why = by_reason(left_alone) or "no convolution"
        raise ValueError(f"nothing to prune in {type(network).__name__} ({why})")
    logger.info(
        "%d groups of channels to prune; left alone: %s",
        len(groups),
        by_reason(left_alone) or "none",
    )
    settings, images = pruning_settings(groups, sparsity), list(batches)
    if pruner == "taylor":
        if not images:
            raise ValueError("pruner: 'taylor' needs training images")
        made = TaylorPruner(
            network,
            settings,
            Loop(lambda after_step: _gradients(network, images, after_step)),
            len(images),
        )
    else:
        made = {"l1": L1NormPruner, "fpgm": FPGMPruner}[pruner](network, settings)
    made.track_forward(example)
    _, masks = made.compress()
    made.unwrap_model()
    return network, example, masks


def _gradients(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], after_step: Callable[[], None]
) -> None:
    """Run a backward pass for each batch; train nothing."""
    with evaluating(network), accelerated(network) as device, torch.enable_grad():
        for images, labels in batches:
            network.zero_grad()
            logits = logits_of(network(images.to(device)))
            cross_entropy(logits, check_labels(labels, logits.shape).to(device)).backward()
            after_step()
    network.zero_grad()
