"""Image data sets: scikit-learn's digits, CIFAR-10, and folders of class folders. The validation split is cut from the training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from nni_haloc.inputs.image_files import class_folders, read_all
from nni_haloc.inputs.registries import DATA
from nni_haloc.inputs.schema import Data
from nni_haloc.inputs.tensor_images import TensorImages

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Splits:
    """``train`` (augmented), ``plain`` (the training images without augmentation), ``val`` and ``test``; items are ``(image, label)``."""

    train: Dataset
    plain: Dataset
    val: Dataset
    test: Dataset
    classes: list[str]

    def loader(
        self, split: str, batch_size: int, *, shuffle: bool = False, workers: int = 0, seed: int = 0
    ) -> DataLoader:
        """A loader of one split, its order set by ``seed``; a last, smaller batch is dropped when shuffling."""
        data: Any = getattr(self, split)
        size = min(batch_size, len(data))
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(
            data,
            size,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=workers,
            generator=generator,
            persistent_workers=False,  # each epoch's workers begin from the generator, so that a resumed training sees the same images
            collate_fn=_as_is if _batched(data) else None,
        )

    def shared(self, share: float, seed: int = 0) -> Splits:
        """A share of each split's images, at least one of them, drawn by ``seed``; the same of ``train`` and ``plain``."""

        def drawn(data: Any) -> Any:
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[
                : max(1, round(share * len(data)))
            ]
            return data.part(order) if _batched(data) else Subset(data, order.tolist())

        if share == 1:
            return self
        return Splits(
            drawn(self.train), drawn(self.plain), drawn(self.val), drawn(self.test), self.classes
        )

    def missing(self, split: str) -> list[str]:
        """The classes of which a split has no image."""
        found = set(_labels(getattr(self, split)))
        return [name for label, name in enumerate(self.classes) if label not in found]

    def images(self, split: str, number: int, seed: int = 0) -> Tensor:
        """``number`` images ``(N, C, H, W)`` of a split, drawn without replacement."""
        return self.labelled(split, number, seed)[0]

    def labelled(self, split: str, number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The images that `images` draws, and their labels ``(N,)``."""
        data: Any = getattr(self, split)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:number]
        if _batched(data):
            return data.__getitems__(order.tolist())
        images, labels = zip(*(data[int(i)] for i in order), strict=True)
        return torch.stack(images), torch.tensor(labels)


Scale = Sequence[float] | None


def digits(
    val_fraction: float = 0.2,
    seed: int = 0,
    val_list: str | Path | None = None,
    *,
    mean: Scale = None,
    std: Scale = None,
) -> Splits:
    """scikit-learn's 1,797 handwritten digits, 8x8; the last 360 are the test images. Comes with scikit-learn, nothing is downloaded."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target).long()
    classes = [str(n) for n in range(10)]
    return _in_memory(
        (images[:-360], labels[:-360]), (images[-360:], labels[-360:]), classes, mean or (0.305,), std or (0.376,),
        pad=1, mirror=False, chosen=_validation(labels[:-360], classes, val_fraction, seed, val_list, None),
    )  # fmt: skip


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
    """CIFAR-10 through torchvision, augmented by shifts of up to 4 pixels and mirroring. FileNotFoundError where ``root`` lacks it."""
    from torchvision.datasets import CIFAR10

    try:
        train, test = (CIFAR10(str(root), train=t, download=download) for t in (True, False))
    except RuntimeError:
        raise FileNotFoundError(f"no CIFAR-10 in {root} (set download: true to fetch it)") from None
    pairs = [
        (torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(d.targets))
        for d in (train, test)
    ]
    chosen = _validation(pairs[0][1], train.classes, val_fraction, seed, val_list, None)
    return _in_memory(
        pairs[0],
        pairs[1],
        train.classes,
        mean or CIFAR10_MEAN,
        std or CIFAR10_STD,
        pad=4,
        mirror=True,
        chosen=chosen,
    )


def image_folder(
    root: str | Path,
    size: int,
    val_fraction: float = 0.1,
    seed: int = 0,
    val_list: str | Path | None = None,
    *,
    test: str = "test",
    in_memory: bool = False,
    mean: Scale = None,
    std: Scale = None,
) -> Splits:
    """``root/train/CLASS/*`` and ``root/<test>/CLASS/*`` (ImageNet: ``test="val"``), as ``size`` x ``size`` images normalised for ImageNet.

    ``val_list``: a file with one path a line, relative to ``root/train``. ``in_memory`` suits small images: they are read once, resized to
    ``size`` and augmented by shifts of ``size // 8`` pixels and mirroring; otherwise random resized crops, as is usual for ImageNet.
    """
    from torchvision import transforms

    root, mean, std = Path(root), mean or IMAGENET_MEAN, std or IMAGENET_STD
    for part in ("train", test):
        if not (root / part).is_dir():
            raise FileNotFoundError(f"no folder {part!r} in {root}")
    files, test_files = (class_folders(root / part) for part in ("train", test))
    if files.classes != test_files.classes:
        raise ValueError(f"{root}: the classes of 'train' and {test!r} differ")
    names = [str(Path(path).relative_to(root / "train")) for path, _ in files.samples]
    chosen = _validation(
        torch.tensor(files.targets), files.classes, val_fraction, seed, val_list, names
    )
    if in_memory:
        pairs = [read_all(folder, size) for folder in (files, test_files)]
        return _in_memory(
            pairs[0], pairs[1], files.classes, mean, std, pad=size // 8, mirror=True, chosen=chosen
        )
    end = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    augment = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *end]
    )
    plain = transforms.Compose(
        [transforms.Resize(round(size * 8 / 7)), transforms.CenterCrop(size), *end]
    )
    augmented, clean = (class_folders(root / "train", t) for t in (augment, plain))
    kept = np.setdiff1d(np.arange(len(names)), chosen).tolist()
    return Splits(
        Subset(augmented, kept),
        Subset(clean, kept),
        Subset(clean, chosen.tolist()),
        class_folders(root / test, plain),
        files.classes,
    )


