"""Image data sets: scikit-learn's digits, CIFAR-10, and folders of class folders.

The validation images are cut from the training images.
"""

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
from nni_haloc.utils.errors import needs

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Splits:
    """A data set in four splits, whose items are ``(image, label)``.

    Attributes:
        train: training images, augmented.
        plain: the same images without augmentation.
        val: validation images.
        test: test images.
        classes: names of the classes; a label is the place of its class.
    """

    train: Dataset
    plain: Dataset
    val: Dataset
    test: Dataset
    classes: list[str]

    def loader(
        self, split: str, batch_size: int, *, shuffle: bool = False, workers: int = 0, seed: int = 0
    ) -> DataLoader:
        """Return a loader of one split.

        Args:
            split: ``train``, ``plain``, ``val`` or ``test``.
            batch_size: images in a batch; no more than the split has.
            shuffle: whether the order is drawn anew each epoch; a smaller last batch is then
                dropped.
            workers: processes that load images; none after `on_device`.
            seed: of the order.

        Raises:
            ValueError: for workers after `on_device`.
        """
        data: Any = getattr(self, split)
        if workers and getattr(data, "follows_device", False):
            expected = "expected 0 after on_device, whose batches can't leave a process"
            raise ValueError(f"workers: {expected}, found {workers}")
        size = min(batch_size, len(data))
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(
            data,
            size,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=workers,
            generator=generator,
            # Each epoch's workers begin from the generator, so that a resumed training sees the
            # same images.
            persistent_workers=False,
            collate_fn=_as_is if _batched(data) else None,
        )

    def shared(self, share: float, seed: int = 0) -> Splits:
        """Return a share of each split's images, at least one of them, drawn by ``seed``.

        ``train`` and ``plain`` keep the same images.
        """

        def drawn(data: Any) -> Any:
            number = max(1, round(share * len(data)))
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[
                :number
            ]
            return data.part(order) if _batched(data) else Subset(data, order.tolist())

        if share == 1:
            return self
        return Splits(
            drawn(self.train), drawn(self.plain), drawn(self.val), drawn(self.test), self.classes
        )

    def on_device(self) -> Splits:
        """Return the splits with their batches made on the device on which networks work.

        Each split is copied there at its first batch, one byte a pixel and channel, and stays, see
        `TensorImages.on_device`. On CUDA the augmentation is drawn from the device's random
        numbers; on the processor all is as before.

        Raises:
            ValueError: unless the images are in memory.
        """

        def there(data: Any) -> Any:
            if not _batched(data):
                expected = "'device' is for images in memory (TensorImages)"
                raise ValueError(f"in_memory: {expected}, found {type(data).__name__}")
            return data.on_device()

        return Splits(
            there(self.train), there(self.plain), there(self.val), there(self.test), self.classes
        )

    def missing(self, split: str) -> list[str]:
        """Return the classes of which a split has no image."""
        found = set(_labels(getattr(self, split)))
        return [name for label, name in enumerate(self.classes) if label not in found]

    def images(self, split: str, number: int, seed: int = 0) -> Tensor:
        """Draw ``number`` images of a split, without replacement.

        Returns:
            ``(N, C, H, W)``, on the processor, whatever device batches are made on.
        """
        return self.labelled(split, number, seed)[0]

    def labelled(self, split: str, number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draw the images that `images` draws, with their labels ``(N,)``."""
        data: Any = getattr(self, split)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:number]
        if _batched(data):
            return data.to(torch.device("cpu")).__getitems__(order)
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
    """Load scikit-learn's 1,797 handwritten digits, 8x8; the last 360 are the test images.

    They come with scikit-learn; nothing is downloaded.
    """
    with needs("sklearn", what="data set 'digits'", install="nni-haloc[sampling]"):
        from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target).long()
    classes = [str(n) for n in range(10)]
    return _in_memory(
        (images[:-360], labels[:-360]),
        (images[-360:], labels[-360:]),
        classes,
        mean or (0.305,),
        std or (0.376,),
        pad=1,
        mirror=False,
        chosen=_validation(labels[:-360], classes, val_fraction, seed, val_list, None),
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
    """Load the image files ``root/train/CLASS/*`` and ``root/<test>/CLASS/*``.

    Args:
        root: the folder.
        size: height and width of the images that the network gets.
        val_fraction: share of the training images that become validation images.
        seed: of that draw.
        val_list: a file that names the validation images instead, one path a line, relative to
            ``root/train``.
        test: name of the folder of test images (ImageNet: ``val``).
        in_memory: for small images: read them once, resize them to ``size``, and augment them by
            shifts of ``size // 8`` pixels and mirroring. Otherwise training images are random
            resized crops, as is usual for ImageNet.
        mean: per channel (None: ImageNet's).
        std: per channel (None: ImageNet's).

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if the two folders have different classes.
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
        FileNotFoundError, ValueError: if its files are missing or damaged, or its images, which
            are to be on the device, are not in memory.
    """
    splits: Splits = DATA[settings.name](settings)
    splits = splits.shared(settings.share, settings.seed)
    return splits.on_device() if settings.in_memory == "device" else splits


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
    options = {**_cut(settings), "test": settings.test, "in_memory": bool(settings.in_memory)}
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
    """Return the sorted indices of the validation images.

    They are those that the file ``listed`` names (by ``names``, or by index without), or else a
    stratified draw.
    """
    if listed is None:
        return _draw(labels, classes, fraction, seed)
    known = names if names is not None else map(str, range(len(labels)))
    index = {name: i for i, name in enumerate(known)}
    text = Path(listed).read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        if line not in index:
            raise ValueError(f"{listed}: entry {number}, {line!r}, is not a training image")
    if not lines or len(set(lines)) == len(index):
        expected = "must list some of the training images, and not all"
        raise ValueError(f"{listed}: {expected}, found {len(lines)}")
    return np.sort([index[line] for line in set(lines)])


def _draw(labels: Tensor, classes: list[str], fraction: float, seed: int) -> np.ndarray:
    """Draw a share of each class; return the sorted indices."""
    with needs("sklearn", what="a drawn validation split", install="nni-haloc[sampling]"):
        from sklearn.model_selection import train_test_split

    images = np.arange(len(labels))
    try:
        _, chosen = train_test_split(
            images, test_size=fraction, random_state=seed, stratify=labels.numpy()
        )
    except ValueError as error:
        counts = labels.bincount()
        name, count = classes[int(counts.argmin())], int(counts.min())
        few = f"class {name!r} has {count} of {len(labels)} training images"
        expected = "expected validation images of every class"
        raise ValueError(f"val_fraction: {expected}, found {few} ({error})") from None
    return np.sort(chosen)


def _labels(data: Any) -> list[int]:
    if isinstance(data, Subset):
        whole = _labels(data.dataset)
        return [whole[i] for i in data.indices]
    if _batched(data):
        return data.labels.tolist()
    # a data set of somebody else's may have no list of them
    return data.targets if hasattr(data, "targets") else [int(label) for _, label in data]


def _batched(data: Any) -> bool:
    return isinstance(data, TensorImages)


def _as_is(batch: Any) -> Any:
    return batch
