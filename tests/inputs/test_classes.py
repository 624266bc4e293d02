"""The classes of a folder, and the outputs of the network that they belong to."""

import json
import shutil

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder

from nni_haloc import DataError, SettingsError
from nni_haloc.inputs.classes import class_names, places_of
from nni_haloc.inputs.config import load_config, parse_config
from nni_haloc.inputs.data import digits, load_data
from nni_haloc.inputs.image_folder import image_folder
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.registries import DATA, MODELS
from nni_haloc.inputs.splits import Splits
from nni_haloc.inputs.tensor_images import TensorImages
from nni_haloc.runs.identity import search_identity
from nni_haloc.runs.job import Job
from nni_haloc.runs.run import run, search_only
from nni_haloc.runs.stages.pretrain import train_original
from nni_haloc.training.finetuning import accuracy

SIX = ["c0", "c1", "c2", "c3", "c4", "c5"]
SUBSET = ["c1", "c3", "c5"]


def grey_of(name):
    return 20 + 40 * int(name[1])


def write(root, classes=SUBSET, **numbers):
    """Write images whose grey tells their class, in folders of class folders."""
    for part, number in {"train": 6, "test": 3, **numbers}.items():
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                image = Image.new("RGB", (8, 8), (grey_of(name),) * 3)
                image.save(root / part / name / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path)


class KnowsSix(nn.Module):
    """It is right on all six classes: the output is highest whose grey the image has."""

    def forward(self, x):
        greys = torch.tensor([grey_of(name) / 255 for name in SIX])
        return -(x.mean((1, 2, 3))[:, None] - greys).abs()


def config(folder, outputs=6, **data):
    content = {
        "model": {"name": "resnet20", "arguments": {"num_classes": outputs}},
        "weights": "w.pt",
        "data": {"name": "folder", "root": ".", "size": 8, "val_fraction": 0.34, **data},
        "budget": 0.5,
    }
    torch.save(build_model("resnet20", {"num_classes": outputs}).state_dict(), folder / "w.pt")
    (folder / "run.yml").write_text(yaml.safe_dump(content))
    return load_config(folder / "run.yml")


# The number of outputs


def test_a_network_with_other_outputs_than_classes_is_one_line_before_anything_runs(folder):
    settings = config(folder)
    line = (
        "model: resnet20 has 6 outputs, and the data 3 classes, 'c1', 'c3', 'c5'; "
        "name the class of each output, in order, in data.classes"
    )
    (folder / "w.pt").rename(folder / "w.safetensors")
    untrained = settings.model_copy(update={"weights": str(folder / "none.safetensors")})
    shutil.copy(folder / "w.safetensors", folder / "w.pt")
    for start in (run, search_only, lambda *a: train_original(untrained), Job):
        with pytest.raises(DataError) as raised:
            start(settings, folder / "out")
        assert str(raised.value) == line
    assert not (folder / "out").exists()
    assert not (folder / "none-training").exists()


def test_a_network_with_fewer_outputs_than_classes_needs_another_network(folder):
    with pytest.raises(DataError, match="has 2 outputs, and the data 3 .* an output for each"):
        Job(config(folder, outputs=2), folder / "out")


@pytest.mark.parametrize("outputs", [1, 9, 11])
@pytest.mark.parametrize("name", ["digits", "stripes"])
def test_other_data_sets_are_compared_too(added, tmp_path, name, outputs):
    settings = added(name, outputs)
    with pytest.raises(DataError, match=f"model: flat has {outputs} outputs, and the data (10|2) "):
        Job(settings, tmp_path / "out")


def test_labels_of_another_packages_data_set_are_checked(added, tmp_path):
    settings = added("stripes", 2)
    Job(settings, tmp_path / "out")
    wrong = {
        "labels of the validation images: expected class indices from 0 to 1, .*found 2": [0, 2],
        "labels of the validation images: expected class indices from 0 to 1, .*found -1": [0, -1],
        "labels of the validation images: .*found float32 of shape": [0.0, 1.0],
        r"labels of the validation images: .*found shape \(8, 2\); one-hot": [[0, 1], [1, 0]],
        "labels: expected class indices, one number for each image": [[0], [1, 0]],
        "labels: expected class indices, one number for each": ["lying", "standing"],
    }
    for message, labels in wrong.items():
        parts = [Pairs(labels if split == "val" else [0, 1]) for split in ("train", "val", "test")]
        data = Splits(parts[0], *parts, ["lying", "standing"])
        DATA._added["stripes"] = lambda settings, data=data: data
        with pytest.raises(DataError, match=f"^{message}"):
            Job(settings, tmp_path / "out")


