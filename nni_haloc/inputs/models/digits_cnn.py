"""A small convolutional network for scikit-learn's 8x8 digits."""

from __future__ import annotations

from torch import Tensor, nn


class _Block(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)


class DigitsCNN(nn.Module):
    """Four 3x3 convolutions and a classifier: ``(N, 1, 8, 8)`` to ``(N, num_classes)``.

    It has 65,834 parameters with 10 classes.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.block1 = _Block(1, 32)
        self.block2 = _Block(32, 32)
        self.block3 = _Block(32, 64, stride=2)
        self.block4 = _Block(64, 64)
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block4(self.block3(self.block2(self.block1(x))))
        return self.classifier(x.mean(dim=(2, 3)))


digits_cnn = DigitsCNN
