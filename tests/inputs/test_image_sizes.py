"""Channels, sizes, normalisation and shares of images."""

import math
import re

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision import transforms

from nni_haloc import DataError, SettingsError
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.data import digits, load_data
from nni_haloc.inputs.image_folder import Cover, image_folder
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.normalisation import IMAGENET_MEAN, IMAGENET_STD, check_normalisation
from nni_haloc.inputs.registries import MODELS
from nni_haloc.inputs.tensor_images import TensorImages
from nni_haloc.runs.job import Job
from nni_haloc.runs.run import run
from nni_haloc.runs.stages.pretrain import train_original

GENERATOR = np.random.default_rng(0)


def write(root, size=(20, 14), number=6, mode="RGB"):
    width, height = size
    for part in ("train", "test"):
        for k, name in enumerate("ab"):
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                noise = GENERATOR.integers(0, 100, (height, width, 3)) + 100 * k
                image = Image.fromarray(noise.astype(np.uint8)).convert(mode)
                image.save(root / part / name / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path)


def config(folder, **data):
    content = {
        "model": {"name": "resnet20", "arguments": {"num_classes": 2}},
        "weights": "w.pt",
        "data": {"name": "folder", "root": ".", "size": 12, "val_fraction": 0.34, **data},
        "budget": 0.7,
    }
    torch.save(build_model("resnet20", {"num_classes": 2}).state_dict(), folder / "w.pt")
    (folder / "run.yml").write_text(yaml.safe_dump(content))
    return load_config(folder / "run.yml")


# Size and channels


@pytest.mark.parametrize("size", [7, 12, 13])
def test_square_images_are_made_as_torchvision_makes_them(folder, size):
    end = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    plain = transforms.Compose(
        [transforms.Resize(round(size * 8 / 7)), transforms.CenterCrop(size), *end]
    )
    augment = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *end]
    )
    splits = image_folder(folder, size, 0.34)
    for data, transform in ((splits.train, augment), (splits.test, plain)):
        files = getattr(data, "dataset", data).samples
        places = getattr(data, "indices", range(len(data)))
        for i, place in enumerate(places):
            with Image.open(files[place][0]) as image:
                torch.manual_seed(i)
                expected = transform(image)
            torch.manual_seed(i)
            assert torch.equal(data[i][0], expected)


@given(*[st.integers(1, 60)] * 4)
def test_a_resized_image_just_covers_an_area_and_keeps_its_proportions(height, width, h, w):
    result = Cover(h, w)(Image.new("L", (width, height)))
    scale = max(h / height, w / width)
    assert result.width >= w
    assert result.height >= h
    assert result.width == w or result.height == h
    assert result.width == pytest.approx(scale * width, abs=1)
    assert result.height == pytest.approx(scale * height, abs=1)
    if h == w:
        assert result.size == transforms.Resize(h)(Image.new("L", (width, height))).size


@pytest.mark.parametrize("in_memory", [True, False, "device"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [9, [8, 24], [24, 8]])
def test_every_image_has_the_settings_shape(folder, size, channels, in_memory):
    data = config(folder, size=size, channels=channels, in_memory=in_memory).data
    splits, (height, width) = load_data(data), (size, size) if size == 9 else size
    assert data.shape == (channels, height, width)
    for split in ("train", "plain", "val", "test"):
        for images, _ in splits.loader(split, 3):
            assert (images.shape[1:], images.dtype) == (data.shape, torch.float32)
            assert images.isfinite().all()


@pytest.mark.parametrize("in_memory", [True, False])
def test_height_comes_before_width(tmp_path, in_memory):
    """A picture that is dark above and light below, and has nothing to either side."""
    picture = Image.fromarray(np.repeat(np.uint8([0, 255]), 8)[:, None].repeat(32, 1))
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                picture.save(tmp_path / part / name / f"{i}.png")
    options = {"channels": 1, "mean": [0.0], "std": [1.0], "in_memory": in_memory}
    image = image_folder(tmp_path, (8, 16), 0.5, **options).images("test", 1)[0, 0]
    assert image.shape == (8, 16)
    assert (image[0].max(), image[-1].min()) == (0, 1)


def test_grey_images_have_the_average_of_imagenets_scale(folder):
    one, three = (image_folder(folder, 12, 0.34, in_memory=True, channels=c) for c in (1, 3))
    grey = one.test.images.double() / 255
    expected = (grey - sum(IMAGENET_MEAN) / 3) / (sum(IMAGENET_STD) / 3)
    found = one.images("test", 12).double()
    torch.testing.assert_close(found.sort(0)[0], expected.sort(0)[0], rtol=1e-6, atol=1e-6)
    assert three.test.mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("size", [(12, 12), (8, 20)])
def test_shifts_are_an_eighth_of_the_shorter_side(folder, size, in_memory):
    splits = image_folder(folder, size, 0.34, in_memory=in_memory)
    if in_memory:
        assert (splits.train.pad, splits.plain.pad) == (1, 0)
        assert splits.train.images.data_ptr() == splits.plain.images.data_ptr()  # held once
    else:
        crop = splits.train.dataset.transform.transforms[0]
        assert [math.log(r) - math.log(size[1] / size[0]) for r in crop.ratio] == pytest.approx(
            [-math.log(4 / 3), math.log(4 / 3)]
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"size": 0}, r"size: expected pixels, 1 to 16384, or \[height, width\], found 0"),
        ({"size": [8]}, r"size: .*found \[8\]"),
        ({"size": [8, 8, 3]}, r"size: .*found \[8, 8, 3\]"),
        ({"size": [8, 0]}, r"size: .*found \[8, 0\]"),
        ({"size": [8, True]}, r"size: .*found \[8, True\]"),
        ({"size": 8.0}, r"size: .*found 8.0"),
        ({"size": "8x8"}, r"size: .*found '8x8'"),
        ({"size": 10**9}, r"size: .*found 1000000000"),
        ({"channels": 2}, r"channels: expected 1 \(grey\) or 3 \(colours\), found 2"),
        ({"channels": True}, "channels: .*found True"),
        ({"channels": 1.0}, "channels: .*found 1.0"),
        ({"channels": "L"}, "channels: .*found 'L'"),
        ({"name": "digits", "channels": 3}, "channels: data 'digits' has 1, found 3"),
        ({"name": "cifar10", "channels": 1}, "channels: data 'cifar10' has 3, found 1"),
        ({"name": "digits", "exif": True}, "exif: data 'digits' has no image files"),
        ({"exif": 1}, "exif: .*bool"),
    ],
)
def test_other_sizes_and_channels_are_refused(folder, data, message):
    with pytest.raises(SettingsError, match=rf"run.yml: data(\.|: ){message}"):
        config(folder, **data)


