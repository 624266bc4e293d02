"""VGG-16 for CIFAR: torchvision's thirteen convolutions with batch normalisation, and a classifier.

It has 14,728,266 parameters with 10 classes. Most papers on low rank and pruning use it on
CIFAR-10; it is in the paper's Table 1.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers


class VGG16(nn.Module):
    """Classify ``(N, 3, 32, 32)`` into ``(N, num_classes)``.

    Parameters have the names of torchvision's ``vgg16_bn``, except for ``classifier``.

    Args:
        num_classes: number of classes.
        width: factor of every layer's number of channels, rounded down.

    Raises:
        ValueError: if no channel is left.
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        if not 64 * width >= 1:
            raise ValueError(f"width: expected at least 1/64, found {width}")
        channels = [c if isinstance(c, str) else int(c * width) for c in cfgs["D"]]
        self.features = make_layers(channels, batch_norm=True)
        self.classifier = nn.Linear(int(512 * width), num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):  # as torchvision does, without which it hardly learns
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


vgg16 = VGG16
