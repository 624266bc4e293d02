"""Splits: disjoint, reproducible, from real files."""

import pickle
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers.host_copies import no_waits_on
from PIL import Image

from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.data import cifar10, digits, load_data
from nni_haloc.inputs.image_folder import image_folder
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.tensor_images import TensorImages
from nni_haloc.runs.job import Job
from nni_haloc.utils.errors import HalocError
from nni_haloc.utils.placement import working_on


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for part, number in (("train", 10), ("test", 3)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(number):
                Image.fromarray(generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(
                    tmp_path / part / name / f"{i}.png"
                )
    return tmp_path


def keys(data):
    return {tuple(np.round(np.asarray(data[i][0]).ravel()[:40], 5)) for i in range(len(data))}


@pytest.mark.parametrize("in_memory", [True, False])
def test_validation_images_are_cut_from_the_training_images(folder, in_memory):
    splits = image_folder(folder, 12, 0.3, seed=1, in_memory=in_memory)
    assert (len(splits.train), len(splits.plain), len(splits.val), len(splits.test)) == (
        14,
        14,
        6,
        6,
    )
    assert not keys(splits.plain) & keys(splits.val)
    assert splits.classes == ["cat", "dog"]
    again, other = (
        image_folder(folder, 12, 0.3, seed=1, in_memory=in_memory),
        image_folder(folder, 12, 0.3, seed=2, in_memory=in_memory),
    )
    assert keys(splits.val) == keys(again.val) != keys(other.val)
    assert splits.images("plain", 5).shape == (5, 3, 12, 12)
    x, y = next(iter(splits.loader("train", 4, shuffle=True)))
    assert (x.shape, x.dtype, y.shape) == ((4, 3, 12, 12), torch.float32, (4,))


def test_a_file_may_list_the_validation_images(folder):
    listed = folder / "val.txt"
    listed.write_text("cat/1.png\ndog/4.png\n\n")
    splits = image_folder(folder, 12, val_list=listed, in_memory=True)
    assert (len(splits.train), splits.val.labels.tolist()) == (18, [0, 1])
    listed.write_text("cat/1.png\ndog/44.png\n")
    with pytest.raises(ValueError, match=r"val\.txt: entry 2, 'dog/44.png'"):
        image_folder(folder, 12, val_list=listed)
    listed.write_text("")
    with pytest.raises(ValueError, match="must list some"):
        image_folder(folder, 12, val_list=listed)


def test_folders_that_are_not_there_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="'val'"):
        image_folder(folder, 12, test="val")
    with pytest.raises(FileNotFoundError, match="no CIFAR-10"):
        cifar10(tmp_path / "none")
    (folder / "test" / "emu").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match="emu|classes"):
        image_folder(folder, 12)


