"""Image files of every mode and bit depth become 8 bits a channel, or are refused by name."""

import re
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageCms, ImageOps
from torchvision.datasets.folder import default_loader

from nni_haloc import DataError
from nni_haloc.inputs.image_files import read_image
from nni_haloc.inputs.image_folder import image_folder
from nni_haloc.inputs.pixels import UnknownRange, to_channels

GENERATOR = np.random.default_rng(0)
RGB = GENERATOR.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = GENERATOR.integers(0, 256, (6, 9), dtype=np.uint8)
ALPHA = GENERATOR.integers(0, 256, (6, 9), dtype=np.uint8)
DEEP = GENERATOR.integers(0, 65536, (6, 9), dtype=np.uint16)
RAMP = np.tile(np.linspace(300, 65000, 32).astype(np.uint16), (32, 1))


def luma(rgb):
    """ITU-R 601-2 in 16-bit fixed point, as Pillow documents it."""
    return ((rgb.astype(np.int64) @ [19595, 38470, 7471] + 0x8000) >> 16).astype(np.uint8)


def eight_bits(values, most=65535):
    return np.round(values.astype(np.float64) * 255 / most).astype(np.uint8)


def colours(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def palette(mode="P"):
    image = Image.fromarray(RGB).quantize(16)
    return image if mode == "P" else image.convert(mode)


def with_transparency(transparency):
    image = palette()
    image.info["transparency"] = transparency
    return image


def lab():
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    return ImageCms.buildTransform(*profiles, "RGB", "LAB").apply(Image.fromarray(RGB))


def from_lab(image):
    profiles = [ImageCms.createProfile(name) for name in ("LAB", "sRGB")]
    return np.asarray(ImageCms.buildTransform(*profiles, "LAB", "RGB").apply(image))


def sixteen(mode, order):
    return Image.frombytes(mode, (9, 6), DEEP.astype(order).tobytes())


def rgba():
    return Image.fromarray(np.dstack([RGB, ALPHA]), "RGBA")


IMAGES = {
    "1": (Image.fromarray(GREY).convert("1"), None),
    "L": (Image.fromarray(GREY), colours(GREY)),
    "LA": (Image.merge("LA", [Image.fromarray(x) for x in (GREY, ALPHA)]), colours(GREY)),
    "La": (Image.fromarray(np.dstack([GREY, ALPHA]), "LA").convert("La"), None),
    "P": (palette(), np.asarray(palette().convert("RGB"))),
    "P with a transparent colour": (with_transparency(3), np.asarray(palette().convert("RGB"))),
    "P with alpha": (with_transparency(bytes(range(16))), np.asarray(palette().convert("RGB"))),
    "PA": (palette("PA"), np.asarray(palette().convert("RGB"))),
    "RGB": (Image.fromarray(RGB), RGB),
    "RGBA": (rgba(), RGB),
    "RGBa": (rgba().convert("RGBa"), np.asarray(rgba().convert("RGBa").convert("RGBA"))[..., :3]),
    "RGBX": (Image.fromarray(RGB).convert("RGBX"), RGB),
    "CMYK": (Image.fromarray(RGB).convert("CMYK"), RGB),
    "YCbCr": (Image.fromarray(RGB).convert("YCbCr"), None),
    "HSV": (Image.fromarray(RGB).convert("HSV"), None),
    "LAB": (lab(), from_lab(lab())),
    "I;16": (sixteen("I;16", "<u2"), colours(eight_bits(DEEP))),
    "I;16L": (sixteen("I;16L", "<u2"), colours(eight_bits(DEEP))),
    "I;16B": (sixteen("I;16B", ">u2"), colours(eight_bits(DEEP))),
    "I;16N": (sixteen("I;16N", "=u2"), colours(eight_bits(DEEP))),
}
"""An image of each mode, and its colours; None: about those that it was made of."""
MADE_OF = {"1": None, "La": colours(GREY), "YCbCr": RGB, "HSV": RGB}


@pytest.mark.parametrize("name", IMAGES)
def test_every_mode_becomes_colours_or_greys_of_8_bits(name):
    image, expected = IMAGES[name]
    assert image.mode == name.partition(" ")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb, grey = (np.asarray(to_channels(image, channels)) for channels in (3, 1))
    assert (rgb.shape, grey.shape, rgb.dtype, grey.dtype) == ((6, 9, 3), (6, 9), *[np.uint8] * 2)
    if expected is not None:
        np.testing.assert_array_equal(rgb, expected)
    elif name == "1":
        np.testing.assert_array_equal(rgb, colours(255 * np.asarray(image).astype(np.uint8)))
    else:  # these lose a little on the way
        seen = ALPHA > 64 if name == "La" else np.ones_like(ALPHA, bool)
        difference = np.abs(rgb.astype(int) - MADE_OF[name])[seen]
        assert difference.mean() < 3
        assert difference.max() <= 16
    np.testing.assert_array_equal(grey, luma(rgb))


def test_every_mode_of_pillow_is_known():
    modes = {image.mode for image, _ in IMAGES.values()}
    assert modes | {"I", "F"} >= set(Image.MODES)


@pytest.mark.parametrize("mode", ["I", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_range_that_is_not_known_is_not_guessed(mode, channels):
    with pytest.raises(UnknownRange, match=f"^mode '{mode}' .*32-bit.*expected 8 or 16 bits"):
        to_channels(Image.new(mode, (2, 2)), channels)


@given(arrays(np.uint16, (2, 5)))
def test_greys_of_16_bits_are_scaled_by_their_range(values):
    found = to_channels(Image.frombytes("I;16", (5, 2), values.astype("<u2").tobytes()), 1)
    np.testing.assert_array_equal(np.asarray(found), eight_bits(values))


def written(path, image, **options):
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_files_of_16_bit_greys_keep_their_picture(tmp_path, suffix):
    file = written(tmp_path / f"a.{suffix}", Image.fromarray(RAMP))
    np.testing.assert_array_equal(np.asarray(read_image(file, 1, False)), eight_bits(RAMP))
    np.testing.assert_array_equal(np.asarray(read_image(file, 3, False)), colours(eight_bits(RAMP)))


def test_black_and_white_keep_their_ends(tmp_path):
    file = written(tmp_path / "a.png", Image.fromarray(np.array([[0, 65535]], np.uint16)))
    assert np.asarray(read_image(file, 1, False)).tolist() == [[0, 255]]


def tiff(bits, pixels, photometric=1, kind=1):
    """Write the bytes of an uncompressed grey TIFF of one row."""
    data = pixels.tobytes()
    width = len(pixels) if bits != 12 else 2 * len(data) // 3
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric)]
    tags += [(273, 8), (277, 1), (278, 1), (279, len(data)), (339, kind)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags))
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_tiff_of_12_bits_has_a_range_of_its_own(tmp_path):
    values = np.array([0, 1000, 2000, 4095])
    high, low = values[::2], values[1::2]
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], 1).astype(np.uint8)
    (tmp_path / "a.tif").write_bytes(tiff(12, packed.ravel()))
    found = np.asarray(read_image(str(tmp_path / "a.tif"), 1, False))
    np.testing.assert_array_equal(found, eight_bits(values, 4095)[None])


