"""VGG-16 for CIFAR: torchvision's thirteen convolutions with batch normalisation, and one linear layer behind them.

14,728,266 parameters with 10 classes: the network of most low-rank and pruning papers on CIFAR-10, this one's Table 1 included.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers


class VGG16(nn.Module):
    """``(N, 3, 32, 32)`` to ``(N, num_classes)``. Parameter names as in torchvision's ``vgg16_bn``, but for ``classifier``."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = make_layers(cfgs["D"], batch_norm=True)
        self.classifier = nn.Linear(512, num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):  # as torchvision does, without which it hardly learns
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


vgg16 = VGG16