class Pairs(torch.utils.data.Dataset):
    """Somebody's data set: images, and labels in turn."""

    def __init__(self, labels, targets=False):
        self.values = labels
        if targets:
            self.targets = [labels[i % len(labels)] for i in range(8)]

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.zeros(1, 8, 8), self.values[index % len(self.values)]


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Return a function that makes settings with a network and a data set of somebody else's."""

    def flat(outputs):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))

    def stripes(settings):
        data = Pairs([0, 1])
        return Splits(data, data, data, data, ["lying", "standing"])

    def settings(name, outputs, **data):
        torch.save(flat(outputs).state_dict(), tmp_path / "w.pt")
        model = {"name": "flat", "arguments": {"outputs": outputs}}
        content = {"model": model, "weights": "w.pt", "data": {"name": name, **data}, "budget": 0.5}
        (tmp_path / "run.yml").write_text(yaml.safe_dump(content))
        return load_config(tmp_path / "run.yml")

    monkeypatch.setitem(MODELS._added, "flat", flat)
    monkeypatch.setitem(DATA._added, "stripes", stripes)
    return settings


# Folder names and outputs


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("as_file", [True, False])
def test_a_subset_of_the_classes_has_the_labels_of_its_outputs(folder, in_memory, as_file):
    listed = folder / "classes.txt"
    listed.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*SIX, "", ""]).encode())
    options = {"mean": [0.0] * 3, "std": [1.0] * 3, "classes": listed if as_file else SIX}
    splits = image_folder(folder, 8, 0.34, in_memory=in_memory, **options)
    assert splits.classes == SIX
    for split in ("plain", "val", "test"):
        loader = splits.loader(split, 4)
        assert sorted({int(y) for _, labels in loader for y in labels}) == [1, 3, 5]
        assert accuracy(KnowsSix(), loader) == (1.0,)
    unnamed = image_folder(folder, 8, 0.34, in_memory=in_memory, mean=[0.0] * 3, std=[1.0] * 3)
    assert accuracy(KnowsSix(), unnamed.loader("test", 4)) == (0.0,)  # what it is all about


def test_the_settings_name_the_classes(folder):
    (folder / "classes.txt").write_text("\n".join(SIX))
    for classes in (SIX, "classes.txt"):
        job = Job(config(folder, classes=classes), folder / "out")
        assert job.splits.labels["test"].unique().tolist() == [1, 3, 5]
        assert job.guessing("test") == {"images": 9, "chance": pytest.approx(1 / 3)}


def test_only_classes_that_other_splits_have_are_missed(folder, caplog):
    """Of an ImageNet network's thousand, Imagenette has ten."""
    shutil.rmtree(folder / "test" / "c3")
    with caplog.at_level("WARNING", "nni_haloc"):
        Job(config(folder, classes=SIX), folder / "out")
    assert caplog.messages == ["test images: none of class 'c3'"]


@pytest.mark.parametrize("number", [2, 3, 5, 7])
def test_there_is_a_name_for_each_output(folder, number):
    names = ["c1", "c3", "c5", "x", "y", "z", "w"][:number]
    message = f"data.classes: expected a name for each of the 6 outputs of resnet20, found {number}"
    if number < 3:
        message = "class 'c5' is none of the 2 names of data.classes"
    with pytest.raises(DataError, match=message):
        Job(config(folder, classes=names), folder / "out")


def test_a_folder_that_is_not_listed_is_named_with_what_is_like_it(folder):
    with pytest.raises(ValueError, match=r"train: class 'c5' is none of the 3 .*mean 'c55'\?$"):
        image_folder(folder, 8, 0.34, classes=["c1", "c3", "c55"])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "expected a name for each of the network's outputs, found none"),
        (["a", "b", "a"], "expected a name once, found 'a' for outputs 0 and 2"),
        (["a", 1], "expected names in quotes, one for each output, found 1"),
        (["a", True], "expected names in quotes, one for each output, found True"),  # YAML's `yes`
        (["a", None], "expected names in quotes, one for each output, found None"),
        (["a", ""], "expected names in quotes, one for each output, found ''"),
        ({"a": 0}, "expected the class of each output, or a file"),
        (3, "expected the class of each output, or a file .*, found 3"),
        ("none.txt", "no such file or folder: .*none.txt"),
        ("train", "train: Is a directory"),
        ("empty.txt", "empty.txt: expected a name for each of the network's outputs, found none"),
        ("twice.txt", "twice.txt: expected a name once, found 'a' for outputs 0 and 1"),
        ("w.pt", "w.pt: line 2: expected text in UTF-8"),
    ],
)
def test_a_list_that_names_no_outputs_is_refused_with_the_settings(folder, classes, message):
    (folder / "empty.txt").write_text("\n \n")
    (folder / "twice.txt").write_text("a\na\n")
    with pytest.raises(SettingsError, match=rf"run.yml: data.classes: .*{message}"):
        config(folder, classes=classes)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=8, unique=True), st.data())