def test_cifar10_is_read_through_torchvision(tmp_path, monkeypatch):
    """In torchvision's own file layout, with ten images a file.

    Its checksums are of the real data and are left out.
    """
    import torchvision

    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    generator = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        content = {
            "data": generator.integers(0, 255, (20, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(20)],
        }
        (root / name).write_bytes(pickle.dumps(content))
    (root / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    )
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
    splits = cifar10(tmp_path, 0.2)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (80, 20, 20)
    assert splits.images("val", 3).shape == (3, 3, 32, 32)
    assert sorted(splits.val.labels.tolist()) == sorted(list(range(10)) * 2)  # stratified


def test_digits_come_with_scikit_learn():
    splits = digits(0.25)
    assert len(splits.train) + len(splits.val) + len(splits.test) == 1797
    assert splits.images("test", 2).shape == (2, 1, 8, 8)
    assert abs(float(splits.images("plain", 500).mean())) < 0.05


def test_augmentation_shifts_and_mirrors_each_image_by_itself():
    images = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6).repeat(200, 1, 1, 1)
    data = TensorImages(images, torch.zeros(200), (0.0,), (1.0,), pad=1, mirror=True)
    torch.manual_seed(0)
    x, _ = data.__getitems__(list(range(200)))
    padded = torch.nn.functional.pad(images[0].float() / 255, (1, 1, 1, 1))
    possible = [padded[:, i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    possible += [p.flip(2) for p in possible]
    seen = {next(i for i, p in enumerate(possible) if torch.equal(p, image)) for image in x}
    assert seen == set(range(18))


def wide_images(number=40):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (number, 3, 6, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(number)
    return TensorImages(images, labels, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), pad=2, mirror=True)


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_a_batch_is_cropped_and_mirrored_as_drawn_and_normalised(device, kind):
    data, chosen = wide_images().on_device(), [7, 3, 39, 0, 7]
    torch.manual_seed(5)
    x, y = data.__getitems__(kind(chosen))
    torch.manual_seed(5)
    shifts = torch.randint(0, 5, (2, 5), device=device).cpu().numpy()
    mirrored = (torch.rand(5, device=device) < 0.5).cpu().numpy()
    assert 0 < mirrored.sum() < 5
    expected = []
    for i, top, left, flipped in zip(chosen, *shifts, mirrored, strict=True):
        image = data.images[i].numpy().astype(np.float64).transpose(1, 2, 0) / 255
        whole = np.zeros((10, 12, 3))
        whole[2:8, 2:10] = (image - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
        part = whole[top : top + 6, left : left + 8]
        expected.append(part[:, ::-1] if flipped else part)
    assert (x.device.type, y.device.type, x.dtype) == (device.type, device.type, torch.float32)
    assert x.is_contiguous()
    np.testing.assert_allclose(x.cpu().permute(0, 2, 3, 1), np.stack(expected), atol=1e-6)
    assert y.tolist() == chosen


def test_augmented_images_of_one_channel_are_convolved_in_channels_last_format():
    """It is the faster format; and in another a search of earlier versions isn't repeated."""
    x, _ = digits().train.__getitems__([1, 2])
    assert torch.nn.Conv2d(1, 4, 3)(x).is_contiguous(memory_format=torch.channels_last)


def test_images_are_the_same_on_the_device(device):
    splits = digits().shared(0.2)
    there = splits.on_device()
    for name in ("plain", "val", "test"):
        pairs = zip(splits.loader(name, 64), there.loader(name, 64), strict=True)
        for (x, y), (x_there, y_there) in pairs:
            assert (x_there.device.type, y_there.device.type) == (device.type,) * 2
            torch.testing.assert_close(x_there.cpu(), x, rtol=1e-6, atol=1e-6)
            assert torch.equal(y_there.cpu(), y)


def test_on_the_processor_the_augmentation_is_the_same_bit_by_bit():
    epochs = []
    for splits in (digits(), digits().on_device()):
        torch.manual_seed(3)
        with working_on("cpu"):
            epochs.append(torch.cat([x for x, _ in splits.loader("train", 64, shuffle=True)]))
    assert torch.equal(*epochs)


def test_a_batch_is_made_without_waiting_for_the_device(device):
    data = wide_images().on_device()
    data.__getitems__([0])
    with no_waits_on(device):
        data.__getitems__([3, 5, 7])


def test_a_batch_is_made_on_the_device_of_its_time():
    """Torch's device without memory stands in for the other one."""
    data = wide_images().on_device()
    kept = data.images.clone()
    for name in ("meta", "cpu", "meta"):
        with working_on(name):
            assert {t.device.type for t in data.__getitems__([1, 2])} == {name}
            assert {t.device.type for t in data.part(torch.tensor([3]))[0]} == {name}
    with working_on("cpu"):
        assert [int(d[0][1]) for d in (data, data.part(torch.tensor([3])))] == [0, 3]
    assert torch.equal(data.images, kept)


def test_single_draws_of_images_are_on_the_processor_wherever_batches_are_made():
    splits = digits()
    with working_on("meta"):
        there = splits.on_device().shared(0.5, seed=1)
        assert there.missing("val") == []
        images, labels = there.labelled("plain", 7, seed=2)
    expected, expected_labels = splits.shared(0.5, seed=1).labelled("plain", 7, seed=2)
    assert torch.equal(images, expected)
    assert torch.equal(labels, expected_labels)


def test_only_images_in_memory_are_kept_on_the_device(folder):
    with pytest.raises(ValueError, match=r"^in_memory: 'device' is for images in memory .*Subset$"):
        image_folder(folder, 12).on_device()


def test_batches_on_the_device_have_no_workers():
    with pytest.raises(ValueError, match=r"^workers: expected 0 after on_device.*, found 2$"):
        digits().on_device().loader("train", 8, workers=2)


def test_the_order_of_images_is_the_seeds():
    splits = digits()
    first, again, other = (
        next(iter(splits.loader("plain", 32, shuffle=True, seed=s)))[1] for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_workers_begin_each_epoch_from_the_loaders_generator(folder):
    """Or a training resumed after its first epoch would see other images than one that went on."""
    splits = image_folder(folder, 12, 0.3)

    def epoch(loader):
        return torch.cat([images for images, _ in loader])

    loader = splits.loader("train", 4, shuffle=True, workers=1, seed=5)
    first, order = epoch(loader), loader.generator.get_state()
    second, resumed = epoch(loader), splits.loader("train", 4, shuffle=True, workers=1, seed=9)
    resumed.generator.set_state(order)
    assert torch.equal(epoch(resumed), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_share_is_of_every_split_and_the_same_whether_augmented_or_not(folder, in_memory):
    splits = image_folder(folder, 12, 0.3, in_memory=in_memory)
    half = splits.shared(0.5, seed=3)
    for name in ("train", "plain", "val", "test"):
        assert len(getattr(half, name)) == max(1, round(0.5 * len(getattr(splits, name))))
    labels = [[int(data[i][1]) for i in range(len(data))] for data in (half.train, half.plain)]
    assert labels[0] == labels[1]
    again = splits.shared(0.5, seed=3)
    assert all(torch.equal(half.plain[i][0], again.plain[i][0]) for i in range(len(half.plain)))
    assert splits.shared(1.0) is splits


def run_file(folder, **data):
    settings = {"name": "folder", "root": str(folder), "size": 12, "val_fraction": 0.3, **data}
    content = {
        "model": {"name": "resnet20", "arguments": {"num_classes": 2}},
        "weights": str(folder / "w.pt"),
        "data": settings,
        "budget": {"fraction": 0.5},
    }
    torch.save(build_model("resnet20", {"num_classes": 2}).state_dict(), folder / "w.pt")
    (folder / "run.yml").write_text(yaml.safe_dump(content))
    return folder / "run.yml"


@pytest.mark.parametrize("name", ["folder", "digits"])
def test_the_settings_put_images_on_the_device(folder, name):
    changes = {"data.in_memory": "device", "data.name": name}
    splits = load_data(load_config(run_file(folder), changes).data)
    with working_on("meta"):
        for split in ("train", "plain", "val", "test"):
            x, _ = next(iter(splits.loader(split, 4)))
            assert (x.device.type, len(x)) == ("meta", 4)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_class_without_validation_images_is_told(folder, monkeypatch, in_memory):
    listed, told = folder / "val.txt", []
    listed.write_text("cat/1.png\ncat/4.png\n")
    monkeypatch.setattr(
        "nni_haloc.runs.job.logger.warning", lambda text, *args: told.append(text % args)
    )
    job = Job(
        load_config(run_file(folder, val_list=str(listed), in_memory=in_memory)), folder / "out"
    )
    assert told == ["validation images: none of class 'dog'"]
    assert job.splits.missing("train") == []


def test_a_class_of_one_image_is_named(folder):
    for path in sorted((folder / "train" / "dog").iterdir())[1:]:
        path.unlink()
    with pytest.raises(
        ValueError,
        match="val_fraction: expected validation images of every class, found class 'dog' has 1 of "
        "11 training",
    ):
        image_folder(folder, 12, 0.3)


def test_a_class_folder_without_images_is_named(folder):
    (folder / "test" / "e.mu").mkdir()
    message = r"expected an image \(\.jpg, .*\) of each class, found none of e\.mu"
    with pytest.raises(FileNotFoundError, match=rf"^{folder / 'test'}: {message}$"):
        image_folder(folder, 12)


def test_a_folder_without_classes_is_named(folder):
    shutil.rmtree(folder / "train" / "cat")
    shutil.rmtree(folder / "train" / "dog")
    with pytest.raises(
        FileNotFoundError, match=rf"Couldn't find any class folder in {folder / 'train'}"
    ):
        image_folder(folder, 12)


def damaged(folder, damage):
    path = folder / "train" / "cat" / "3.png"
    if damage == "no such file":
        path.unlink()
        path.symlink_to("nowhere")
    else:
        path.write_bytes(path.read_bytes()[:200] if damage == "truncated" else b"no image at all")
    return re.escape(f"{path}: {damage}")


@pytest.mark.parametrize("damage", ["truncated", "not an image that can be read", "no such file"])
def test_a_damaged_image_is_named_when_it_is_read(folder, damage):
    line = damaged(folder, damage)
    with pytest.raises(HalocError, match=f"^{line}$"):
        image_folder(folder, 12, 0.3, in_memory=True)
    (folder / "val.txt").write_text("dog/1.png")
    splits = image_folder(folder, 12, val_list=folder / "val.txt")
    for workers in (0, 1):
        with pytest.raises(HalocError, match=f"^{line}$"):
            list(splits.loader("train", 4, workers=workers))


def test_a_data_set_smaller_than_a_batch_is_one_batch(folder):
    splits = image_folder(folder, 12, 0.3, in_memory=True)
    for split, number in (("train", 14), ("val", 6)):
        (batch,) = splits.loader(split, 128, shuffle=True)
        assert len(batch[0]) == number