def test_data_sets_with_one_shape_keep_it(folder):
    assert config(folder, name="digits", channels=1).data.shape == (1, 8, 8)
    assert config(folder, name="cifar10", size=99).data.shape == (3, 32, 32)


def test_a_network_for_other_channels_is_one_line(folder):
    message = (
        r"model: expected a network for the data's images, 1x12x12 \(channels, height, width\), "
        r"found resnet20, which fails on them \(.*3 channels.*\); set data.channels, data.size or"
    )
    with pytest.raises(DataError, match=message):
        Job(config(folder, channels=1), folder / "out")


class Particular(nn.Module):
    """It takes images of one size alone, as transformers do."""

    def __init__(self, error):
        super().__init__()
        self.head = nn.Linear(1, 1)
        self.error = {"AssertionError": AssertionError, "TypeError": TypeError}[error]

    def forward(self, x):
        raise self.error(f"expected 224, found {x.shape[2]}")


@pytest.mark.parametrize("error", ["AssertionError", "TypeError"])
def test_a_network_for_other_sizes_is_one_line(folder, monkeypatch, error):
    settings = config(folder)
    monkeypatch.setitem(MODELS._added, "particular", Particular)
    torch.save(Particular(error).state_dict(), folder / "w.pt")
    model = {"name": "particular", "arguments": {"error": error}}
    changed = settings.model_copy(update={"model": settings.model.model_copy(update=model)})
    with pytest.raises(
        DataError, match=r"^model: .*12x12.*particular, .*\(expected 224, found 12\); set"
    ):
        Job(changed, folder / "out")


def test_a_run_on_grey_rectangles_goes_to_its_end(folder, monkeypatch):
    def small(width):
        layers = [nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))

    monkeypatch.setitem(MODELS._added, "small", small)
    content = yaml.safe_load((config(folder) and folder / "run.yml").read_text())
    content["data"] |= {"size": [8, 20], "channels": 1, "batch_size": 4}
    content |= {"model": {"name": "small", "arguments": {"width": 16}}, "weights": "g.safetensors"}
    content |= {"search": {"epochs": 1}, "finetune": {"epochs": 1}, "train": {"epochs": 1}}
    content |= {"rank_space": {"calibration_images": 8}, "prune": {"epochs": 0}, "seed": 1}
    (folder / "run.yml").write_text(yaml.safe_dump(content))
    train_original(load_config(folder / "run.yml", training=True))
    figures = run(load_config(folder / "run.yml"), folder / "out")
    assert figures["original_macs"] == 16 * 9 * 6 * 18 + 16 * 16 * 9 * 4 * 16 + 2 * 16
    assert figures["macs"] <= 0.7 * figures["original_macs"]
    assert 0 <= figures["pruned_top1"] <= 1


