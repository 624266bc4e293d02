"""A data set in its splits, and the draw of validation images from the training images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from nni_haloc.inputs.classes import places_of, read_lines
from nni_haloc.inputs.labels import renumbered
from nni_haloc.inputs.tensor_images import TensorImages
from nni_haloc.utils.errors import first_line, needs

SPLITS = {"train": "training", "val": "validation", "test": "test"}
"""The splits and what messages call them; ``plain`` has the images of ``train``."""


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
        """Return a share of each split's images, drawn by ``seed``.

        ``train`` and ``plain`` keep the same images.

        Raises:
            ValueError: if a split would have fewer images than it has classes.
        """

        def drawn(data: Any) -> Any:
            number = round(share * len(data))
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[
                :number
            ]
            return data.part(order) if _batched(data) else Subset(data, order.tolist())

        if share == 1:
            return self
        for split, what in SPLITS.items():
            _check_enough(getattr(self, split), what, share, len(self.classes))
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

    def with_classes(self, listed: Sequence[str], where: str) -> Splits:
        """Return the same images with the labels that a network's outputs have.

        Args:
            listed: the class of each output.
            where: the data set's name, for messages.

        Raises:
            ValueError: if a class of the data is not listed.
        """
        if list(listed) == self.classes:
            return self
        found = places_of(self.classes, listed, where)
        places = torch.tensor([found[name] for name in self.classes])

        def numbered(data: Any) -> Any:
            if _batched(data):
                return data.relabelled(renumbered(data.labels, places))
            return _Relabelled(data, places)

        train, plain, val, test = map(numbered, (self.train, self.plain, self.val, self.test))
        return Splits(train, plain, val, test, list(listed))

    @cached_property
    def labels(self) -> dict[str, Tensor]:
        """The labels of each split of `SPLITS`, ``(N,)``.

        Raises:
            ValueError: if they are no numbers.
        """
        return {split: _labels(getattr(self, split)) for split in SPLITS}

    def missing(self, split: str) -> list[str]:
        """Return the classes of which a split has no image, though another split has."""
        found = {name: set(labels.unique().tolist()) for name, labels in self.labels.items()}
        lacking = set().union(*found.values()) - found[split]
        return [name for label, name in enumerate(self.classes) if label in lacking]

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


def splits_in_memory(
    train: TensorImages,
    test: TensorImages,
    classes: list[str],
    chosen: np.ndarray | TensorImages,
    *,
    pad: int,
    mirror: bool,
) -> Splits:
    """Return the splits of images in memory.

    Args:
        train: training images, not augmented.
        test: test images.
        classes: names of the classes.
        chosen: indices of the training images that are for validation, or images for it.
        pad: pixels by which training images are shifted at most.
        mirror: whether half of them are mirrored.
    """
    if isinstance(chosen, TensorImages):
        plain, val = train, chosen
    else:
        kept = np.setdiff1d(np.arange(len(train)), chosen)
        plain, val = train.part(torch.from_numpy(kept)), train.part(torch.from_numpy(chosen))
    return Splits(plain.augmented(pad, mirror), plain, val, test, classes)


def choose_validation(
    labels: Tensor,
    classes: list[str],
    fraction: float,
    seed: int,
    listed: str | Path | None,
    names: list[str] | None,
) -> np.ndarray:
    """Choose the validation images among the training images.

    Args:
        labels: of the training images, ``(N,)``.
        classes: names of the classes.
        fraction: share of each class that is drawn.
        seed: of the draw.
        listed: a file that names the images instead, one a line.
        names: the names that it has for them (None: their indices).

    Returns:
        Their sorted indices.

    Raises:
        OSError: if the file can't be read.
        ValueError: names a line that is no training image, or a class of too few images.
    """
    if listed is None:
        return _draw(labels, classes, fraction, seed)
    known = names if names is not None else map(str, range(len(labels)))
    index = {name: i for i, name in enumerate(known)}
    lines = read_lines(listed)
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
        present, counts = labels.unique(return_counts=True)
        name, count = classes[int(present[counts.argmin()])], int(counts.min())
        few = f"class {name!r} has {count} of {len(labels)} training images"
        expected = "expected validation images of every class"
        raise ValueError(f"val_fraction: {expected}, found {few} ({error})") from None
    return np.sort(chosen)


def _check_enough(data: Any, what: str, share: float, classes: int) -> None:
    """Check that a share of a split has as many images as the split has classes."""
    if _lists_labels(data):
        classes = len(_labels(data).unique())
    classes = max(1, min(classes, len(data)))
    number = round(share * len(data))
    if number < classes:
        least = classes / len(data)
        found = f"{number} of {len(data)} {what} images for {classes} classes"
        remedy = f"take {math.ceil(1e4 * least) / 1e4:g} or more (a scale counts in by its root)"
        expected = "expected an image of each class or more"
        raise ValueError(f"share: {expected}, found {share:g}, {found}; {remedy}")


class _Relabelled(Dataset):
    """Hold somebody else's data set with other labels."""

    def __init__(self, data: Any, places: Tensor) -> None:
        self.data, self.places = data, places

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.data[index]
        return image, int(renumbered(torch.as_tensor([label]), self.places))


def _labels(data: Any) -> Tensor:
    if isinstance(data, Subset):
        return _labels(data.dataset)[torch.as_tensor(data.indices)]
    if isinstance(data, _Relabelled):
        return renumbered(_labels(data.data), data.places)
    if _batched(data):
        return data.labels
    try:
        if hasattr(data, "targets"):
            return torch.as_tensor(data.targets)
        # a data set of somebody else's may have no list of them
        # By index: the end of a data set need not raise IndexError.
        return torch.stack([torch.as_tensor(data[i][1]) for i in range(len(data))])
    except (TypeError, ValueError, RuntimeError) as error:
        expected = "expected class indices, one number for each image"
        raise ValueError(f"labels: {expected} ({first_line(error)})") from None


def _lists_labels(data: Any) -> bool:
    """Tell whether a data set knows its labels without reading its images."""
    if isinstance(data, (Subset, _Relabelled)):
        return _lists_labels(data.dataset if isinstance(data, Subset) else data.data)
    return _batched(data) or hasattr(data, "targets")


def _batched(data: Any) -> bool:
    return isinstance(data, TensorImages)


def _as_is(batch: Any) -> Any:
    return batch