def test_a_label_is_the_place_in_the_list(names, data):
    some = data.draw(st.lists(st.sampled_from(names), unique=True))
    assert class_names(names) == names
    assert places_of(some, names, "") == {name: names.index(name) for name in some}


def test_digits_may_have_other_outputs(added, tmp_path):
    """A background before the digits, which stand in another order."""
    names = ["background", *map(str, reversed(range(10)))]
    splits = load_data(added("digits", 11, classes=names).data)
    plain = digits(0.1)
    assert splits.classes == names
    for split in ("train", "plain", "val", "test"):
        assert torch.equal(getattr(splits, split).labels, 10 - getattr(plain, split).labels)
    with pytest.raises(ValueError, match="data 'digits': class '9' is none of the 9 names"):
        load_data(added("digits", 11, classes=[*map(str, range(9))]).data)


@pytest.mark.parametrize("kind", ["items", "targets", "tensors", "in memory"])
def test_another_packages_data_may_have_other_outputs(added, kind):
    pairs = {
        "items": Pairs([0, 1]),
        "targets": Pairs([0, 1], targets=True),
        "tensors": TensorDataset(torch.zeros(8, 1, 8, 8), torch.arange(8) % 2),
        "in memory": TensorImages(torch.zeros(8, 1, 8, 8), torch.arange(8) % 2, [0.0], [1.0]),
    }
    data = pairs[kind]
    DATA._added["stripes"] = lambda settings: Splits(data, data, data, data, ["lying", "standing"])
    splits = load_data(added("stripes", 4, classes=["a", "standing", "b", "lying"]).data)
    expected = [3, 1] * 4
    assert splits.labels["val"].tolist() == expected
    assert [int(y) for _, labels in splits.loader("val", 3) for y in labels] == expected
    assert splits.labelled("plain", 8)[1].sort().values.tolist() == sorted(expected)
    assert data[1][1] == 1


# Folders and files that are no classes and no images


def test_hidden_folders_and_files_are_no_classes_and_no_images(folder):
    before = image_folder(folder, 8, 0.34)
    image = folder / "train" / "c1" / "0.png"
    hidden = [
        ".ipynb_checkpoints/0-checkpoint.png",
        ".git/0.png",
        "__MACOSX/._0.png",
        "__MACOSX/c1/0.png",
        "@eaDir/0.png/SYNOPHOTO_THUMB_M.png",
        "c1/._0.png",
        "c1/.0.png",
        "c1/.ipynb_checkpoints/0-checkpoint.png",
        "c1/deep/.hidden/0.png",
        "c1/__MACOSX/0.png",
        "c1/@eaDir/0.png",
    ]
    for part in ("train", "test"):
        for name in hidden:
            path = folder / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, path)
        for name in ("Thumbs.db", ".DS_Store", "c1/Thumbs.db", "c1/.DS_Store", "c1/notes.txt"):
            (folder / part / name).write_text("no image")
    after = image_folder(folder, 8, 0.34)
    assert after.classes == before.classes == SUBSET
    for split in ("train", "val", "test"):
        assert torch.equal(after.labels[split], before.labels[split])
    listed = folder / "val.txt"
    listed.write_text("c1/1.png\nc1/.0.png")
    with pytest.raises(ValueError, match=r"entry 2, 'c1/.0.png', is not a training image"):
        image_folder(folder, 8, val_list=listed)


def test_without_hidden_files_the_classes_are_torchvisions(folder):
    (folder / "train" / "c1" / "deep").mkdir()
    shutil.copy(folder / "train" / "c1" / "0.png", folder / "train" / "c1" / "deep" / "x.PNG")
    theirs = ImageFolder(str(folder / "train"))
    ours = image_folder(folder, 8, 0.34)
    assert ours.classes == theirs.classes
    whole = ours.plain.dataset
    assert whole.samples == theirs.samples


def test_a_folder_whose_own_path_is_hidden_is_read(tmp_path):
    splits = image_folder(write(tmp_path / ".cache" / "__MACOSX" / "data"), 8, 0.34)
    assert (splits.classes, len(splits.test)) == (SUBSET, 9)