def test_a_tiff_whose_white_is_zero_is_no_negative(tmp_path):
    values = np.array([0, 1000, 65535], np.uint16)
    (tmp_path / "a.tif").write_bytes(tiff(16, values, photometric=0))
    found = np.asarray(read_image(str(tmp_path / "a.tif"), 1, False))
    np.testing.assert_array_equal(found, eight_bits(65535 - values)[None])
    (tmp_path / "b.tif").write_bytes(tiff(8, (values >> 8).astype(np.uint8), photometric=0))
    found = np.asarray(read_image(str(tmp_path / "b.tif"), 1, False))
    np.testing.assert_array_equal(found, 255 - (values >> 8)[None])


REFUSED = {
    "signed.tif": tiff(16, np.array([-5, 5], np.int16), kind=2),
    "long.tif": tiff(32, np.array([1, 2**31], np.uint32)),
    "float.tif": tiff(32, np.array([0.5, 1.0], np.float32), kind=3),
    "float.ppm": b"Pf\n2 1\n-1.0\n" + np.array([0.5, 1.0], np.float32).tobytes(),
}


def read_all(root, in_memory, workers):
    splits = image_folder(root, 8, 0.5, in_memory=in_memory)
    return list(splits.loader("test", 8, workers=workers))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_files_whose_range_is_not_known_are_named_with_their_mode(tmp_path, name, in_memory):
    for part in ("train", "test"):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(3):
                written(tmp_path / part / label / f"{i}.png", Image.fromarray(GREY))
    path = tmp_path / "test" / "b" / name
    path.write_bytes(REFUSED[name])
    line = rf"{re.escape(str(path))}: mode '[IF]' \(32-bit (integers|floats)\), whose range is not"
    for workers in (0,) if in_memory or name != "float.tif" else (0, 1):
        with pytest.raises(DataError, match=f"^{line}"):
            read_all(tmp_path, in_memory, workers)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif", "ppm"])
def test_ordinary_files_are_as_torchvision_reads_them(tmp_path, suffix):
    file = written(tmp_path / f"a.{suffix}", Image.fromarray(RGB))
    found = np.asarray(read_image(file, 3, False))
    np.testing.assert_array_equal(found, np.asarray(default_loader(file)))


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_of_several_pictures_the_first_is_read(tmp_path, suffix):
    pages = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "white")]
    options = {"save_all": True, "append_images": pages[1:]}
    options |= {"lossless": True} if suffix == "webp" else {}
    file = written(tmp_path / f"a.{suffix}", pages[0], **options)
    assert Image.open(file).n_frames == 3
    found = np.asarray(read_image(file, 3, False))
    np.testing.assert_array_equal(found, np.asarray(pages[0]))


