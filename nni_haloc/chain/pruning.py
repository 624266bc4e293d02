"""NNI's pruners, with speed-up: they take out channels, and ranks where they are told to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from nni_haloc.chain.groups import channel_groups, rank_layers
from nni_haloc.chain.pruners import SCHEDULES, Pruner
from nni_haloc.chain.workarounds import (
    Loop,
    Masks,
    pruning_settings,
    speed_up,
    traced,
    weight_settings,
)
from nni_haloc.inputs.labels import check_labels
from nni_haloc.inputs.options import Ranks, SparsitySchedule
from nni_haloc.inputs.registries import PRUNERS
from nni_haloc.inputs.weights import is_finite
from nni_haloc.space.frozen import let_train
from nni_haloc.space.frozen import trains as can_train
from nni_haloc.space.modules import copy_of, evaluating
from nni_haloc.space.outputs import cross_entropy, logits_of
from nni_haloc.space.replaceable import class_of
from nni_haloc.space.summary import by_reason
from nni_haloc.utils.errors import Diverged, expected_one_of
from nni_haloc.utils.log import logger
from nni_haloc.utils.placement import accelerated

_UPDATES = 10
"""How often a schedule raises the sparsity, where there are as many batches."""

Batches = Iterable[tuple[Tensor, Tensor]]


def prune(
    network: nn.Module,
    example: Tensor,
    sparsity: float,
    pruner: str = "l1",
    batches: Batches = (),
    ranks: Ranks = "keep",
    sparsity_schedule: SparsitySchedule = "none",
    lr: float = 0.02,
) -> nn.Module:
    """Prune a copy of a network by one of NNI's pruners.

    `channel_groups` tells which convolutions are pruned, and which only together. The result
    computes what the masked network computes.

    Args:
        network: the network; it is left as it is.
        example: an input, ``(N, C, H, W)``.
        sparsity: share of the output channels that each group of convolutions loses. Ranks that are
            kept don't count. With ``level``, share of the weights of each layer.
        pruner: ``l1``, ``l2``, ``fpgm`` and ``level`` look at weights, ``taylor`` at gradients;
            ``slim`` and ``movement`` train. ``level`` sets weights to zero and takes out nothing.
        batches: images and labels, for ``taylor``, ``slim``, ``movement`` and a schedule: the
            network trains on each of them once.
        ranks: ``keep`` prunes no rank of a low-rank layer, ``prune`` prunes ranks like channels.
        sparsity_schedule: ``linear`` or ``agp`` raises the sparsity over the ``batches``, in ten
            steps, while the network trains; ``none`` prunes at once. Not for ``movement``, which
            has a schedule of its own.
        lr: learning rate of that training, SGD with momentum 0.9.

    Returns:
        The smaller network, in evaluation mode.

    Raises:
        Diverged: if the training diverges.
        ValueError: for arguments that do not fit, and if the network can't be traced, or has
            nothing to prune.
    """
    small, example, masks = masked(
        network, example, sparsity, pruner, batches, ranks, sparsity_schedule, lr
    )
    if PRUNERS[pruner].single_weights:
        for name, row in masks.items():
            small.get_parameter(f"{name}.weight").data.mul_(row["weight"])
        logger.warning(
            "pruner: %r leaves every layer as large as it was: it sets %.1f %% of the weights of"
            " convolutions and linear layers to zero",
            pruner,
            100 * zero_share(small),
        )
    else:
        small = speed_up(small, example, masks)
    return small.to(next(network.parameters()).device)


def masked(
    network: nn.Module,
    example: Tensor,
    sparsity: float,
    pruner: str = "l1",
    batches: Batches = (),
    ranks: Ranks = "keep",
    sparsity_schedule: SparsitySchedule = "none",
    lr: float = 0.02,
) -> tuple[nn.Module, Tensor, Masks]:
    """Choose the channels to prune; for the arguments see `prune`.

    Returns:
        What NNI's speed-up takes: a copy of the network, with other weights if it was trained, the
        example, and the masks; all on the processor, where its many small steps take least time.
    """
    check_arguments(sparsity, pruner, ranks, sparsity_schedule)
    kind = PRUNERS[pruner]
    trains = kind.needs == "training" or sparsity_schedule != "none"
    needed = trains or kind.needs == "gradients"
    data = _sized(batches) if needed else []
    if needed and not len(data):
        what = f"sparsity_schedule {sparsity_schedule!r}"
        what = what if sparsity_schedule != "none" else repr(pruner)
        raise ValueError(f"pruner: {what} needs training images")
    network, example = copy_of(network).cpu().eval(), example.cpu()
    if trains:
        let_train(network)
    settings = _settings(network, sparsity, kind, ranks)
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    loop = Loop(lambda loop: _run(network, own, data, loop, lr if trains else None))
    made, steps = _make(network, settings, loop, kind, sparsity_schedule, len(data))
    # Not those that are frozen, nor those that NNI will add, which it trains itself.
    own = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if kind.needs == "gradients":
        for parameter in network.parameters():
            parameter.requires_grad_(can_train(parameter))
    made.track_forward(example)
    _, masks = made.compress(*steps)
    made.unwrap_model()
    for name in frozen:
        network.get_parameter(name).requires_grad_(False)
    for name, value in network.state_dict().items():
        if not is_finite(value):
            raise Diverged(
                f"the training of the pruner diverged: {name} is no longer finite; lower its"
                " learning rate"
            )
    return network.eval(), example, masks


def check_arguments(sparsity: float, pruner: str, ranks: str, sparsity_schedule: str) -> None:
    """Check the arguments of `prune` that are names or numbers.

    Raises:
        ValueError: says what was expected.
    """
    for key, value, names in (
        ("pruner", pruner, list(PRUNERS)),
        ("ranks", ranks, get_args(Ranks)),
        ("sparsity_schedule", sparsity_schedule, get_args(SparsitySchedule)),
    ):
        if value not in names:
            raise ValueError(f"{key}: {expected_one_of(names, value)}")
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity: expected a number between 0 and 1, found {sparsity}")
    if PRUNERS[pruner].scheduled and sparsity_schedule != "none":
        raise ValueError(
            f"sparsity_schedule: expected none with the pruner {pruner!r}, which has one of its"
            f" own, found {sparsity_schedule!r}"
        )


def zero_share(network: nn.Module) -> float:
    """Return the share of the weights of convolutions and linear layers that are zero."""
    weights = [weight for _, weight in _weights(network)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@contextmanager
def zeros_kept(network: nn.Module) -> Iterator[None]:
    """Keep weights of convolutions and linear layers that are zero at zero, for a training.

    Args:
        network: the network. SGD, with momentum and weight decay, moves no weight whose gradient is
            always zero from zero.
    """
    hooks = [
        weight.register_hook(lambda gradient, weight=weight: gradient * (weight != 0))
        for _, weight in _weights(network)
        if weight.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _weights(network: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the layers whose weights can be masked one by one, and their weights."""
    return [
        (name, module.weight)
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]