def test_a_class_of_hidden_images_alone_is_a_class_without_images(folder):
    (folder / "train" / "c2").mkdir()
    shutil.copy(folder / "train" / "c1" / "0.png", folder / "train" / "c2" / "._0.png")
    with pytest.raises(FileNotFoundError, match=r"train: expected an image .* found none of c2$"):
        image_folder(folder, 8, 0.34)


# A folder of validation images


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_of_validation_images_is_used_and_the_log_says_so(folder, caplog, in_memory):
    for name in SUBSET:
        (folder / "val" / name).mkdir(parents=True)
        for i in range(2):
            shutil.copy(folder / "test" / name / f"{i}.png", folder / "val" / name / f"{i}.png")
    (folder / "val" / ".hidden").mkdir()
    with caplog.at_level("INFO", "nni_haloc"):
        splits = image_folder(folder, 8, 0.34, in_memory=in_memory)
    sizes = {name: len(getattr(splits, name)) for name in ("train", "plain", "val", "test")}
    assert sizes == {"train": 18, "plain": 18, "val": 6, "test": 9}
    assert caplog.messages == [
        f"validation images: those of {folder / 'val'} (data.val_fraction is not used)"
    ]
    listed, names = folder / "val.txt", ["c1/1.png", "c3/0.png", "c5/5.png"]
    listed.write_text("\n".join(names))
    splits = image_folder(folder, 8, val_list=listed, in_memory=in_memory)
    assert (len(splits.train), len(splits.val)) == (15, 3)
    assert image_folder(folder, 8, val_list=listed).labels["val"].tolist() == [0, 1, 2]


def test_imagenets_folder_of_test_images_is_no_folder_of_validation_images(folder):
    (folder / "test").rename(folder / "val")
    with pytest.raises(FileNotFoundError, match=r"no folder 'test' in .*; .* set data.test: val$"):
        image_folder(folder, 8, 0.34)
    splits = image_folder(folder, 8, 0.34, test="val")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (11, 7, 9)


@pytest.mark.parametrize("other", ["test", "val"])
def test_splits_of_other_classes_name_them(folder, other):
    if other == "val":
        shutil.copytree(folder / "test", folder / "val")
    (folder / other / "c5").rename(folder / other / "c7")
    message = f"the classes of 'train' and '{other}' differ: only 'train' has 'c5'; only '{other}'"
    with pytest.raises(ValueError, match=message + " has 'c7'; expected the same folders"):
        image_folder(folder, 8, 0.34)
    (folder / other / "c7").rename(folder / other / "c5")
    shutil.copytree(folder / other / "c1", folder / other / "c9")
    with pytest.raises(ValueError, match=f"differ: only '{other}' has 'c9'; expected"):
        image_folder(folder, 8, 0.34)
    names = [*SIX, "c9"]
    assert image_folder(folder, 8, 0.34, classes=names).missing("train") == ["c9"]


def test_many_classes_are_not_all_named(tmp_path):
    write(tmp_path, [f"c{i}" for i in range(5)], train=2, test=1)
    for i in range(10, 30):
        shutil.copytree(tmp_path / "train" / "c1", tmp_path / "train" / f"c{i}")
    with pytest.raises(ValueError, match="has 'c10', 'c11', 'c12', 'c13', 'c14' and 15 more; "):
        image_folder(tmp_path, 8, 0.5)


# Settings that are saved


def test_the_state_of_a_search_depends_on_the_classes(folder):
    listed = folder / "classes.txt"
    listed.write_text("\n".join(SIX))
    first = search_identity(config(folder, classes="classes.txt"))
    listed.write_text("\n".join(reversed(SIX)))
    assert first != search_identity(config(folder, classes="classes.txt"))
    plain = search_identity(config(folder))
    keys = {"data.classes", "data.exif", "data.channels"}
    assert not keys & plain.keys()  # as before there were such settings
    changed = {"classes": SIX, "exif": True, "channels": 1}
    assert keys <= search_identity(config(folder, **changed)).keys()


def test_settings_that_a_run_has_saved_are_read(folder):
    settings = config(folder, classes=SIX, channels=1, size=[8, 12], exif=True)
    saved = json.loads(json.dumps(settings.model_dump(mode="json")))
    assert parse_config(saved, "saved") == settings
    for key in ("classes", "channels", "exif"):
        del saved["data"][key]
    data = parse_config(saved, "saved").data
    assert (data.classes, data.channels, data.exif) == (None, None, False)
