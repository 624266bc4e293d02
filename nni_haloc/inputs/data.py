"""Load the data set that the settings name; scikit-learn's digits and CIFAR-10.

The validation images are cut from the training images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nni_haloc.inputs.classes import class_names
from nni_haloc.inputs.normalisation import Scale, normalisation
from nni_haloc.inputs.registries import DATA
from nni_haloc.inputs.schema.data import Data
from nni_haloc.inputs.splits import Splits, choose_validation, splits_in_memory
from nni_haloc.inputs.tensor_images import TensorImages
from nni_haloc.utils.errors import needs
from nni_haloc.utils.log import logger

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def load_data(settings: Data) -> Splits:
    """Load the data set that the settings name, and the share of it that they ask for.

    Raises:
        SettingsError: if no data set has the name.
        FileNotFoundError, ValueError: if its files are missing or damaged, a class of it is not
            listed, the share is too small, or its images, which are to be on the device, are not in
            memory.
    """
    _warn_of_odd_scales(settings)
    splits: Splits = DATA[settings.name](settings)
    splits = splits.shared(settings.share, settings.seed)
    if settings.classes is not None:
        splits = splits.with_classes(class_names(settings.classes), f"data {settings.name!r}")
    return splits.on_device() if settings.in_memory == "device" else splits


def _warn_of_odd_scales(settings: Data) -> None:
    """Warn of a mean or standard deviation that seems to be for pixels of 0 to 255."""
    for name, values in (("mean", settings.mean), ("std", settings.std)):
        largest = max(map(abs, values or [0.0]))
        if largest > 1:
            logger.warning(
                "data.%s: %g is beyond 1, and pixels are 0 to 1; divide numbers that are for 0 to "
                "255 by 255",
                name,
                largest,
            )


def load_digits(settings: Data) -> Splits:
    """Load `digits` as the settings say."""
    return digits(**cut_of(settings))


def load_cifar10(settings: Data) -> Splits:
    """Load `cifar10` as the settings say."""
    assert settings.root is not None
    return cifar10(settings.root, **cut_of(settings), download=settings.download)


def load_folder(settings: Data) -> Splits:
    """Load `nni_haloc.inputs.image_folder.image_folder` as the settings say."""
    from nni_haloc.inputs.image_folder import image_folder  # with torchvision

    assert settings.root is not None
    assert settings.size is not None
    return image_folder(
        settings.root,
        settings.size,
        **cut_of(settings),
        test=settings.test,
        in_memory=bool(settings.in_memory),
        channels=settings.shape[0],
        exif=settings.exif,
        classes=settings.classes,
    )


def cut_of(settings: Data) -> dict[str, Any]:
    """Return the settings that every data set of ours takes."""
    return {
        key: getattr(settings, key) for key in ("val_fraction", "seed", "val_list", "mean", "std")
    }


def digits(
    val_fraction: float = 0.2,
    seed: int = 0,
    val_list: str | Path | None = None,
    *,
    mean: Scale = None,
    std: Scale = None,
) -> Splits:
    """Load scikit-learn's 1,797 handwritten digits, 8x8; the last 360 are the test images.

    They come with scikit-learn; nothing is downloaded.
    """
    with needs("sklearn", what="data set 'digits'", install="nni-haloc[sampling]"):
        from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target).long()
    classes = [str(n) for n in range(10)]
    return _cut(
        (images[:-360], labels[:-360]),
        (images[-360:], labels[-360:]),
        classes,
        normalisation(mean, std, (0.305,), (0.376,)),
        (val_fraction, seed, val_list),
        pad=1,
        mirror=False,
    )


def cifar10(
    root: str | Path,
    val_fraction: float = 0.1,
    seed: int = 0,
    val_list: str | Path | None = None,
    *,
    download: bool = False,
    mean: Scale = None,
    std: Scale = None,
) -> Splits:
    """Load CIFAR-10 through torchvision, augmented by shifts of up to 4 pixels and mirroring.

    Raises:
        FileNotFoundError: if it is not in ``root``, and ``download`` is off.
    """
    from torchvision.datasets import CIFAR10

    try:
        train, test = (CIFAR10(str(root), train=t, download=download) for t in (True, False))
    except RuntimeError:
        raise FileNotFoundError(f"no CIFAR-10 in {root} (set download: true to fetch it)") from None
    seen, unseen = (
        (torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(d.targets))
        for d in (train, test)
    )
    return _cut(
        seen,
        unseen,
        train.classes,
        normalisation(mean, std, CIFAR10_MEAN, CIFAR10_STD),
        (val_fraction, seed, val_list),
        pad=4,
        mirror=True,
    )


def _cut(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: list[str],
    scale: tuple[Any, Any],
    validation: tuple[float, int, str | Path | None],
    *,
    pad: int,
    mirror: bool,
) -> Splits:
    """Return the splits of images in memory, with validation images cut from the training images.

    Args:
        train: images and labels.
        test: images and labels.
        classes: names of the classes.
        scale: mean and standard deviation.
        validation: fraction, seed and list of the validation images.
        pad: pixels by which training images are shifted at most.
        mirror: whether half of them are mirrored.
    """
    chosen = choose_validation(train[1], classes, *validation, None)
    whole, unseen = (TensorImages(*pair, *scale) for pair in (train, test))
    return splits_in_memory(whole, unseen, classes, chosen, pad=pad, mirror=mirror)
