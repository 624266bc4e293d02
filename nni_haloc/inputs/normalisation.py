"""Mean and standard deviation by which images are normalised, per channel, for pixels of 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

Scale = Sequence[float] | None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_MOST = 1e6
"""Largest mean, standard deviation and normalised pixel; float32 keeps nothing of an image beyond
it."""


def of_imagenet(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return ImageNet's mean and standard deviation; for one channel, their averages."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)


def normalisation(
    mean: Scale, std: Scale, usual_mean: Sequence[float], usual_std: Sequence[float]
) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation, checked, the usual ones where they are not given.

    Raises:
        ValueError: if they do not fit the channels, or images would not become numbers.
    """
    mean = usual_mean if mean is None else mean
    std = usual_std if std is None else std
    check_normalisation(mean, std, len(usual_mean))
    return mean, std


def check_normalisation(mean: Scale, std: Scale, channels: int | None = None) -> None:
    """Check that images normalise to numbers, and that there are as many as channels.

    Args:
        mean: per channel (None: not given).
        std: per channel (None: not given).
        channels: of the images; None where they are not known.

    Raises:
        ValueError: says what was expected and found.
    """
    if mean is not None and std is not None and len(mean) != len(std):
        raise ValueError(
            f"std: expected as many numbers as mean has, {len(mean)}, found {len(std)}"
        )
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and channels is not None and len(values) != channels:
            expected = f"expected one number for each channel, {channels}"
            raise ValueError(f"{name}: {expected}, found {len(values)}")
    given = [name for name, values in (("mean", mean), ("std", std)) if values is not None]
    where = ", ".join(given)
    means = mean if mean is not None else [0.0] * len(std or ())
    stds = std if std is not None else [1.0] * len(means)
    for m, s in zip(means, stds, strict=True):
        found = ", ".join(f"{x:g}" for name, x in (("mean", m), ("std", s)) if name in given)
        if not (math.isfinite(m) and math.isfinite(s) and s > 0):
            raise ValueError(f"{where}: expected finite numbers, std above 0, found {found}")
        if max(abs(m), abs(1 - m)) > _MOST * min(s, 1) or s > _MOST:
            expected = f"expected pixels of 0 to 1 to stay below {_MOST:g} when normalised"
            raise ValueError(f"{where}: {expected}, found {found}")
