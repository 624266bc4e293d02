"""Mean and standard deviation by which images are normalised, per channel, for pixels of 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

Scale = Sequence[float] | None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_MOST = 1e6
"""Largest size of a normalised pixel; beyond it float32 keeps nothing of an image."""


def of_imagenet(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return ImageNet's mean and standard deviation; for one channel, their averages."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)


def check_normalisation(mean: Scale, std: Scale, channels: int | None = None) -> None:
    """Check that images normalise to numbers, and that there are as many as channels.

    Args:
        mean: per channel (None: not given).
        std: per channel (None: not given).
        channels: of the images; None where they are not known.

    Raises:
        ValueError: says what was expected and found.
    """
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and channels is not None and len(values) != channels:
            expected = f"expected one number for each channel, {channels}"
            raise ValueError(f"{name}: {expected}, found {len(values)}")
    if mean is not None and std is not None and len(mean) != len(std):
        raise ValueError(
            f"std: expected as many numbers as mean has, {len(mean)}, found {len(std)}"
        )
    means = mean if mean is not None else [0.0] * len(std or ())
    stds = std if std is not None else [1.0] * len(means)
    for m, s in zip(means, stds, strict=True):
        if not (math.isfinite(m) and math.isfinite(s) and s > 0):
            raise ValueError(f"mean, std: expected finite numbers, std above 0, found {m} and {s}")
        if max(abs(m), abs(1 - m)) > _MOST * s:
            expected = f"expected pixels of 0 to 1 to become numbers below {_MOST:g}"
            raise ValueError(f"mean, std: {expected}, found {m:g} and {s:g}")
