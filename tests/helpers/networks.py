"""Small networks."""

import torch
from torch import nn


class SmallNet(nn.Module):
    """Two searchable 3x3 convolutions and a 1x1 one, a shortcut and a classifier.

    Also BatchNorm and activations in place.
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(
            nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
        )
        self.point = nn.Conv2d(12, 12, 1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = self.body(x)
        return self.head((x + self.act(self.point(x))).mean((2, 3)))
