"""Images in memory, augmented by the batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset


class TensorImages(Dataset):
    """Hold images in memory as bytes; normalise and augment them by the batch.

    For small images this is much faster than a transform for each image.

    Args:
        images: ``(N, C, H, W)``, uint8.
        labels: ``(N,)``.
        mean: per channel.
        std: per channel.
        pad: pixels by which an image is shifted at most, at random.
        mirror: whether half of the images are mirrored, at random.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        pad: int = 0,
        mirror: bool = False,
    ) -> None:
        self.images, self.labels, self.pad, self.mirror = images, labels, pad, mirror
        self.mean, self.std = (torch.tensor(v).reshape(-1, 1, 1) for v in (mean, std))

    def part(self, index: Tensor) -> TensorImages:
        """Return the images of an index alone, augmented alike."""
        result = copy.copy(self)
        result.images, result.labels = self.images[index], self.labels[index]
        return result

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        x = (self.images[chosen].float() / 255 - self.mean) / self.std
        n, _, height, width = x.shape
        if self.pad:
            padded = torch.nn.functional.pad(x, (self.pad,) * 4)
            top, left = torch.randint(0, 2 * self.pad + 1, (2, n, 1))
            rows, columns = top + torch.arange(height), left + torch.arange(width)
            x = padded[
                torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]
            ].permute(0, 3, 1, 2)
        if self.mirror:
            x = torch.where((torch.rand(n) < 0.5)[:, None, None, None], x.flip(3), x)
        return x.contiguous(), self.labels[chosen]
