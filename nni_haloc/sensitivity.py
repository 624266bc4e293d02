"""What each candidate alone costs the trained network: its loss with that one layer replaced, less the original's."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import replace_modules
from .ranks import evaluating


def sensitivities(
    model: nn.Module, candidates: Mapping[str, Mapping[str, nn.Module]], images: Tensor, labels: Tensor, batch_size: int = 128
) -> dict[str, dict[str, float]]:
    """Layer to candidate to the mean cross-entropy that it adds, all else left as it was, on ``images (N, ...)`` and ``labels (N,)``.

    ``candidates``: layer to candidate name to its trained module. In evaluation mode; ``model`` is not changed. One pass a candidate.
    """
    original = loss(model, images, labels, batch_size)
    network = copy.deepcopy(model)
    found: dict[str, dict[str, float]] = {}
    for layer, row in candidates.items():
        found[layer] = {}
        for name, module in row.items():
            replace_modules(network, {layer: module})
            found[layer][name] = loss(network, images, labels, batch_size) - original
        replace_modules(network, {layer: copy.deepcopy(dict(model.named_modules())[layer])})
    return found


def loss(network: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 128) -> float:
    """Mean cross-entropy, in evaluation mode."""
    total = 0.0
    with evaluating(network), torch.inference_mode():
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            total += float(F.cross_entropy(network(x), y, reduction="sum"))
    return total / len(labels)