# Normalisation


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mean": [math.nan] * 3}, "mean.0: input should be a finite number, found nan"),
        ({"mean": [0.5, math.inf, 0.5]}, "mean.1: input should be a finite number, found inf"),
        ({"std": [-math.inf] * 3}, "std.0: input should be a finite number, found -inf"),
        ({"std": [1.0e-39] * 3}, "std: expected pixels of 0 to 1 to stay .*1e.06.*, found 1e-39"),
        ({"std": [0.2, 1.0e-9, 0.2]}, "std: .*found 1e-09"),
        ({"std": [0.0] * 3}, "std: expected finite numbers, std above 0, found 0"),
        ({"std": [-0.2] * 3}, "std: expected finite numbers, std above 0, found -0.2"),
        ({"mean": [1.0e38] * 3}, r"mean: .*found 1e\+38"),
        ({"mean": [1.0e38] * 3, "std": [1.0e38] * 3}, r"mean, std: .*found 1e\+38, 1e\+38"),
        ({"std": [1.0e39] * 3}, r"std: .*found 1e\+39"),
        ({"mean": [1.0] * 3, "std": [1.0e-7] * 3}, "mean, std: .*found 1, 1e-07"),
        ({"mean": [0.5]}, "mean: expected one number for each channel, 3, found 1"),
        ({"std": [0.5] * 4}, "std: expected one number for each channel, 3, found 4"),
        ({"mean": [0.5] * 3, "channels": 1}, "mean: expected one .* channel, 1, found 3"),
        ({"mean": [0.5] * 3, "std": [0.5]}, "std: expected as many numbers as mean has, 3, found"),
        ({"mean": []}, "mean: list should have at least 1 item"),
        ({"mean": 0.5}, "mean: input should be a valid list"),
        ({"name": "digits", "std": [0.5] * 3}, "std: expected one .* channel, 1, found 3"),
        ({"name": "cifar10", "mean": [0.5]}, "mean: expected one .* channel, 3, found 1"),
    ],
)
def test_a_scale_that_makes_no_numbers_of_pixels_is_refused(folder, data, message):
    with pytest.raises(SettingsError, match=rf"run.yml: data(\.|: ){message}"):
        config(folder, **data)


@given(
    st.lists(st.tuples(st.floats(), st.floats()), min_size=1, max_size=3),
    st.sampled_from([0.0, 1.0]),
)
def test_whatever_is_not_refused_makes_numbers(pairs, pixel):
    mean, std = zip(*pairs, strict=True)
    try:
        check_normalisation(mean, std)
    except ValueError:
        return
    image = torch.full((1, len(mean), 2, 2), round(255 * pixel), dtype=torch.uint8)
    x, _ = TensorImages(image, torch.zeros(1), mean, std)[0]
    assert x.isfinite().all()


@pytest.mark.parametrize("make", [digits, lambda **scale: image_folder("none", 8, **scale)])
@pytest.mark.parametrize("scale", [{"mean": [math.nan] * 3}, {"std": []}, {"std": [1e-39] * 3}])
def test_python_functions_refuse_them_too(make, scale):
    with pytest.raises(ValueError, match="^(mean|std|mean, std): expected"):
        make(**scale)


def test_images_in_memory_refuse_them_too():
    with pytest.raises(ValueError, match="^mean, std: expected finite"):
        TensorImages(torch.zeros(1, 1, 2, 2), torch.zeros(1), [math.nan], [1.0])


def test_numbers_for_pixels_of_0_to_255_are_told(folder, caplog):
    with caplog.at_level("WARNING", "nni_haloc"):
        load_data(config(folder, mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4]).data)
        load_data(config(folder, mean=[0.0, -1.0, 1.0], std=[1.0, 0.004, 0.2]).data)
    assert [line.partition(";")[0] for line in caplog.messages] == [
        "data.mean: 123.7 is beyond 1, and pixels are 0 to 1",
        "data.std: 58.4 is beyond 1, and pixels are 0 to 1",
    ]


# Shares


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("share", "found"),
    [(1e-9, "0 of 7 training"), (0.1, "1 of 7 training"), (0.25, "1 of 5 validation")],
)
def test_a_share_of_fewer_images_than_classes_is_refused(folder, in_memory, share, found):
    least = {"training": 0.2858, "validation": 0.4}[found.split()[-1]]
    message = f"share: expected an image of each class or more, found {share:g}, {found} images"
    with pytest.raises(DataError, match=f"^{message} for 2 classes; take {least:g} or more"):
        Job(config(folder, share=share, in_memory=in_memory), folder / "out")


@given(st.floats(0, 1, exclude_min=True))
def test_a_share_is_that_of_every_split_or_refused(share):
    splits = DIGITS
    wanted = {name: round(share * len(getattr(splits, name))) for name in ("train", "val", "test")}
    try:
        some = splits.shared(share)
    except ValueError:
        assert min(wanted.values()) < 10
    else:
        assert {name: len(getattr(some, name)) for name in wanted} == wanted
        assert min(wanted.values()) >= 10


DIGITS = digits()


def test_the_least_share_that_is_told_will_do():
    with pytest.raises(ValueError, match=r"take ([0-9.]+) or more") as raised:
        DIGITS.shared(1e-9)
    while raised is not None:
        least = float(re.search(r"take ([0-9.]+) or more", str(raised.value))[1])
        try:
            DIGITS.shared(least)
            break
        except ValueError as error:  # of a smaller split
            raised = pytest.ExceptionInfo.from_exception(error)


@pytest.mark.parametrize("share", [0, 0.0, -1.0, 1.5, math.nan, math.inf, True, "1"])
def test_what_is_no_share_is_refused_with_the_settings(folder, share):
    with pytest.raises(SettingsError, match="run.yml: data.share: "):
        config(folder, share=share)