def _sized(batches: Batches) -> Any:
    """Return batches whose number is known."""
    try:
        len(cast(Sized, batches))
    except TypeError:
        return list(batches)
    return batches


def _settings(
    network: nn.Module, sparsity: float, kind: Pruner, ranks: str
) -> list[dict[str, Any]]:
    """Make NNI's settings of what is pruned in a network, and log what is left alone.

    Raises:
        ValueError: if there is nothing to prune.
    """
    for module in network.modules():
        if (base := class_of(module)) is not None:
            module.__class__ = base  # NNI knows no subclass, though it computes the same
    name = type(network).__name__
    if kind.single_weights:
        layers = [layer for layer, _ in _weights(network)]
        if not layers:
            raise ValueError(f"nothing to prune in {name}: no convolution or linear layer")
        return weight_settings(layers, sparsity)
    kept = rank_layers(network) if ranks == "keep" else ()
    groups, left_alone = channel_groups(network, traced(network).graph, kept)
    if not groups:
        raise ValueError(
            f"nothing to prune in {name} ({by_reason(left_alone) or 'no convolution'})"
        )
    logger.info(
        "%d groups of channels to prune; left alone: %s",
        len(groups),
        by_reason(left_alone) or "none",
    )
    return pruning_settings(groups, sparsity, kind.leads)


def _make(
    network: nn.Module,
    settings: list[dict[str, Any]],
    loop: Loop,
    kind: Pruner,
    schedule: str,
    steps: int,
) -> tuple[Any, tuple[Any, ...]]:
    """Make NNI's pruner, in its schedule if it has one.

    Returns:
        The pruner, and the arguments of its ``compress``.
    """
    if schedule == "none":
        return kind.make(network, settings, loop, steps), ((steps, None) if kind.scheduled else ())
    times = min(_UPDATES, steps)
    interval = steps // times
    made = kind.make(network, settings, loop, interval)
    return SCHEDULES[schedule](made, interval, times), (steps, None)


def _run(
    network: nn.Module, own: list[nn.Parameter], batches: Batches, loop: Loop, lr: float | None
) -> None:
    """Run a backward pass for each batch, as a pruner's ``loop`` has it.

    Args:
        network: the wrapped network.
        own: its parameters, those of the pruner excepted.
        batches: images and labels.
        loop: has what NNI does before and after each step, and with the loss.
        lr: learning rate of SGD; None trains nothing, and keeps the network in evaluation mode.
    """
    optimizer = torch.optim.SGD(own, lr, momentum=0.9) if lr is not None else None
    with evaluating(network), accelerated(network) as device, torch.enable_grad():
        network.train(lr is not None)
        for images, labels in batches:
            network.zero_grad()
            logits = logits_of(network(images.to(device)))
            labels = check_labels(labels, logits.shape).to(device)
            loop.loss(cross_entropy(logits, labels)).backward()
            loop.before_step()
            if optimizer is not None:
                optimizer.step()
            loop.after_step()
        network.zero_grad()
