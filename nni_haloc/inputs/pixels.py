"""Images of every Pillow mode as 8 bits a channel."""

from __future__ import annotations

from typing import Any

import numpy as np

_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
"""TIFF's tags of bits a channel and of what a grey of 0 is, and its value for white."""
_LAST_STEP = {
    "La": "LA",
    "RGBa": "RGBA",
    "P": "RGBA",  # a palette may have transparency, of which Pillow warns elsewhere
    "PA": "RGBA",
    **dict.fromkeys(("CMYK", "YCbCr", "LAB", "HSV", "RGBX"), "RGB"),
}
"""Modes of which not every conversion is known, and one that is."""


class UnknownRange(ValueError):
    """Signal a mode whose black and white are not known."""


def to_channels(image: Any, channels: int) -> Any:
    """Convert a Pillow image to 8 bits a channel: mode ``L`` or ``RGB``.

    - 16-bit greys are scaled by their range, 65535 to 255 (a TIFF's of 12 bits by theirs).
    - Alpha is dropped: a transparent pixel keeps the colour that the file has for it.
    - Colours become grey by ITU-R 601-2, as Pillow has it; grey becomes three equal channels.

    Args:
        image: of any mode.
        channels: 1 or 3.

    Raises:
        UnknownRange: for 32-bit integers and floats, where nothing says what is white.
    """
    mode = image.mode
    if mode == "F" or (mode == "I" and image.format not in ("PNG", "PPM")):
        bits = "32-bit " + ("floats" if mode == "F" else "integers")
        raise UnknownRange(
            f"mode {mode!r} ({bits}), whose range is not known; expected 8 or 16 bits a channel: "
            "convert the file"
        )
    if mode[:1] == "I":  # Pillow's integers of 16-bit PNG and PPM files are 16-bit ones
        image = _scaled(image)
    elif mode in _LAST_STEP:
        image = image.convert(_LAST_STEP[mode])
        if channels == 1 and image.mode != "LA":
            image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def _scaled(image: Any) -> Any:
    """Scale greys of 16 bits to 8."""
    from PIL import Image

    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (16,))
    most = 2 ** (bits if isinstance(bits, int) else bits[0]) - 1
    values = np.asarray(image).astype(np.int64).clip(0, most)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow heeds at 8 bits alone
        values = most - values
    return Image.fromarray(((255 * values + most // 2) // most).astype(np.uint8))
