"""Folders of class folders of image files."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from nni_haloc.inputs.classes import places_of
from nni_haloc.inputs.pixels import UnknownRange, to_channels
from nni_haloc.utils.errors import DataError, first_line, printable
from nni_haloc.utils.files import why_unreadable

SUFFIXES = (*IMG_EXTENSIONS, ".gif")
"""Ends of the names of image files; a file of another kind in a class folder is passed over."""

_NO_IMAGE = "Found no valid file for the classes "
"""How torchvision's message begins where a class has no image."""
_NO_CLASSES = ("__MACOSX", "@eaDir")
"""Folders that archives and file servers make beside what is in them; they hold images, too."""
_HIDDEN = re.compile("{0}([.]|({1}){0})".format(re.escape(os.sep), "|".join(_NO_CLASSES)))
"""A path inside a folder that begins with a separator, of a file that is hidden or in what is."""


class DamagedImage(DataError):
    """Signal an image file that is damaged, not an image, or of a kind that is not read.

    A loader's worker process hands the message on as the last line of a traceback.
    """

    def __init__(self, message: str) -> None:
        last = message.strip().splitlines()[-1:] or [""]
        super().__init__(last[0].rpartition("DamagedImage: ")[2])


class ClassFolders(ImageFolder):
    """Read torchvision's `ImageFolder` without hidden files; errors name the unreadable file.

    Names that begin with a dot are no classes and no images.

    Args:
        path: the folder of class folders.
        listed: the class of each output; a label is the place of its class in it. None: the places
            in the sorted names of the folders.
        channels: 1 for grey images, 3 for colours.
        exif: whether images are turned upright as their EXIF orientation says.

    Raises:
        FileNotFoundError: if there is no class, or a class without an image.
        ValueError: if a class is not listed.
    """

    def __init__(
        self,
        path: str | Path,
        listed: Sequence[str] | None = None,
        *,
        channels: int = 3,
        exif: bool = False,
    ) -> None:
        self._listed = listed
        read = partial(read_image, channels=channels, exif=exif)
        try:
            super().__init__(str(path), loader=read, is_valid_file=self._is_image)
        except FileNotFoundError as error:
            text = str(error).rstrip(". ")
            if text.startswith(_NO_IMAGE):
                names, kinds = text.removeprefix(_NO_IMAGE), ", ".join(SUFFIXES)
                without = f"expected an image ({kinds}) of each class, found none of {names}"
                raise FileNotFoundError(f"{path}: {without}") from None
            raise FileNotFoundError(f"{text} in {path}") from None

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the names of the class folders, and their labels."""
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
        names = [name for name in names if name[0] != "." and name not in _NO_CLASSES]
        if not names:
            raise FileNotFoundError("Couldn't find any class folder")
        return names, places_of(names, self._listed or names, str(directory))

    def _is_image(self, path: str) -> bool:
        inside = path[len(str(self.root)) :]
        return path.lower().endswith(SUFFIXES) and not _HIDDEN.search(inside)

    def with_transform(self, transform: Any) -> ClassFolders:
        """Return the same files, whose images are transformed."""
        same = copy.copy(self)
        same.transform = transform
        return same

    def names(self) -> list[str]:
        """Return the paths of the files inside the folder."""
        return [str(Path(path).relative_to(self.root)) for path, _ in self.samples]

    def read(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Read and resize all images.

        Returns:
            Images ``(N, C, height, width)``, uint8, and their labels ``(N,)``.
        """
        images = []
        for path, _ in self.samples:
            image = self.loader(path)
            if image.size != (width, height):
                image = image.resize((width, height))
            images.append(torch.from_numpy(np.array(image)).reshape(height, width, -1))
        return torch.stack(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(self.targets)


def read_image(file: str, channels: int, exif: bool) -> Image.Image:
    """Read an image, the first one of several, as 8 bits a channel; see `to_channels`.

    Args:
        file: the image file.
        channels: 1 or 3.
        exif: whether to turn it upright as its EXIF orientation says.

    Raises:
        DamagedImage: names the file, and what is wrong with it.
    """
    try:
        with open(file, "rb") as stream:  # or Pillow may leave it open
            image = Image.open(stream)
            image.load()
            if exif:
                ImageOps.exif_transpose(image, in_place=True)
            return to_channels(image, channels)
    except UnknownRange as error:
        raise DamagedImage(printable(f"{file}: {error}")) from None
    except Exception as error:  # Pillow has many, by the kind of damage
        reason = "truncated" if "truncated" in str(error) else "not an image that can be read"
        if isinstance(error, Image.DecompressionBombError):
            reason = f"too large ({first_line(error)})"
        if isinstance(error, OSError) and error.strerror:
            reason = why_unreadable(error)  # the system's: nothing is known of the image
        raise DamagedImage(printable(f"{file}: {reason}")) from None
