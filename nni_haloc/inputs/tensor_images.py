"""Images in memory, augmented by the batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from nni_haloc.inputs.normalisation import check_normalisation
from nni_haloc.utils.placement import to_device, working_device


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

    Attributes:
        follows_device: whether batches are made on `working_device`, see `on_device`.

    Raises:
        ValueError: if images would not normalise to numbers.
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
        check_normalisation(mean, std)
        self.images, self.labels, self.pad, self.mirror = images, labels, pad, mirror
        self.mean, self.std = (torch.tensor(v).reshape(-1, 1, 1) for v in (mean, std))
        self.follows_device = False
        self._there: TensorImages | None = None

    def part(self, index: Tensor) -> TensorImages:
        """Return the images of an index alone, augmented alike."""
        return self._with(images=self.images[index], labels=self.labels[index])

    def augmented(self, pad: int, mirror: bool) -> TensorImages:
        """Return the same images, shifted by up to ``pad`` pixels and mirrored at random."""
        return self._with(pad=pad, mirror=mirror)

    def relabelled(self, labels: Tensor) -> TensorImages:
        """Return the same images with other labels, ``(N,)``."""
        return self._with(labels=labels)

    def to(self, device: torch.device) -> TensorImages:
        """Return the same images held on a device, where their batches are made."""
        names = ("images", "labels", "mean", "std")
        moved = {name: getattr(self, name).to(device) for name in names}
        return self._with(**moved, follows_device=False)

    def on_device(self) -> TensorImages:
        """Return the same images, whose batches are made on `working_device`.

        These images stay where they are. The first batch copies them to the device that is then the
        working one, where the copy stays; a batch for another device replaces it.
        """
        return self._with(follows_device=True)

    def _with(self, **changes: Tensor | bool | int) -> TensorImages:
        """Return the same images with other attributes, and no copy yet."""
        result = copy.copy(self)
        result.__dict__.update(changes, _there=None)
        return result

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        if self.follows_device:
            return self._copy().__getitems__(indices)
        device = self.images.device
        chosen = to_device(torch.as_tensor(indices), device)
        x = (self.images[chosen] / 255 - self.mean) / self.std
        n, channels, height, width = x.shape
        if self.pad:
            windows = F.pad(x, (self.pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
            top, left = torch.randint(0, 2 * self.pad + 1, (2, n), device=device)
            x = windows[torch.arange(n, device=device), :, top, left]
            if channels == 1:
                # Torch takes these strides for channels-last, which trains faster on processors.
                x = x.view(n, height, width, 1).permute(0, 3, 1, 2)
        if self.mirror:
            mirrored = torch.rand(n, device=device) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        return x, self.labels[chosen]

    def _copy(self) -> TensorImages:
        """Return the copy on the working device; make it if there is none."""
        device = torch.empty(0, device=working_device()).device  # with its number
        if self._there is None or self._there.images.device != device:
            self._there = self.to(device)
        return self._there
