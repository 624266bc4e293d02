"""The section ``data``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nni_haloc.inputs.normalisation import check_normalisation
from nni_haloc.inputs.options import MOST_PROCESSES
from nni_haloc.inputs.registries import DATA
from nni_haloc.inputs.schema.paths import ExistingPath
from nni_haloc.inputs.schema.section import Section, Words
from nni_haloc.inputs.schema.values import (
    Arguments,
    Channels,
    Classes,
    Count,
    DataName,
    InMemory,
    PerChannel,
    Seed,
    Share,
    Size,
)

_SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32)}
"""Shapes of the images of data sets that have one alone."""


class Data(Section):
    """The data set, and how it is split and read."""

    name: DataName
    """The data set: scikit-learn's `digits`, torchvision's `cifar10`, a `folder` of class folders
    such as ImageNet's, or one that [another package adds](how-to/extend.md#adding-to-it)."""
    arguments: Arguments = {}
    """Options of another package's data set. Ours have none."""
    root: Annotated[ExistingPath, Words("folder")] | None = None
    """The [folder of the images](how-to/data-and-networks.md#image-folders), which `cifar10` and
    `folder` need."""
    size: Size | None = None
    """Size of the images that the network gets. A `folder` needs it."""
    channels: Channels | None = None
    """Channels of the images. Without it: those of the data set, and 3 for a `folder`."""
    exif: bool = False
    """Whether images of a `folder` are turned upright as their EXIF orientation says."""
    classes: Classes | None = None
    """The [class of each output](how-to/data-and-networks.md#classes-and-outputs) of the network,
    in order. The file has one class in each line. Without it: the names of the class folders."""
    test: Annotated[str, Words("folder")] = "test"
    """The folder of the test images, beside `train`."""
    score: Literal["test", "val"] = "val"
    """The images of the final accuracies, which a tuner maximises. Those of the test images stand
    beside them as `test_top1`: choose nothing by them."""
    in_memory: InMemory = False
    """Whether small images are read once and kept. They are then augmented by shifts and mirroring,
    as `digits` and `cifar10` always are. With `device`, batches are
    [made on the GPU](how-to/train-faster.md#images-on-the-device), too."""
    download: bool = False
    """Whether torchvision may fetch CIFAR-10."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Stratified share of the training images that becomes the validation images. A folder `val`
    beside `train` takes its place."""
    val_list: Annotated[ExistingPath, Words("file")] | None = None
    """A file that lists the training images that become the validation images, in the place of
    `val_fraction`."""
    seed: Seed = 0
    """Seed of `val_fraction` and `share`."""
    mean: PerChannel | None = None
    """Mean of the normalisation that the network was trained with, for pixels of 0 to 1. Without
    it: that of the data set; for a `folder` ImageNet's, of which one channel takes the average."""
    std: PerChannel | None = None
    """Standard deviation of the same normalisation."""
    batch_size: Count = 128
    """Images in a batch."""
    share: Share = 1.0
    """Share of the training, validation and test images that is used. Of each, as many images as
    there are classes remain at least."""
    workers: Annotated[int, Field(ge=0, le=MOST_PROCESSES)] = 0
    """Processes that load images. 0: the run's own process does."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image, ``(C, H, W)``."""
        if self.name in _SHAPES:
            return _SHAPES[self.name]
        size = self.size or 32
        height, width = size if isinstance(size, list) else (size, size)
        return self.channels or 3, height, width

    @model_validator(mode="after")
    def _complete(self) -> Data:
        if self.arguments and self.name not in DATA.foreign():
            raise ValueError(f"arguments: data {self.name!r} takes none, found {self.arguments}")
        if self.name in ("cifar10", "folder") and self.root is None:
            raise ValueError(f"root: data {self.name!r} needs a folder")
        if self.name == "folder" and self.size is None:
            raise ValueError("size: data 'folder' needs the image size in pixels")
        self._check_pixels()
        if self.workers and self.in_memory == "device":
            expected = "expected 0 with in_memory 'device', whose batches can't leave a process"
            remedy = "set workers: 0, or in_memory: true"
            raise ValueError(f"workers: {expected}, found {self.workers}; {remedy}")
        return self

    def _check_pixels(self) -> None:
        """Check what is said of the images against what the data set has."""
        channels, *_ = self.shape
        if self.name in _SHAPES and self.channels not in (None, channels):
            raise ValueError(f"channels: data {self.name!r} has {channels}, found {self.channels}")
        if self.name in _SHAPES and self.exif:
            raise ValueError(f"exif: data {self.name!r} has no image files, expected false")
        known = self.name not in DATA.foreign() or self.channels is not None
        check_normalisation(self.mean, self.std, channels if known else None)