def test_a_gif_in_a_class_folder_is_an_image(tmp_path):
    for part in ("train", "test"):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(2):
                written(tmp_path / part / label / f"{i}.GIF", palette())
    assert len(image_folder(tmp_path, 8, 0.5).test) == 4


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_pngs_of_every_depth_have_their_whole_range(tmp_path, depth):
    levels = np.arange(2 ** min(depth, 8)) * (257 if depth == 16 else 1)
    if depth == 16:
        image, options = Image.fromarray(levels[None].astype(np.uint16)), {}
    elif depth == 8:
        image, options = Image.fromarray(levels[None].astype(np.uint8)), {}
    else:
        image = Image.frombytes("P", (len(levels), 1), levels.astype(np.uint8).tobytes())
        grey = np.round(levels * 255 / (2**depth - 1)).astype(int)
        image.putpalette([int(g) for g in grey for _ in range(3)])
        options = {"bits": depth}
    file = written(tmp_path / "a.png", image, **options)
    found = np.asarray(read_image(file, 1, False))[0]
    np.testing.assert_array_equal(found, eight_bits(levels, 2**depth - 1))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "grey tRNS", "colour tRNS", "palette tRNS"])
def test_transparency_is_dropped(tmp_path, kind):
    if kind == "RGBA":
        image, options, expected = rgba(), {}, RGB
    elif kind == "LA":
        image, expected = IMAGES["LA"]
        options = {}
    elif kind == "grey tRNS":
        image, options, expected = Image.fromarray(GREY), {"transparency": 7}, colours(GREY)
    elif kind == "colour tRNS":
        image, options, expected = Image.fromarray(RGB), {"transparency": (1, 2, 3)}, RGB
    else:
        image, options = palette(), {"transparency": bytes(range(0, 256, 16))}
        expected = np.asarray(palette().convert("RGB"))
    file = written(tmp_path / "a.png", image, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(np.asarray(read_image(file, 3, False)), expected)


ORIENTED = [(suffix, o) for suffix in ("jpg", "png", "webp") for o in range(1, 9)]


@pytest.mark.parametrize(("suffix", "orientation"), ORIENTED)
def test_images_are_turned_upright_where_that_is_asked_for(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = np.add.outer(np.arange(16) * 12, np.arange(24) * 3)[..., None] // [1, 2, 4]
    image = Image.fromarray(smooth.astype(np.uint8))
    file = written(tmp_path / f"a.{suffix}", image, exif=exif)
    stored = np.asarray(default_loader(file))
    upright = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: stored.swapaxes(0, 1), 6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(stored),
    }[orientation]  # fmt: skip
    np.testing.assert_array_equal(np.asarray(read_image(file, 3, False)), stored)
    np.testing.assert_array_equal(np.asarray(read_image(file, 3, True)), upright)
    np.testing.assert_array_equal(
        np.asarray(read_image(file, 1, True)),
        np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("L")),
    )


@pytest.mark.parametrize("in_memory", [True, False])
def test_both_ways_of_reading_turn_images_alike(tmp_path, in_memory):
    exif = Image.Exif()
    exif[0x0112] = 6
    half = Image.fromarray(np.tile(np.repeat(np.uint8([0, 255]), 8), (16, 1)))
    for part in ("train", "test"):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(2):
                written(tmp_path / part / label / f"{i}.png", half, exif=exif)
    options = {"channels": 1, "mean": [0.0], "std": [1.0], "in_memory": in_memory}
    lying, upright = (
        image_folder(tmp_path, 16, 0.5, exif=exif, **options).images("test", 1)[0, 0]
        for exif in (False, True)
    )
    assert (lying[:, 0].max(), lying[:, -1].min()) == (0, 1)
    assert torch.equal(torch.rot90(lying, -1), upright)


def test_a_path_of_several_lines_is_one_line(tmp_path):
    (tmp_path / "a\nb.png").write_text("none")
    with pytest.raises(DataError, match=r"/a\\nb.png: not an image that can be read$"):
        read_image(str(tmp_path / "a\nb.png"), 3, False)


def test_an_image_that_is_too_large_is_named_with_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    file = written(tmp_path / "a.png", Image.fromarray(RGB))
    with pytest.raises(DataError, match=r"a.png: too large \(Image size \(54 pixels\) exceeds"):
        read_image(file, 3, False)


def test_colours_of_16_bits_are_read_by_their_upper_byte(tmp_path):
    deep = GENERATOR.integers(0, 65536, (1, 4, 3), dtype=np.uint16)
    data = zlib.compress(b"\0" + deep.astype(">u2").tobytes())
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 16, 2, 0, 0, 0)), (b"IDAT", data)]
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in (*chunks, (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(name + content))
        parts.append(struct.pack(">I", len(content)) + name + content + check)
    (tmp_path / "a.png").write_bytes(b"".join(parts))
    found = np.asarray(read_image(str(tmp_path / "a.png"), 3, False))
    np.testing.assert_array_equal(found, deep >> 8)