def load_data(settings: Data) -> Splits:
    """Load the data set that the settings name, and the share of it that they ask for.

    Raises:
        SettingsError: if no data set has the name.
        FileNotFoundError, ValueError: if its files are missing or damaged.
    """
    splits: Splits = DATA[settings.name](settings)
    return splits.shared(settings.share, settings.seed)


def load_digits(settings: Data) -> Splits:
    """Load `digits` as the settings say."""
    return digits(**_cut(settings))


def load_cifar10(settings: Data) -> Splits:
    """Load `cifar10` as the settings say."""
    assert settings.root is not None
    return cifar10(settings.root, **_cut(settings), download=settings.download)


def load_folder(settings: Data) -> Splits:
    """Load `image_folder` as the settings say."""
    assert settings.root is not None
    assert settings.size is not None
    options = {**_cut(settings), "test": settings.test, "in_memory": settings.in_memory}
    return image_folder(settings.root, settings.size, **options)


def _cut(settings: Data) -> dict[str, Any]:
    """Return the settings that every data set of ours takes."""
    return {
        key: getattr(settings, key) for key in ("val_fraction", "seed", "val_list", "mean", "std")
    }


def _in_memory(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: list[str],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    pad: int,
    mirror: bool,
    chosen: np.ndarray,
) -> Splits:
    kept = np.setdiff1d(np.arange(len(train[1])), chosen)

    def part(index: np.ndarray, **augmentation: Any) -> TensorImages:
        return TensorImages(train[0][index], train[1][index], mean, std, **augmentation)

    return Splits(
        part(kept, pad=pad, mirror=mirror),
        part(kept),
        part(chosen),
        TensorImages(*test, mean, std),
        classes,
    )


def _validation(
    labels: Tensor,
    classes: list[str],
    fraction: float,
    seed: int,
    listed: str | Path | None,
    names: list[str] | None,
) -> np.ndarray:
    """Sorted indices of the validation images: those in the file ``listed`` (paths; without ``names``, indices), else a stratified draw."""
    if listed is None:
        from sklearn.model_selection import train_test_split

        counts = labels.bincount()
        try:
            _, chosen = train_test_split(
                np.arange(len(labels)),
                test_size=fraction,
                random_state=seed,
                stratify=labels.numpy(),
            )
        except ValueError as error:
            few = f"class {classes[int(counts.argmin())]!r} has {int(counts.min())} of {len(labels)} training images"
            raise ValueError(
                f"val_fraction: expected validation images of every class, found {few} ({error})"
            ) from None
        return np.sort(chosen)
    index = {
        name: i
        for i, name in enumerate(names if names is not None else map(str, range(len(labels))))
    }
    lines = [
        line.strip()
        for line in Path(listed).read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    for number, line in enumerate(lines, 1):
        if line not in index:
            raise ValueError(f"{listed}: entry {number}, {line!r}, is not a training image")
    if not lines or len(set(lines)) == len(index):
        raise ValueError(
            f"{listed}: must list some of the training images, and not all, found {len(lines)}"
        )
    return np.sort([index[line] for line in set(lines)])


def _labels(data: Any) -> list[int]:
    if isinstance(data, Subset):
        whole = _labels(data.dataset)
        return [whole[i] for i in data.indices]
    return data.labels.tolist() if _batched(data) else data.targets


def _batched(data: Any) -> bool:
    return isinstance(data, TensorImages)


def _as_is(batch: Any) -> Any:
    return batch
