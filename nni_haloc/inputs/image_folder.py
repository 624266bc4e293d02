"""The data set `folder`: image files in class folders, ImageNet's too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from torchvision import transforms
from torchvision.transforms import functional

from nni_haloc.inputs.classes import check_same_classes, class_names
from nni_haloc.inputs.image_files import ClassFolders
from nni_haloc.inputs.normalisation import Scale, normalisation, of_imagenet
from nni_haloc.inputs.splits import Splits, choose_validation, splits_in_memory
from nni_haloc.inputs.tensor_images import TensorImages
from nni_haloc.utils.log import logger

_TRAIN, _VAL = "train", "val"


def image_folder(
    root: str | Path,
    size: int | Sequence[int],
    val_fraction: float = 0.1,
    seed: int = 0,
    val_list: str | Path | None = None,
    *,
    test: str = "test",
    in_memory: bool = False,
    channels: int = 3,
    exif: bool = False,
    classes: Sequence[str] | str | Path | None = None,
    mean: Scale = None,
    std: Scale = None,
) -> Splits:
    """Load the image files ``root/train/CLASS/*`` and ``root/<test>/CLASS/*``.

    ``root/val/CLASS/*`` are the validation images, where they are there; else these are cut from
    the training images.

    Args:
        root: the folder.
        size: of the images that the network gets: height and width, or one number for both.
        val_fraction: share of the training images that become validation images.
        seed: of that draw.
        val_list: a file that names the validation images instead, one path a line, relative to
            ``root/train``.
        test: name of the folder of test images (ImageNet: ``val``).
        in_memory: for small images: read them once, resize them to ``size``, and augment them by
            shifts of an eighth of the shorter side and mirroring. Otherwise training images are
            random resized crops, as is usual for ImageNet.
        channels: 3 for colours, 1 for grey; images of the other kind are converted.
        exif: whether images are turned upright as their EXIF orientation says.
        classes: the class of each output of the network, or a file with one in each line; a label
            is the place of its class in it. None: the places in the sorted names of the folders.
        mean: per channel (None: ImageNet's).
        std: per channel (None: ImageNet's).

    Raises:
        FileNotFoundError: if a folder is missing, or a class folder has no image.
        ValueError: if the folders have different classes, or one that is not in ``classes``.
    """
    root, (height, width) = Path(root), _both(size)
    scale = normalisation(mean, std, *of_imagenet(channels))
    listed = None if classes is None else class_names(classes)
    folders = {
        part: ClassFolders(root / part, listed, channels=channels, exif=exif)
        for part in _parts(root, test, val_list)
    }
    if listed is None:
        check_same_classes({part: folder.classes for part, folder in folders.items()}, root)
    names = listed or folders[_TRAIN].classes
    chosen = None
    if _VAL not in folders or test == _VAL:
        train = folders[_TRAIN]
        labels = torch.tensor(train.targets)
        chosen = choose_validation(labels, names, val_fraction, seed, val_list, train.names())
    if in_memory:
        held = {
            part: TensorImages(*folder.read(height, width), *scale)
            for part, folder in folders.items()
        }
        pad = min(height, width) // 8
        validation = held[_VAL] if chosen is None else chosen
        return splits_in_memory(held[_TRAIN], held[test], names, validation, pad=pad, mirror=True)
    augment, plain = _transforms(height, width, *scale)
    augmented = folders[_TRAIN].with_transform(augment)
    clean = {part: folder.with_transform(plain) for part, folder in folders.items()}
    if chosen is None:
        return Splits(augmented, clean[_TRAIN], clean[_VAL], clean[test], names)
    kept = np.setdiff1d(np.arange(len(augmented)), chosen).tolist()
    val: Any = Subset(clean[_TRAIN], chosen.tolist())
    return Splits(Subset(augmented, kept), Subset(clean[_TRAIN], kept), val, clean[test], names)


def _both(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _parts(root: Path, test: str, val_list: str | Path | None) -> list[str]:
    """Return the names of the folders of images that are used; log what that means for ``val``."""
    for part in (_TRAIN, test):
        if not (root / part).is_dir():
            other = (root / _VAL).is_dir() and part != _TRAIN
            remedy = "; for the images of 'val' set data.test: val" if other else ""
            raise FileNotFoundError(f"no folder {part!r} in {root}{remedy}")
    if test == _VAL or not (root / _VAL).is_dir():
        return [_TRAIN, test]
    if val_list is not None:
        logger.info("validation images: those of %s; %s is not used", val_list, root / _VAL)
        return [_TRAIN, test]
    logger.info("validation images: those of %s (data.val_fraction is not used)", root / _VAL)
    return [_TRAIN, _VAL, test]


class Cover:
    """Resize an image, its proportions kept, so that it just covers an area.

    Of a square it is torchvision's `Resize` to the shorter side.

    Args:
        height: of the area, in pixels.
        width: of the area.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def __call__(self, image: Any) -> Any:
        width, height = image.size
        if self.width * height >= self.height * width:
            size = [self.width * height // width, self.width]
        else:
            size = [self.height, self.height * width // height]
        return functional.resize(image, size)


def _transforms(
    height: int, width: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[Any, Any]:
    """Return the transforms of training images, and of all others: usual for ImageNet.

    A random crop has the proportions of the result, within a third more or less.
    """
    end = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    ratio = (3 / 4 * (width / height), 4 / 3 * (width / height))
    crop = transforms.RandomResizedCrop((height, width), ratio=ratio)
    augment = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *end])
    whole = Cover(round(height * 8 / 7), round(width * 8 / 7))
    plain = transforms.Compose([whole, transforms.CenterCrop((height, width)), *end])
    return augment, plain
