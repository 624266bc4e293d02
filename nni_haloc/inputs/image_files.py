"""Folders of class folders of image files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nni_haloc.utils.errors import DataError
from nni_haloc.utils.files import why_unreadable


class DamagedImage(DataError):
    """Signal an image file that is damaged or not an image.

    A loader's worker process hands the message on as the last line of a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].rpartition("DamagedImage: ")[2])


def class_folders(path: Path, transform: Any = None) -> Any:
    """Make torchvision's `ImageFolder` whose errors name the unreadable file."""
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(path), transform=transform, loader=_opened)
    except FileNotFoundError as error:  # says which classes have no image; then come extensions
        raise FileNotFoundError(
            str(error).partition(". Supported extensions")[0] + f" in {path}"
        ) from None


def _opened(file: str) -> Any:
    """Read an image as RGB."""
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(file)
    except Exception as error:  # Pillow has many, by the kind of damage
        reason = "truncated" if "truncated" in str(error) else "not an image that can be read"
        if (
            isinstance(error, OSError) and error.strerror
        ):  # the system's: nothing is known of the image
            reason = why_unreadable(error)
        raise DamagedImage(f"{file}: {reason}") from None


def read_all(folder: Any, size: int) -> tuple[Tensor, Tensor]:
    """Read all images of an `ImageFolder` as bytes."""
    images, labels = [], []
    for image, label in folder:
        images.append(
            torch.from_numpy(
                np.array(image if image.size == (size, size) else image.resize((size, size)))
            )
        )
        labels.append(label)
    return torch.stack(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
